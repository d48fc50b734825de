"""In the style of DiffoRA (Jiang et al., 2025, arXiv 2502.08905): which modules get a LoRA, by trained gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from harness.method import RANK, Adaptation, Backbone, Step, Trace, TrainData
from harness.optimizer import adamw
from methods.shared.bilevel_lora import UPPER_LOSS, VALUES, BilevelLora, with_values
from methods.shared.peft_model import lora_model
from methods.shared.peft_names import ADAPTER
from methods.shared.searched_lora import SearchedLora

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from harness.spec import TrainSpec

KEEP = 0.5  # ours: the share of the modules that is kept where none is given


class Diffora(BilevelLora):
    """In the style of DiffoRA (Jiang et al., 2025): a gate on the LoRA of each module; the modules of the largest stay.

    A binary matrix that says which modules get a LoRA, made by continuous relaxation and discretised, and the two
    levels of its training, are the source's. Everything else is ours: the search trains W + g (alpha / rank) B A with
    one gate g = sigmoid(a) for each module, a = 0 at first, for `search_fraction` of the budget. Then the share `keep`
    of the modules with the largest gates, or `components` / rank of them, gets a LoRA with g = 1, and the others none.
    It trains on all rows, with a new optimizer and learning-rate schedule.

    gates: "upper" trains a on the rows of an upper level, by the hypergradient of `methods.shared.unrolled`; "joint"
    trains it with everything else, by the gradient of each update's own batch.
    """

    provenance = "reimplementation: the source leaves open the relaxation, the steps of both levels, and what is shared"
    group = "modules chosen"
    traces: ClassVar[tuple[Trace, ...]] = (RANK, UPPER_LOSS, Trace("gates", "gate of each module", drawing="heat_map"))

    components: int | None = Field(
        None, ge=1, description="components in the end, over all layers: a multiple of rank; or give keep"
    )
    keep: float | None = Field(
        None, gt=0, le=1, description=f"share of the modules that stay; {KEEP} where neither is given"
    )
    search_fraction: float = Field(0.5, gt=0, lt=1, description="share of the budget that the search takes")
    gates: Literal["upper", "joint"] = Field(
        "upper", description="gates are trained on rows of their own, or with everything else"
    )
    weights: Literal["anew", "kept"] = Field(
        "anew", description="what the modules that stay begin with: their initial values, or those of the search"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Diffora:
        if self.components is not None:
            given = f"components = {self.components}"
            if self.keep is not None:
                raise ValueError(f"{given} and keep = {self.keep:g} are both set; give one of them")
            if self.components % self.rank:
                raise ValueError(f"{given} should be a multiple of rank = {self.rank}: whole modules stay")
        if self.gates == "joint":
            for name, value in self.changed("held_out", "upper_every", "unrolled_step").items():
                raise ValueError(f"{name} = {value:g} is for gates = upper, not for joint")
        return self

    def first_value(self) -> float:
        """See `BilevelLora.first_value`."""
        return 0.0

    def component_weights(self, values: Tensor) -> Tensor:
        """See `BilevelLora.component_weights`: of all components one gate. values: (1,)."""
        return values.sigmoid()

    @property
    def batches_a_round(self) -> int:
        """See `BilevelLora.batches_a_round`."""
        return 1 if self.gates == "joint" else super().batches_a_round

    def num_kept(self, num_modules: int) -> int:
        """Modules that stay, at least 1."""
        if self.components is not None:
            return self.components // self.rank
        return max(1, round((self.keep or KEEP) * num_modules))

    def kept(self, values: Sequence[float]) -> list[int]:
        """The rank of each module by its gate's value: `rank` for the largest, the first of equals, and 0."""
        order = sorted(range(len(values)), key=lambda place: -values[place])[: self.num_kept(len(values))]
        return [self.rank if place in order else 0 for place in range(len(values))]

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`."""
        budget, modules = train.budget(num_examples), len(backbone.targets(self.target_modules))
        end, kept = self.end_of("search_fraction", budget), self.num_kept(modules)
        joint = f"gates are trained with everything else, in the first {end} of {budget} batches"
        first = joint if self.gates == "joint" else self.told(end, train, num_examples)
        return [first, f"then a LoRA in {kept} of {modules} modules, {self.rank * kept} components, trains to the end"]

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        targets = backbone.targets(self.target_modules)
        model = lora_model(backbone, dict.fromkeys(targets, self.rank), self.alpha / self.rank, self.dropout)
        with_values(model, self.first_value(), of_layers=True)
        optimizer = adamw(model, self.learning_rate, self.weight_decay)
        return DifforaAdaptation(self, model, optimizer, backbone, targets, data)


class DifforaAdaptation(SearchedLora):
    """One run: the search with gates, then a LoRA in the modules that stay."""

    method: Diffora

    def __init__(self, method: Diffora, *args: Any) -> None:
        super().__init__(method, *args)
        self.joint: list[Tensor] = []  # the gates' gradients on the batch of the update, until their own step
        if method.gates == "joint":
            self.stream = "all"

    def found_ranks(self) -> list[int]:
        """See `SearchedLora.found_ranks`."""
        import torch

        return self.method.kept(torch.cat([*self.values()]).tolist())

    def before_step(self, step: Step) -> None:
        """See `SearchedLora.before_step`. Of a joint training the gates' gradients are put aside for the same Adam."""
        from methods.shared.optimizer_state import gradient_of

        if self.searching and self.method.gates == "joint":
            self.joint = [gradient_of(value) for value in self.values()]
        super().before_step(step)

    def search_step(self, step: Step, end: int) -> dict[str, Any]:
        """See `SearchedLora.search_step`. The history of a step of the gates has them."""
        import torch

        if self.method.gates == "upper":
            history = super().search_step(step, end)
            if not history:
                return {}
        else:
            history = {}
            for value, gradient in zip(self.values(), self.joint, strict=True):
                value.grad = gradient
            self.upper.step()
            self.upper.zero_grad(set_to_none=True)
            self.joint = []
        return history | {"gates": torch.cat(self.component_weights()).detach()}

    def begin_with(self) -> None:
        """See `SearchedLora.begin_with`; values that are kept have the gates in B."""
        if self.method.weights == "anew":
            super().begin_with()
            return
        for layer in self.layers.values():
            layer.lora_B[ADAPTER].weight.mul_(self.method.component_weights(getattr(layer, VALUES)))
