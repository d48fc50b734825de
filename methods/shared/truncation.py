"""Trained updates cut to a rank for an evaluation, and put back: what `Adaptation.at_rank` is made of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


@contextlib.contextmanager
def swapped(values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Within it each tensor holds the value given for it, of its own shape; after it its own one, bit for bit."""
    own = {tensor: tensor.detach().clone() for tensor in values}
    try:
        for tensor, value in values.items():
            tensor.data.copy_(value)
        yield
    finally:
        for tensor, value in own.items():
            tensor.data.copy_(value)


def largest(values: Tensor, rank: int) -> Tensor:
    """`values`, of any shape, with 0 for all but the `rank` of largest magnitude, the first of equals."""
    order = values.detach().abs().flatten().argsort(descending=True, stable=True)
    kept = torch.zeros_like(values)
    kept.view(-1)[order[:rank]] = values.detach().flatten()[order[:rank]]
    return kept


def best_approximation(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The pair whose product is the best approximation of B A of this rank (Eckart and Young, 1936).

    B (m, r) and A (r, n), also convolutions' (m, r, 1, 1) and (r, C, kH, kW). The pair has their shapes and dtype, what
    is cut being 0. From the SVD of the small product of two triangles, in float64.
    """
    Q_B, R_B = torch.linalg.qr(B.detach().flatten(1).double())
    Q_A, R_A = torch.linalg.qr(A.detach().flatten(1).double().T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    roots = S[:rank].sqrt()
    found_B, found_A = torch.zeros_like(B).flatten(1), torch.zeros_like(A).flatten(1)
    found_B[:, : len(roots)] = (Q_B @ U[:, :rank] * roots).to(B.dtype)
    found_A[: len(roots)] = (roots[:, None] * (Vh[:rank] @ Q_A.T)).to(A.dtype)
    return found_B.view_as(B), found_A.view_as(A)
