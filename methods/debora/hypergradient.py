"""The gradient of the upper level in s: what s changes directly, and through the factors that answer to it.

With f1(B*(s), s) at the upper level and B*(s) = argmin f2(., s) at the lower, the hypergradient is
d_B f1 . d_s B* + d_s f1. For an adapter Psi(B, s) = sum_i s_i u_i^(1) (x) ... (x) u_i^(d), B = (U^(1), ..., U^(d)), and
a lower level without curvature in Psi, d_s B* is known, and no system has to be solved.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def closed_form(grad_s: Tensor, factors: Sequence[Tensor], factor_grads: Sequence[Tensor], s: Tensor) -> Tensor:
    """G(s) = d_s f1 - 1/(d-1) diag[sum_k U^(k)T d_{U^(k)} f1] (.) s^{-1} (dEBORA, Theorem 4.1; d = 2 is the paper's).

    It is the hypergradient where d_{s_i} u_i^(k) = -u_i^(k) / ((d-1) s_i), which solves the lower level's system
    d_B^2 f2 . d_s B* = -d_s d_B f2 for every d when the loss is linear in Psi. For d > 2 the paper states the
    coefficient 1 from a tridiagonal approximation; 1/(d-1) is the solution with all cross terms kept.

    Shapes, with any leading dimensions: grad_s and s (..., r), s > 0; d >= 2 factors and their gradients (..., n_k, r).
    With constrained factors, give Riemannian gradients: where these have no radial part, G is d_s f1.
    """
    d = len(factors)
    if d < 2 or len(factor_grads) != d:
        raise ValueError(f"{d} factors with {len(factor_grads)} gradients: need at least 2, and a gradient for each")
    radial = sum((factor * grad).sum(-2) for factor, grad in zip(factors, factor_grads, strict=True))
    return grad_s - radial / ((d - 1) * s)


def direct(grad_s: Tensor) -> Tensor:
    """G(s) = d_s f1, (..., r): the factors are taken as given. It equals `closed_form` on oblique and Stiefel ones."""
    return grad_s
