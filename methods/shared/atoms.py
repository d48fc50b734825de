"""Small square matrices, atoms, that all layers of a LoRA share, and the query that mixes them for every token."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from methods.shared.router import top_k

NAME = "update_atoms"  # of the bank, as a part of the model


class Atoms(nn.Module):
    """A bank of `number` atoms, (rank, rank), of which a token uses the `chosen` that answer its query best.

    Of a layer with fewer components than `rank`, the leading rows and columns of the atoms are used.

    The summary of a token is the mean of what the bank gave it in the layers before, as the model called them; 0 in the
    first, where the layer before had another number of them, and outside of a forward of the model.
    """

    def __init__(self, number: int, rank: int, chosen: int, spread: float, rng: torch.Generator) -> None:
        super().__init__()
        self.chosen = chosen
        noise = torch.randn(number, rank, rank, generator=rng) * spread
        noise[0] = 0
        self.atoms = nn.Parameter(torch.eye(rank) + noise)
        self.keys = nn.Parameter(torch.randn(number, rank, generator=rng))
        self.query = nn.Parameter(torch.randn(rank, 2 * rank, generator=rng) / math.sqrt(2 * rank))
        self.is_in_forward = False
        self.before: list[Tensor] = []  # sum and number of the states before

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """C(x) z of the low-rank states z = A x, (..., r), and which atoms the tokens chose, bool, (..., number)."""
        rank, most = state.shape[-1], self.query.shape[0]
        padded = functional.pad(state, (0, most - rank))
        query = functional.linear(torch.cat([padded, self._summary(padded)], -1), self.query)
        logits = functional.linear(query, self.keys) / math.sqrt(most)
        chosen = top_k(logits, self.chosen)
        weights = logits.masked_fill(~chosen, -math.inf).softmax(-1)
        each = torch.einsum("aij,...j->...ai", self.atoms[:, :rank, :rank], state)
        mixed = (weights.unsqueeze(-1) * each).sum(-2)
        if self.is_in_forward:
            self._remember(functional.pad(mixed, (0, most - rank)))
        return mixed, chosen

    def _summary(self, like: Tensor) -> Tensor:
        if self.before and self.before[0].shape == like.shape:
            total, number = self.before
            return (total / number).to(like.dtype)
        return torch.zeros_like(like)

    def _remember(self, state: Tensor) -> None:
        if self.before and self.before[0].shape == state.shape:
            self.before = [self.before[0] + state, self.before[1] + 1]
        else:
            self.before = [state, torch.ones((), device=state.device)]


def add_atoms(model: nn.Module, atoms: Atoms) -> None:
    """Make the bank a part of the model, whose forward a summary begins and ends with."""
    model.add_module(NAME, atoms)
    model.register_forward_pre_hook(_begin)
    model.register_forward_hook(_end, always_call=True)


def _begin(model: nn.Module, args: tuple[Any, ...]) -> None:
    _set(model, True)


def _end(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    _set(model, False)


def _set(model: nn.Module, is_in_forward: bool) -> None:
    atoms: Any = model.get_submodule(NAME)  # of the module that is called, which may be a copy
    atoms.is_in_forward, atoms.before = is_in_forward, []
