"""LoRA pairs that are used block by block: the update is the block diagonal of B A, of `blocks` times the rank.

A (r, n) and B (m, r) are a LoRA's own, with its r (m + n) numbers. Block i has the i-th n / blocks columns of A and the
i-th m / blocks rows of B, and is a LoRA of rank r from its own inputs to its own outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from methods.shared.canonical import lora_basis
from methods.shared.peft_names import ADAPTER
from methods.shared.truncation import largest


class BlockDown(nn.Module):
    """A in PEFT's layer: (..., n) to (..., blocks r)."""

    def __init__(self, weight: nn.Parameter, blocks: int) -> None:
        super().__init__()
        self.weight, self.blocks = weight, blocks

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        A = self.weight.unflatten(1, (self.blocks, -1))
        return torch.einsum("...ki,rki->...kr", x.unflatten(-1, (self.blocks, -1)), A).flatten(-2)


class BlockUp(nn.Module):
    """B in PEFT's layer: (..., blocks r) to (..., m)."""

    def __init__(self, weight: nn.Parameter, blocks: int) -> None:
        super().__init__()
        self.weight, self.blocks = weight, blocks

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        B = self.weight.unflatten(0, (self.blocks, -1))
        return torch.einsum("...kr,kor->...ko", x.unflatten(-1, (self.blocks, -1)), B).flatten(-2)


def use_in_blocks(layer: Any, blocks: int) -> None:
    """Have a linear PEFT layer use its pair in blocks; with 1 it stays as it is. The parameters stay, with their names.

    blocks: a divisor of inputs and outputs.
    """
    if blocks > 1:
        layer.lora_A[ADAPTER] = BlockDown(layer.lora_A[ADAPTER].weight, blocks)
        layer.lora_B[ADAPTER] = BlockUp(layer.lora_B[ADAPTER].weight, blocks)


def blocks_of(layer: Any) -> int:
    """In how many blocks a PEFT layer uses its pair."""
    return getattr(layer.lora_A[ADAPTER], "blocks", 1)


def whole_pair(B: Tensor, A: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """The pair whose plain product is the update: (m, blocks r) and (blocks r, n), 0 outside the blocks."""
    return torch.block_diag(*B.chunk(blocks)), torch.block_diag(*A.chunk(blocks, 1))


def best_in_blocks(B: Tensor, A: Tensor, blocks: int, rank: int) -> tuple[Tensor, Tensor]:
    """The pair of the same shapes whose update is the best approximation of this rank.

    The singular values of a block diagonal are those of its blocks, so that the largest of all blocks stay.
    """
    bases = [lora_basis(b, a) for b, a in zip(B.chunk(blocks), A.chunk(blocks, 1), strict=True)]
    kept = largest(torch.stack([basis.sizes for basis in bases]), rank) > 0
    left, right = zip(*(basis.factors for basis in bases), strict=True)
    return (
        torch.cat([factor * stays for factor, stays in zip(left, kept, strict=True)]),
        torch.cat([(factor * stays).T for factor, stays in zip(right, kept, strict=True)], 1),
    )
