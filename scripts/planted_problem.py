"""A regression that a change of known rank in some layers of a network solves: what `planted_ranks.py` trains on."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harness.method import Backbone
from harness.run.streams import derived_seed, seed_everything
from harness.task import Batch


class Size(NamedTuple):
    """A problem's size."""

    layers: int
    width: int
    planted: int  # layers that are changed


SMALL, WIDE = Size(6, 16, 3), Size(24, 64, 5)
ROWS = 4096


class Network(nn.Module):
    """h + tanh(W h), layer after layer."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size.width, size.width, bias=False) for _ in range(size.layers))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, width) to (rows, width)."""
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


class Planted:
    """The problem of one seed, with the parts of a task that the loop asks for.

    network: the frozen one, which a method adapts in place. ranks: those of the planted change, by layer.
    noise: standard deviation of the noise on the labels over that of the change of the network's output.
    """

    def __init__(self, seed: int, size: Size = SMALL, noise: float = 0.0) -> None:
        seed_everything(seed)
        self.network, self.other = (Network(size).requires_grad_(False) for _ in range(2))
        self.frozen = torch.stack([layer.weight for layer in self.network.layers])
        self.ranks = [0] * size.layers
        change = torch.zeros_like(self.frozen)
        for position in torch.randperm(size.layers)[: size.planted].tolist():
            rank = self.ranks[position] = int(torch.randint(1, 4, ()))
            left, right = torch.linalg.qr(torch.randn(2, size.width, rank)).Q
            change[position] = left @ right.T
        self.inputs = torch.randn(ROWS, size.width)
        self.targets = self.output(change)
        difference = self.targets - self.output(torch.zeros_like(change))
        self.start = float(difference.square().mean())
        generator = torch.Generator().manual_seed(derived_seed(seed, "noise"))
        self.labels = self.targets + noise * difference.std() * torch.randn(ROWS, size.width, generator=generator)

    def output(self, change: Tensor) -> Tensor:
        """What the frozen network gives for all rows with this change of its weights, (layers, width, width)."""
        for layer, weight in zip(self.other.layers, self.frozen + change, strict=True):
            layer.weight.copy_(weight)
        return self.other(self.inputs)

    def change(self) -> Tensor:
        """What training added to the frozen weights, (layers, width, width), by what each layer now computes: it may
        hold an adapter, or its own weight may be another."""
        identity = torch.eye(self.frozen.shape[-1])
        return torch.stack([layer(identity).T for layer in self.network.layers]) - self.frozen

    def error(self, change: Tensor) -> float:
        """Mean squared error of `output` without noise, in units of the frozen network's."""
        return float((self.output(change) - self.targets).square().mean()) / self.start

    def collate(self, encoded: Any, rows: Any, generator: Any) -> Batch:
        """See `harness.task.Task.collate`."""
        return Batch({"x": self.inputs[list(rows)]}, self.labels[list(rows)])

    def loss(self, model: nn.Module, batch: Batch, generator: Any) -> Tensor:
        """See `harness.task.Task.loss`; in units of the frozen network's without noise."""
        return (model(**batch.inputs) - batch.labels).square().mean() / self.start

    def backbone(self) -> Backbone:
        """The network as a method sees it."""
        return Backbone(self.network, head=(), layers=tuple(f"layers.{at}" for at in range(len(self.ranks))))

    def told(self, value: Any) -> Any:
        """A parameter's value, in which a word says what is known of the problem: "planted", "8/3*num_layers"."""
        found = re.fullmatch(r"(?:(\d+(?:/[1-9]\d*)?)\*)?(planted|planted_layers|num_layers)", str(value))
        if found is None:
            return value
        ranks = self.ranks
        known = {"planted": sum(ranks), "planted_layers": sum(map(bool, ranks)), "num_layers": len(ranks)}
        number = Fraction(found[1] or 1) * known[found[2]]
        return int(number) if number.denominator == 1 else float(number)
