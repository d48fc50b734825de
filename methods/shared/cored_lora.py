"""A LoRA with a small core C between its factors, B C A, that grows while it trains.

It has a penalty that keeps the factors near orthogonal, and is exported as a stock LoRA with the factor C A.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from harness.method import Backbone, Step
from methods.shared.growing_lora import GrowingLora, shared_out
from methods.shared.lora_adaptation import LoraAdaptation
from methods.shared.peft_model import lora_model
from methods.shared.peft_names import ADAPTER, PREFIX
from methods.shared.svd_lora import distance_from_orthogonal

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

DEVIATION = 0.02  # of the entries that A and B start with, in both papers' code


def cored_model(
    method: GrowingLora,
    backbone: Backbone,
    ranks: Mapping[str, int],
    cores: Mapping[str, list[float]],
    rng: torch.Generator,
) -> nn.Module:
    """The backbone with PEFT's LoRA at these ranks, its factors drawn and its cores' entries put in."""
    import torch
    from torch import nn

    model = lora_model(backbone, dict(ranks), 1.0, method.dropout)
    for name in ranks:
        layer: Any = model.get_submodule(PREFIX + name)
        for factor in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
            factor.weight.data.copy_(drawn(factor.weight.shape, rng))
        down = layer.lora_A[ADAPTER]
        entries = torch.tensor(cores[name], dtype=down.weight.dtype, device=down.weight.device)
        down.register_parameter("core", nn.Parameter(entries))
    return model


def drawn(shape: Sequence[int], rng: torch.Generator) -> Tensor:
    """Entries of a new factor."""
    import torch

    return DEVIATION * torch.randn(*shape, generator=rng)


class GrowingLoraAdaptation(LoraAdaptation, ABC):
    """One run. A layer's update is scale x B C A, and its core C (r, r) is made from a vector of entries that train.

    live: the rank of each layer. most: the largest that it may have. A new component's entries are drawn in A and B,
    and those in the core leave the function as it is.

    young: the entries that came later, on which AdamW makes the steps of a parameter of their own.
    """

    written_by_peft = False

    def __init__(
        self,
        method: GrowingLora,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        backbone: Backbone,
        targets: tuple[str, ...],
        most: Mapping[str, int],
    ) -> None:
        from methods.shared.young_entries import YoungEntries

        self.method = method
        self.most = most
        self.live = dict.fromkeys(targets, method.init_rank)
        super().__init__(model, optimizer, backbone, targets)
        dims = {part: dim for parts in map(self.parts, targets) for part, dim in zip(parts, (1, 0, 0), strict=True)}
        self.young = YoungEntries(optimizer, dims)
        for name, layer in self.layers.items():
            layer.lora_A[ADAPTER].register_forward_hook(self._through_core(name))
        self._rescale()

    @abstractmethod
    def core(self, name: str) -> Tensor:
        """C of a layer, (r, r), with its graph."""

    @abstractmethod
    def unit_entries(self, name: str) -> Tensor:
        """The entries of which C is the identity."""

    @abstractmethod
    def scores(self) -> Tensor:
        """What the layers are chosen by in a round, the largest first; asked for once in each. (layers,)"""

    @abstractmethod
    def grow(self, name: str, gain: int, last: bool, step: Step) -> None:
        """Give a layer `gain` more components, at least 1. last: no round follows."""

    def parts(self, name: str) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """(B, A, entries of the core) of a layer."""
        layer = self.layers[name]
        down = layer.lora_A[ADAPTER]
        return layer.lora_B[ADAPTER].weight, down.weight, down.core

    def extend(self, name: str, number: int, entries: Tensor, step: Step) -> None:
        """Append `number` drawn components to a layer's factors, and these entries to its core."""
        from methods.shared.optimizer_state import append

        B, A, core = self.parts(name)
        append(A, drawn((number, *A.shape[1:]), step.rng).to(A), 0, self.optimizer)
        append(B, drawn((len(B), number, *B.shape[2:]), step.rng).to(B), 1, self.optimizer)
        append(core, entries, 0, self.optimizer)
        for part in (B, A, core):
            self.young.resized(part, step.index + 1)

    def missing(self) -> int:
        """Ranks below the target."""
        return self.method.total(len(self.targets)) - sum(self.live.values())

    def penalty(self) -> Tensor | None:
        """See `Adaptation.penalty`: of each layer's whole factors, the mean over the factors."""
        if self.method.orthogonality == 0:
            return None
        factors = [f for B, A, _ in map(self.parts, self.layers) for f in (A.flatten(1), B.flatten(1).T)]
        return self.method.orthogonality * distance_from_orthogonal(factors)

    def before_step(self, step: Step) -> None:
        """See `Adaptation.before_step`."""
        self.young.before_step()

    def after_step(self, step: Step) -> dict[str, Any]:
        """See `Adaptation.after_step`. A round's history has `rank`, of all layers together, `ranks`, and `score`."""
        self.young.after_step(step.index + 1)
        layers, missing = len(self.targets), self.missing()
        total = self.method.given_out(sum(self.live.values()), layers, step.used, step.budget)
        if not total:
            return {}
        scores = self.scores().detach().cpu()
        order = scores.argsort(descending=True, stable=True).tolist()
        room = [self.most[name] - self.live[name] for name in self.targets]
        gains = shared_out(order, room, self.method.each(layers), total)
        for name, gain in zip(self.targets, gains, strict=True):
            if gain:
                self.grow(name, gain, total == missing, step)
                self.live[name] += gain
        self._rescale()
        step.resized()
        ranks = list(self.live.values())
        return {"rank": sum(ranks), "ranks": ranks, "score": scores.tolist()}

    def ranks(self) -> dict[str, int]:
        """See `Adaptation.ranks`."""
        return dict(self.live)

    def scaled_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """See `LoraAdaptation.scaled_pairs`: (scale x B, C A)."""
        pairs = {}
        for name, layer in self.layers.items():
            B, A, _ = self.parts(name)
            down = (self.core(name) @ A.flatten(1)).reshape(A.shape)
            pairs[name] = layer.scaling[ADAPTER] * B.detach(), down.detach()
        return pairs

    def at_rank(self, rank: int) -> AbstractContextManager[None] | None:
        """See `Adaptation.at_rank`: the best approximation of B C A."""
        from methods.shared.truncation import best_approximation, swapped

        values: dict[Tensor, Tensor] = {}
        for name, (_, down) in self.scaled_pairs().items():
            B, A, core = self.parts(name)
            values[B], values[A] = best_approximation(B.detach(), down, rank)
            values[core] = self.unit_entries(name)
        return swapped(values)

    def state_dict(self) -> dict[str, Any]:
        """See `Adaptation.state_dict`."""
        from methods.shared.optimizer_state import shapes

        return super().state_dict() | {"live": self.live, "born": self.young.state(), "shapes": shapes(self.optimizer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Adaptation.load_state_dict`. The layers get the saved shapes first."""
        from methods.shared.optimizer_state import match_shapes

        match_shapes(self.optimizer, state["shapes"])
        self.live = dict(state["live"])
        self.young.load(state["born"])
        self._rescale()
        super().load_state_dict(state)

    def _rescale(self) -> None:
        """Each layer's scale at its rank."""
        for name, layer in self.layers.items():
            layer.scaling[ADAPTER] = self.method.scale_of(self.live[name])

    def _through_core(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        """Hook of A: what it computes goes through the core."""
        from torch.nn import functional

        def multiply(factor: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            core = self.core(name)
            if factor.get_parameter("weight").dim() > 2:
                return functional.conv2d(output, core[:, :, None, None])
            return functional.linear(output, core)

        return multiply
