"""Low-rank updates in a basis of their own.

U diag(s) V^T is the same matrix for many U and V, and any of them may come out of training: U R and V R^-T with any
invertible R, where s is constant. So what is said of raw columns (their norms, the effect of removing one) says little
of the update. Here two factors get the singular value decomposition of their product. More factors, a sum of outer
products, have no such freedom beside the lengths and the order of their columns, which are made definite.

The arithmetic is in float64, the results are in the factors' dtype. Any rank, also 0 and above a factor's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from harness.errors import Diverged
from methods.shared.optimizer_state import change_basis


class Basis(NamedTuple):
    """Factors in another basis, whose update is the same.

    factors: U^(1), ..., U^(d), (n_k, r) each. s: (r,). sizes: the norms of the components, (r,) float64, descending:
    with two factors the singular values. maps: for each factor the P of `methods.shared.optimizer_state.change_basis`,
    (r, r) float64: its gradient is G P^T where it was G.
    """

    factors: tuple[Tensor, ...]
    s: Tensor
    sizes: Tensor
    maps: tuple[Tensor, ...]


def singular_basis(U: Tensor, V: Tensor, s: Tensor, unit_columns: bool = False) -> Basis:
    """The pair U (m, r), V (n, r), s (r,) > 0 in the basis of the SVD of U diag(s) V^T.

    s keeps its numbers and has them in descending order. The columns of each new factor are orthogonal, and
    |u_i| = |v_i| = sqrt(sigma_i / s_i), the pair of least |u|^2 + |v|^2. With `unit_columns` they are of length 1 and s
    is sigma, whose sum is at most that of s if the given columns have length 1 as well.

    A direction without a singular value, up to rounding in the factors' dtype (a new adapter has only those), must not
    end as two columns of 0, from which no gradient leads away. So u_i is 0, and v_i is a direction of V orthogonal to
    the others, as long as the columns of the longer factor are (root mean square): a new LoRA pair.

    The gradient of U, dW V diag(s), sees the other factor alone. So its map is P^T = diag(1/s) V^+ V' diag(s'), and
    U's for V. It needs no inverse of a deficient factor: what V had no direction for begins without a past.

    Raises Diverged where a number is not finite: a cut may come before the loop has seen the loss that would tell.
    """
    scale = s.double()
    (Q_U, R_U), (Q_V, R_V) = _triangle(U), _triangle(V)
    core = (R_U * scale) @ R_V.T
    if not core.isfinite().all():
        raise Diverged("an adapter's factors are not finite")
    X, sigma, Yh = torch.linalg.svd(core)
    s_new = sigma.to(s.dtype) if unit_columns else s.sort(descending=True).values
    found = sigma > torch.finfo(U.dtype).eps * sigma[:1]
    lengths = torch.ones_like(sigma) if unit_columns else torch.where(found, sigma / s_new, 0).sqrt()
    longer = torch.maximum(R_U.norm(), R_V.norm()) / max(1, len(s)) ** 0.5
    in_U, in_V = X * lengths, Yh.T * torch.where(found | unit_columns, lengths, longer)
    factors = (Q_U @ in_U)[: len(U)].to(U.dtype), (Q_V @ in_V)[: len(V)].to(V.dtype)
    maps = tuple(
        (torch.linalg.pinv(R, rtol=torch.finfo(U.dtype).eps) @ new * s_new / scale[:, None]).T
        for R, new in ((R_V, in_V), (R_U, in_U))
    )
    return Basis(factors, s_new, sigma, maps)


def normalised(factors: Sequence[Tensor], s: Tensor, units: Sequence[float] | None = None) -> Basis:
    """The CP form sum_i s_i u_i^(1) (x) ... (x) u_i^(d), factors (n_k, r) and s (r,) > 0, with definite lengths.

    Components come by descending size sigma_i = s_i |u_i^(1)| ... |u_i^(d)|, s keeps its numbers and has them in
    descending order, and every column of component i has the length (sigma_i / s_i)^(1/d), in `units`: of each factor
    the length that counts as one, 1 unless given. A component with a column of 0 has no size, and its columns stay as
    they are: the start of training, where the others give that one its gradient. On columns of length 1 it only sorts.
    """
    unit = torch.tensor(units or [1.0] * len(factors), dtype=torch.float64, device=s.device)[:, None]
    lengths = torch.stack([factor.detach().double().norm(dim=0) for factor in factors])
    sizes = component_sizes(factors, s)
    order = sizes.argsort(descending=True, stable=True)
    sizes, lengths, s_new = sizes[order], lengths[:, order], s.sort(descending=True).values
    length = (sizes / s_new / unit.prod()) ** (1 / len(factors))
    scales = torch.where(sizes > 0, unit * length / lengths, 1.0)  # (d, r)
    # A column's gradient is s_i times the product of the other columns.
    of_gradients = (s_new / s.double()[order]) * scales.prod(0) / scales
    permutation = torch.eye(len(s), dtype=sizes.dtype, device=s.device)[order]
    new = (
        (factor.detach().double()[:, order] * scale).to(factor.dtype)
        for factor, scale in zip(factors, scales, strict=True)
    )
    return Basis(tuple(new), s_new, sizes, tuple(scale[:, None] * permutation for scale in of_gradients))


def component_sizes(factors: Sequence[Tensor], s: Tensor) -> Tensor:
    """The norms of the components, s_i |u_i^(1)| ... |u_i^(d)|, (r,) float64."""
    return s.double() * torch.stack([factor.detach().double().norm(dim=0) for factor in factors]).prod(0)


def rotate_lora(B: nn.Parameter, A: nn.Parameter, optimizer: Optimizer | None) -> Basis:
    """Bring a LoRA pair, (m, r) and (r, n), also convolutions' (m, r, 1, 1) and (r, C, kH, kW), to the SVD of B A.

    What the optimizer holds of them goes with them. Returns the basis of `singular_basis`, with s = 1.
    """
    basis = lora_basis(B, A)
    change_basis(B, basis.factors[0].reshape(B.shape), basis.maps[0], 1, optimizer)
    change_basis(A, basis.factors[1].T.reshape(A.shape), basis.maps[1], 0, optimizer)
    return basis


def lora_basis(B: Tensor, A: Tensor) -> Basis:
    """`singular_basis` of a LoRA pair as in `rotate_lora`: B as a matrix, A as one and transposed, s = 1."""
    U, V = B.detach().flatten(1), A.detach().flatten(1).T
    return singular_basis(U, V, torch.ones(U.shape[1], dtype=U.dtype, device=U.device))


def _triangle(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Q (n, r) and R (r, r) of a factor (n, r), with rows of 0 where it has fewer than columns."""
    rows, rank = factor.shape
    return torch.linalg.qr(nn.functional.pad(factor.detach().double(), (0, 0, 0, max(0, rank - rows))))
