"""The gradient of the upper level in s: what s changes directly, and through the factors that answer to it.

With f1(B*(s), s) at the upper level and B*(s) = argmin f2(., s) at the lower, the hypergradient is
d_B f1 . d_s B* + d_s f1, where d_s B* solves d_B^2 f2 . d_s B* = -d_s d_B f2. For an adapter
Psi(B, s) = sum_i s_i u_i^(1) (x) ... (x) u_i^(d), B = (U^(1), ..., U^(d)), and a lower level without curvature in Psi,
d_s B* is known, and no system has to be solved (`closed_form`). `direct` leaves it out, `implicit` solves for it. Ours:
`radial` gives d_s f from the factors' own gradients, and `path_point` the way along which d_s f1 is averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Linear = Callable[[Tensor], Tensor]  # a linear map, given by its products with a vector


def closed_form(
    grad_s: Tensor,
    factors: Sequence[Tensor],
    factor_grads: Sequence[Tensor],
    s: Tensor,
    paper_coefficient: bool = False,
) -> Tensor:
    """G(s) = d_s f1 - 1/(d-1) diag[sum_k U^(k)T d_{U^(k)} f1] (.) s^{-1} (dEBORA, Theorem 4.1; d = 2 is the paper's).

    It is the hypergradient where d_{s_i} u_i^(k) = -u_i^(k) / ((d-1) s_i), which solves the lower level's system
    d_B^2 f2 . d_s B* = -d_s d_B f2 for every d when the loss is linear in Psi. For d > 2 the paper states the
    coefficient 1 from a tridiagonal approximation (`paper_coefficient`); 1/(d-1) is the solution with all cross terms
    kept.

    Shapes, with any leading dimensions: grad_s and s (..., r), s > 0; d >= 2 factors and their gradients (..., n_k, r).
    With constrained factors, give Riemannian gradients: where these have no radial part, G is d_s f1.
    """
    d = len(factors)
    if d < 2 or len(factor_grads) != d:
        raise ValueError(f"{d} factors with {len(factor_grads)} gradients: need at least 2, and a gradient for each")
    radial = sum((factor * grad).sum(-2) for factor, grad in zip(factors, factor_grads, strict=True))
    return grad_s - radial / ((1 if paper_coefficient else d - 1) * s)


def direct(grad_s: Tensor) -> Tensor:
    """G(s) = d_s f1, (..., r): the factors are taken as given. It equals `closed_form` on oblique and Stiefel ones."""
    return grad_s


def radial(factors: Sequence[Tensor], factor_grads: Sequence[Tensor]) -> Tensor:
    """s (.) d_s f, (sum of r,), from one factor of every component and its Euclidean gradient (ours).

    A loss that sees s_i and u_i^(k) in their product alone has s_i d_{s_i} f = <u_i^(k), d_{u_i^(k)} f> for every mode
    k, on every manifold, since both are the derivative along a scaling of the component. A term in the factors alone
    (a penalty) or a Riemannian gradient, which has no radial part, breaks it.

    factors and factor_grads: one of each for every layer, (n, r), of any sizes.
    """
    return torch.cat([product.sum(0) for product in torch._foreach_mul(list(factors), list(factor_grads))])


def path_point(j: int, points: int) -> float:
    """The j-th of the midpoints (j + 1/2) / points of (0, 1), j from 0.

    For one loss f1, <mean over the points t of d_s f1(t s), s> tends to f1(s) - f1(0), what the components
    contribute together; its error falls as points^-2 (the midpoint rule).
    """
    return (j + 0.5) / points


class Solution(NamedTuple):
    """An approximate solution of a symmetric system, and how it was reached."""

    value: Tensor
    residual: float  # norm of A x - b over the norm of b
    products: int  # products with A that were made


def implicit(
    grad_s: Tensor,
    grad_factors: Tensor,
    hessian: Linear,
    mixed: Linear,
    damping: float,
    iterations: int,
    tolerance: float = 1e-6,
) -> tuple[Tensor, Solution]:
    """G(s) = d_s f1 - (d_s d_B f2)^T y with (d_B^2 f2 + damping I) y = d_B f1: the adjoint form, one solve for all s.

    The Hessian is indefinite, damped or not (it is bilinear in two factors), hence MINRES. Without damping, decay or a
    constraint the exact solution makes G zero for d = 2: the factors absorb any change of a positive s.

    grad_s is (r,), grad_factors d_B f1 flattened, (N,). hessian: (N,) to (N,), d_B^2 f2 times a vector. mixed: (N,) to
    (r,), (d_s d_B f2)^T times a vector. With constrained factors all of them are Riemannian, in the tangent space.
    Returns G, (r,), and the solution y.
    """
    solution = minres(lambda vector: hessian(vector) + damping * vector, grad_factors, iterations, tolerance)
    return grad_s - mixed(solution.value), solution


def minres(product: Linear, right: Tensor, iterations: int, tolerance: float = 0.0) -> Solution:
    """x of smallest |A x - b| in the Krylov space of `iterations` products (MINRES, Paige and Saunders, 1975).

    A is symmetric, definite or not, and given by `product`; b = `right`, (N,). It starts at 0 and stops early where the
    residual is at most `tolerance` times |b|, or where the Krylov space is exhausted. It waits for the device once per
    product. A non-finite product ends it with a non-finite residual.
    """
    x, norm = torch.zeros_like(right), float(right.norm())
    previous, current, beta = torch.zeros_like(right), right / norm if norm else right, 0.0
    older_direction, direction = torch.zeros_like(right), torch.zeros_like(right)
    # Rotations of the last step and of the one before: they make the Lanczos matrix triangular.
    cosine, sine, older_cosine, older_sine = 1.0, 0.0, 1.0, 0.0
    residual, largest, made, precision = norm, 0.0, 0, torch.finfo(right.dtype).eps
    while made < iterations and abs(residual) > tolerance * norm:
        made += 1
        following = product(current)
        alpha = float(current @ following)
        following = following - alpha * current - beta * previous
        next_beta = float(following.norm())
        epsilon, delta = older_sine * beta, cosine * older_cosine * beta + sine * alpha
        gamma_bar = cosine * alpha - sine * older_cosine * beta
        gamma = math.hypot(gamma_bar, next_beta)
        largest = max(largest, abs(alpha), next_beta)
        # |A r| over |r| for the residual r so far: where that is nothing, x is the least-squares solution.
        if math.hypot(gamma_bar, cosine * next_beta) <= precision**0.5 * largest:
            break
        older_cosine, older_sine, cosine, sine = cosine, sine, gamma_bar / gamma, next_beta / gamma
        ahead = (current - delta * direction - epsilon * older_direction) / gamma
        older_direction, direction = direction, ahead
        x, residual = x + cosine * residual * direction, -sine * residual
        if next_beta <= precision**0.75 * largest:  # the Krylov space is exhausted
            break
        previous, current, beta = current, following / next_beta, next_beta
    return Solution(x, abs(residual) / norm if norm else 0.0, made)
