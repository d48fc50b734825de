"""AutoLoRA (Zhang et al., NAACL 2024, arXiv 2403.09113): ranks by meta learning, then LoRA at these ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from harness.method import RANK, Adaptation, Backbone, Step, Trace, TrainData
from harness.optimizer import adamw
from methods.shared.bilevel_lora import UPPER_LOSS, BilevelLora, with_values
from methods.shared.peft_model import lora_model
from methods.shared.searched_lora import SearchedLora

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from harness.spec import TrainSpec


class AutoLora(BilevelLora):
    """AutoLoRA (Zhang et al., 2024): weights of a LoRA's components learnt on held-out rows, then LoRA at these ranks.

    The search trains W + (alpha / rank) B diag(softmax(a)) A in two levels: B, A and the head on a part of the rows, a
    on the share `held_out` of them. It takes `search_fraction` of the budget. A component stays whose normalised weight
    is at least 1 / rank, which one of every layer is; with `components` the largest of all layers stay instead (ours).
    Then a plain LoRA of these ranks is trained on all rows, from the start: initial values, optimizer and learning-rate
    schedule begin anew.

    rule: "softmax" asks whether softmax(a) is at least 1 / rank, as the authors' search on BioNLP does, "sum" whether
    a / sum(a) is, as the one on GLUE does, where a begins with 1.
    """

    provenance = "from the authors' code; the share of the search and a new batch for the difference are ours"
    traces: ClassVar[tuple[Trace, ...]] = (
        RANK,
        UPPER_LOSS,
        Trace("found", "components that the rule would keep", drawing="heat_map"),
    )

    search_fraction: float = Field(0.5, gt=0, lt=1, description="share of the budget that the search takes")
    rule: Literal["softmax", "sum"] = Field(
        "softmax", description="what is compared with 1 / rank: softmax(a), or a over its sum"
    )

    def first_value(self) -> float:
        """See `BilevelLora.first_value`."""
        return 0.0 if self.rule == "softmax" else 1.0

    def component_weights(self, values: Tensor) -> Tensor:
        """See `BilevelLora.component_weights`: the softmax, whatever the rule."""
        return values.softmax(0)

    def above_mean(self, values: Tensor) -> Tensor:
        """(rank,) float64: of each component the normalised weight over 1 / rank, less 1; at least 0 where it stays.

        Equal values give exactly 0. a over its sum is at least 1 / rank where a is at least its mean, also where a sum
        below 0 would turn the rule round."""
        own = values.detach().double()
        if self.rule == "softmax":
            own = (own - own.max()).exp()
        differences = own - own.max()
        above = differences - differences.mean()
        return above / own.mean().abs().clamp(min=1e-12)

    def kept(self, values: Sequence[Tensor]) -> list[int]:
        """The rank of each layer by its values."""
        import torch

        above = [self.above_mean(own) for own in values]
        if self.components is None:
            return [int((own >= 0).sum()) for own in above]
        order = torch.cat(above).argsort(descending=True, stable=True)[: self.components]
        return torch.bincount(order // self.rank, minlength=len(values)).tolist()

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`."""
        budget, layers = train.budget(num_examples), len(backbone.targets(self.target_modules))
        end = self.end_of("search_fraction", budget)
        kept = f"{self.components}" if self.components else f"{layers} to {self.rank * layers}"
        return [
            self.told(end, train, num_examples),
            f"then a LoRA with {kept} of {self.rank * layers} components begins anew, for {budget - end} batches",
        ]

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        targets = backbone.targets(self.target_modules)
        model = lora_model(backbone, dict.fromkeys(targets, self.rank), self.alpha / self.rank, self.dropout)
        with_values(model, self.first_value())
        optimizer = adamw(model, self.learning_rate, self.weight_decay)
        return AutoLoraAdaptation(self, model, optimizer, backbone, targets, data)


class AutoLoraAdaptation(SearchedLora):
    """One run: the search, then a LoRA."""

    method: AutoLora

    def found_ranks(self) -> list[int]:
        """See `SearchedLora.found_ranks`."""
        return self.method.kept(self.values())

    def search_step(self, step: Step, end: int) -> dict[str, Any]:
        """See `SearchedLora.search_step`. The history of a step of the upper level has its loss and what the rule would
        keep of each layer."""
        history = super().search_step(step, end)
        return history | {"found": self.found_ranks()} if history else history
