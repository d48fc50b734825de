"""First values of an adapter's factors, on their manifolds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def initial_factors(
    sizes: Sequence[int], rank: int, manifolds: Sequence[str], paired: bool, **like: Any
) -> list[Tensor]:
    """Factors U^(k), (n_k, rank) each, drawn from torch's global generator; `like` names device and dtype.

    Euclidean: the first factor is 0, so that the update is exactly 0. The second starts as LoRA's A over the whole
    kernel, uniform within +-1/sqrt(n_2 n_3 ...), the rest with entries of variance 1. So their outer products vary as
    LoRA's A, and move as it does: AdamW moves an entry by about the learning rate, whatever its size, and the small
    factors multiply that. With small factors of norm 1 a step on the second would move a 3 x 3 kernel a third as far.

    Oblique and Stiefel: uniform on the manifold, where no factor can be 0. The update's norm at s = eps is at most
    eps * rank (for Stiefel factors eps * sqrt(rank)). With `paired`, component 2j + 1 is component 2j with the first
    factor turned round: at equal s the two cancel, whatever s is; an odd last component stays without a partner.

    Raises ValueError for a Stiefel factor with more columns than rows.
    """
    factors = []
    inputs = math.prod(sizes[1:])
    for position, (size, manifold) in enumerate(zip(sizes, manifolds, strict=True)):
        if manifold == "euclidean" and position == 0:
            factors.append(torch.zeros(size, rank, **like))
        elif manifold == "euclidean":
            bound = math.sqrt(1 / inputs if position == 1 else 3)
            factors.append(torch.empty(size, rank, **like).uniform_(-bound, bound))
        elif manifold == "oblique":
            factors.append(torch.nn.functional.normalize(torch.randn(size, rank, **like), dim=0))
        elif rank <= size:
            factors.append(torch.linalg.qr(torch.randn(size, rank, **like)).Q.contiguous())
        else:
            raise ValueError(f"no {rank} orthonormal columns of {size} rows: a Stiefel factor needs rank <= {size}")
    if paired:
        for position, factor in enumerate(factors):
            partners = factor[:, 1::2]
            partners.copy_(factor[:, : 2 * partners.shape[1] : 2] * (-1 if position == 0 else 1))
    return factors
