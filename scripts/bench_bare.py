"""The methods' updates written out by hand: what scripts/bench_methods.py holds ours against.

An update is the model's own forward with its own loss, backward, clipping, AdamW, and PEFT's allocation where the
tuner has one: no hooks, no budget, no history. The model is what a user of PEFT would have. A method that is a LoRA
while it trains has PEFT's LoRA with the ranks, values and scales that it started with.

MatryoshkaLoRA and DyLoRA are in no library. Their bare side is PEFT's LoRA layers with the definition's own change, as
a user would write it: other modules in the place of A and B, and the rest of the layer PEFT's.

    matryoshka           A x is multiplied by the diagonal p; PEFT's scale is 1
    dylora, not frozen   the first b rows of A and columns of B, at the scale alpha / b
    dylora, frozen       every component is a parameter of its own, and those below b are detached: AdamW does not touch
                         a parameter without a gradient, so that the others stay, with their moments and step counts
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.errors import InputError
from harness.optimizer import adamw
from harness.run.training import Training

ADAPTER = "default"


def bare_updates(
    training: Training, updates: int, draw: Callable[[], None] | None = None, allocates: bool = True
) -> list[float]:
    """The losses of so many updates by hand.

    draw: called before each; as `written_out` gives it. allocates: PEFT's allocation, if the tuner has one, is the
    method's.
    """
    model: Any = training.adaptation.model
    optimizer = training.adaptation.optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    allocate = getattr(getattr(model, "base_model", None), "update_and_allocate", None) if allocates else None
    losses = []
    for _ in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * 1.0
        batch = training.task.collate(training.encoded, training.data.draw(training.adaptation.stream), None)
        if draw is not None:
            draw()
        loss = model(**batch.inputs, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        training.index += 1
        if allocate is not None:
            allocate(training.index)
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def written_out(name: str, training: Training) -> Callable[[], None] | None:
    """Make the method's side a bare one where no library has it. Returns what draws before an update, if anything.

    training: started, without an update yet. Raises InputError for settings that are not written out.
    """
    if name not in ("matryoshka", "dylora"):
        return None
    method: Any = training.adaptation.method  # type: ignore[attr-defined]
    if method.train_ranks is not None or getattr(method, "combine", "sum") != "sum":
        raise InputError("not written out by hand: train_ranks, and combine other than sum")
    if name == "dylora":
        return write_dylora(training)
    write_matryoshka(training)
    return None


class Diagonal(nn.Module):
    """diag(p) A."""

    def __init__(self, factor: nn.Linear, p: Tensor) -> None:
        super().__init__()
        self.weight, self.p = factor.weight, p

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., inputs). Returns (..., rank)."""
        return functional.linear(x, self.weight) * self.p


def write_matryoshka(training: Training) -> None:
    """p_i is the sum of s_q over the train ranks q >= i, the powers of 2 below the rank, and the rank."""
    method: Any = training.adaptation.method  # type: ignore[attr-defined]
    scale: dict[str, Callable[[int], float]] = {
        "none": lambda q: 1.0,
        "rank": lambda q: 1 / q,
        "sqrt": lambda q: 1 / math.sqrt(q),
    }
    ranks = [2**i for i in range(method.rank.bit_length()) if 2**i < method.rank] + [method.rank]
    p = torch.tensor([sum(scale[method.scaling](q) for q in ranks if q >= i) for i in range(1, method.rank + 1)])
    for layer in training.adaptation.layers.values():  # type: ignore[attr-defined]
        layer.scaling[ADAPTER] = 1.0
        layer.lora_A[ADAPTER] = Diagonal(layer.lora_A[ADAPTER], p)


class Drawn:
    """The rank b that an update drew, 1 to the rank."""

    rank = 1


class First(nn.Module):
    """The first b rows of A (dim 0), or columns of B (dim 1)."""

    def __init__(self, factor: nn.Linear, dim: int, drawn: Drawn) -> None:
        super().__init__()
        self.weight, self.dim, self.drawn = factor.weight, dim, drawn

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., inputs) or (..., b). Returns (..., b) or (..., outputs)."""
        return functional.linear(x, self.weight.narrow(self.dim, 0, self.drawn.rank))


class Components(nn.Module):
    """The first b components, of which b alone is trained: each row of A, or column of B, is a parameter."""

    def __init__(self, factor: nn.Linear, dim: int, drawn: Drawn) -> None:
        super().__init__()
        parts = factor.weight.detach().split(1, dim)
        self.parts = [nn.Parameter(part.clone(memory_format=torch.contiguous_format)) for part in parts]
        for number, part in enumerate(self.parts):
            self.register_parameter(str(number), part)
        self.weight, self.dim, self.drawn = parts[0], dim, drawn  # PEFT asks a weight for its dtype

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., inputs) or (..., b). Returns (..., b) or (..., outputs)."""
        *frozen, live = self.parts[: self.drawn.rank]
        return functional.linear(x, torch.cat([*(part.detach() for part in frozen), live], self.dim))


def write_dylora(training: Training) -> Callable[[], None]:
    """Returns the draw, from the update's own generator, so that both sides draw the same ranks."""
    adaptation: Any = training.adaptation
    method, layers, drawn = adaptation.method, list(adaptation.layers.values()), Drawn()
    kind = Components if method.frozen else First
    for layer in layers:
        layer.lora_A[ADAPTER] = kind(layer.lora_A[ADAPTER], 0, drawn)
        layer.lora_B[ADAPTER] = kind(layer.lora_B[ADAPTER], 1, drawn)
    adaptation.optimizer = adamw(adaptation.model, method.learning_rate, method.weight_decay)

    def draw() -> None:
        drawn.rank = 1 + int(torch.randint(method.rank, (), generator=training.rng))
        for layer in layers:
            layer.scaling[ADAPTER] = method.alpha / drawn.rank

    return draw
