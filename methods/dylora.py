"""DyLoRA: one LoRA for many ranks, of which every update draws one to train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from harness.method import Adaptation, Backbone, Step, Trace, TrainData
from methods.shared.nested_lora import NestedLora, NestedLoraAdaptation
from methods.shared.peft_names import ADAPTER

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from harness.spec import TrainSpec


class DyLora(NestedLora):
    """DyLoRA (Valipour et al., 2023): every update trains one rank b of a LoRA, drawn for the whole model.

    An update sees W + (alpha / b) B[:, :b] A[:b, :], with b one of 1 to `rank`, or of `train_ranks`, each alike.
    Frozen, as in the authors' script, it trains component b alone: the others do not move at all, neither by Adam's
    momentum nor by weight decay. Not frozen, it trains the first b. Evaluated and exported at rank b is the same map,
    by default with b = `rank`.
    """

    provenance: ClassVar[str] = "from the authors' code; that frozen components do not move is ours"
    traces: ClassVar[tuple[Trace, ...]] = (Trace("drawn_rank", "rank drawn", drawing=None),)

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's decoupled weight decay, on matrices only")
    alpha: float = Field(
        16.0, gt=0, description="the update at rank b is scaled by alpha / b", json_schema_extra={"peft": "lora_alpha"}
    )
    frozen: bool = Field(
        True, description="an update trains only the components above the next lower train rank: component b alone"
    )

    @property
    def nested_ranks(self) -> tuple[int, ...]:
        """See `NestedLora.nested_ranks`."""
        return self.train_ranks or tuple(range(1, self.rank + 1))

    def scale(self, rank: int) -> float:
        """alpha over the rank."""
        return self.alpha / rank

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`."""
        ranks, updates = self.nested_ranks, train.budget(num_examples)
        rarest = "every component" if self.frozen else f"component {self.rank}"
        times = f"{rarest} is trained by about {round(updates / len(ranks))} of them"
        return [f"each of {updates} updates draws one of {len(ranks)} ranks: {times}"] if len(ranks) > 1 else []

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        return DyLoraAdaptation(self, backbone)


class DyLoraAdaptation(NestedLoraAdaptation):
    """One run.

    masks: for each of the method's ranks b, rank / b on the first b components, 0 on the others, (ranks, rank).
    place: of the rank that this update drew, among the method's ranks.
    counts: of each rank, the updates that drew it. Frozen, its components have their own of AdamW's bias correction.
    """

    def __init__(self, method: DyLora, backbone: Backbone) -> None:
        super().__init__(method, backbone)
        self.frozen = method.frozen
        self.ranks_to_draw = method.nested_ranks
        self.masks = self.weights(
            [[method.rank / b if i < b else 0.0 for i in range(method.rank)] for b in self.ranks_to_draw]
        )
        self.place = 0
        self.counts = [0] * len(self.ranks_to_draw)
        self._before: list[tuple[Tensor, int, Tensor]] = []  # tensor, its dimension of components, a copy

    def for_batch(self, step: Step) -> AbstractContextManager[None]:
        """See `Adaptation.for_batch`: the first b components, at their scale."""
        import torch

        self.place = int(torch.randint(len(self.ranks_to_draw), (), generator=step.rng))
        return self.weighted(self.masks[self.place])

    def before_step(self, step: Step) -> None:
        """See `Adaptation.before_step`. Frozen: no gradient beside the live components', and what the step might move
        there is kept."""
        if not self.frozen:
            return
        self._before = []
        for factor, dim in self._factors():
            if factor.grad is not None:
                live = self._live(factor.grad, dim).clone()
                self._live(factor.grad.zero_(), dim).copy_(live)
            state = self.optimizer.state.get(factor, {})
            if state:
                state["step"].fill_(self.counts[self.place])
            moments = [value for value in state.values() if value.shape == factor.shape]
            self._before += [(value, dim, value.clone()) for value in (factor.data, *moments)]

    def after_step(self, step: Step) -> dict[str, Any]:
        """See `Adaptation.after_step`. Frozen: all but the live components is as it was."""
        for value, dim, before in self._before:
            self._live(before, dim).copy_(self._live(value, dim))
            value.copy_(before)
        self._before = []
        self.counts[self.place] += 1
        return {"drawn_rank": self.ranks_to_draw[self.place]}

    def state_dict(self) -> dict[str, Any]:
        """See `Adaptation.state_dict`."""
        return super().state_dict() | {"counts": list(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Adaptation.load_state_dict`."""
        super().load_state_dict(state)
        self.counts = list(state["counts"])

    def _factors(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Every layer's factors, each with its dimension of components."""
        for layer in self.layers.values():
            yield layer.lora_A[ADAPTER].weight, 0
            yield layer.lora_B[ADAPTER].weight, 1

    def _live(self, value: Tensor, dim: int) -> Tensor:
        """The part that a frozen update trains: the components above the next lower rank, up to the one drawn."""
        first = self.ranks_to_draw[self.place - 1] if self.place else 0
        return value.narrow(dim, first, self.ranks_to_draw[self.place] - first)
