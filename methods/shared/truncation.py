"""Trained updates cut to a rank for an evaluation, and put back: what `Adaptation.at_rank` is made of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from methods.shared.canonical import lora_basis


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
    is cut being 0.
    """
    left, right = lora_basis(B, A).factors
    left[:, rank:], right[:, rank:] = 0, 0
    return left.reshape(B.shape), right.T.reshape(A.shape)
