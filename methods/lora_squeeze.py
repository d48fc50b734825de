"""LoRA-Squeeze (Vulic et al., 2026, arXiv 2602.10993): trained at a high rank, cut to a low one by SVD."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from harness.errors import InputError
from harness.method import RANK, Adaptation, Backbone, PeftForm, Step, Trace, TrainData
from harness.optimizer import adamw
from methods.shared.cut_lora import CutLoraAdaptation, among_largest
from methods.shared.lora_method import LoraMethod
from methods.shared.peft_model import lora_form, lora_model, shared_parameters, unfit_at_rank

if TYPE_CHECKING:
    import torch

    from harness.spec import TrainSpec

SHARE = 4  # ours: a quarter of the source rank is the target where none is given


class LoraSqueeze(LoraMethod):
    """LoRA-Squeeze (Vulic et al., 2026): LoRA at a high rank, cut to a low one by SVD after or during training.

    "post" trains at `rank` and cuts at the end. "continued" cuts after `squeeze_at` of the budget and trains on.
    "in_training" has `stages` of equal length, whose ranks fall geometrically from `rank` to the target.

    A cut brings every layer to the SVD of its update, B A = U S V^T, by QR of both factors and the SVD of the small
    core. What stays are the first `target_rank` components of each layer, the best approximation of that rank (Eckart
    and Young, 1936), or the `components` largest of all layers together. B = U S^1/2 and A = S^1/2 V^T from then on.

    The source leaves open what a cut does to the scale and to the optimizer. Here the scale stays alpha / rank with the
    source rank, so that the function does not jump, and `moments` says what becomes of AdamW's: "mapped" takes them to
    the new factors, first moments exactly, second ones without their correlations; "fresh" begins with none.
    """

    provenance = "reimplementation: the source leaves open scale and optimizer at a cut, and its stages"
    group = "ranks after training"
    capabilities = ("linear", "conv2d", "rank-adaptive")
    traces: ClassVar[tuple[Trace, ...]] = (RANK,)

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    squeeze: Literal["post", "continued", "in_training"] = Field(
        "post", description="cut at the end, once before it and train on, or stage by stage"
    )
    rank: int = Field(
        8,
        ge=1,
        description="source rank: of every adapted layer at the start, at most its smaller side",
        json_schema_extra={"peft": "r"},
    )
    target_rank: int | None = Field(
        None,
        ge=1,
        description="rank of every layer in the end, at most rank; a quarter of it where neither this nor components "
        "is given",
    )
    components: int | None = Field(
        None, ge=1, description="components in the end, over all layers; or give target_rank"
    )
    squeeze_at: float = Field(0.8, gt=0, lt=1, description='"continued": share of the budget before the cut')
    stages: int = Field(3, ge=2, description='"in_training": stages of equal length, the first one at the source rank')
    moments: Literal["mapped", "fresh"] = Field(
        "mapped", description="AdamW's moments at a cut that training goes on after"
    )
    alpha: float = Field(
        16.0,
        gt=0,
        description="the update is scaled by alpha / rank, before and after a cut",
        json_schema_extra={"peft": "lora_alpha"},
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the adapter's input", json_schema_extra={"peft": "lora_dropout"}
    )
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, description="ends of layer names; all if unset")

    @model_validator(mode="after")
    def _fits_together(self) -> LoraSqueeze:
        if self.target_rank is not None and self.components is not None:
            raise ValueError(
                f"target_rank = {self.target_rank} and components = {self.components} are both set; give one of them"
            )
        if self.target_rank is not None and self.target_rank > self.rank:
            raise ValueError(f"target_rank = {self.target_rank} is above rank = {self.rank}: it should be 1 to that")
        owners = {"squeeze_at": ("continued",), "stages": ("in_training",), "moments": ("continued", "in_training")}
        for name, value in self.changed(*owners).items():
            if self.squeeze not in (forms := owners[name]):
                raise ValueError(f"{name} = {value} is for squeeze = {' or '.join(forms)}, not for {self.squeeze}")
        return self

    def peft_form(self, ranks: Mapping[str, int]) -> PeftForm | None:
        """See `Method.peft_form`: LoRA with the components that stayed."""
        return lora_form(ranks, self.alpha / self.rank, shared_parameters(self, self.dropout))

    def sizes(self, num_layers: int) -> list[int]:
        """The size of each stage, falling, the source's first and the target's last: the rank of every layer, or, with
        `components`, those of all `num_layers` layers together."""
        if self.components is not None:
            source, target = self.rank * num_layers, self.components
        else:
            source, target = self.rank, self.target_rank or max(1, self.rank // SHARE)
        last = self.stages - 1 if self.squeeze == "in_training" else 1
        return [round(source * (target / source) ** (stage / last)) for stage in range(last + 1)]

    def cuts(self, num_layers: int, budget: int) -> dict[int, int]:
        """The size of `sizes` to cut to when so many batches are used, for the cuts that training goes on after."""
        _, *smaller = self.sizes(num_layers)
        if self.squeeze == "post":
            return {}
        if self.squeeze == "continued":
            return {math.ceil(self.squeeze_at * budget): smaller[0]}
        return {-(-stage * budget // self.stages): size for stage, size in enumerate(smaller, start=1)}

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        return unfit_at_rank(backbone, self.target_modules, self.rank, self.components)

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`."""
        layers, budget = len(backbone.targets(self.target_modules)), train.budget(num_examples)
        self._check_budget(budget)
        each = 1 if self.components is not None else layers
        first, *smaller = (size * each for size in self.sizes(layers))
        ends = [*self.cuts(layers, budget), budget]
        stages = [f"{size} to batch {end}" for size, end in zip(smaller, ends[1:], strict=False)]
        left = [f"{smaller[-1]} are left then"] if self.squeeze == "post" else []
        return [f"{first} components in {layers} layers to batch {ends[0]} of {budget}, " + ", ".join(stages + left)]

    def _check_budget(self, budget: int) -> None:
        """Raises InputError where a stage has no batch."""
        if self.squeeze == "continued" and math.ceil(self.squeeze_at * budget) >= budget:
            about = max(2, int(1 / (1 - self.squeeze_at)) - 1)
            least = next(each for each in itertools.count(about) if math.ceil(self.squeeze_at * each) < each)
            setting, name = f"squeeze_at = {self.squeeze_at:g}", "squeeze_at"
        elif self.squeeze == "in_training" and self.stages > budget:
            least, setting, name = self.stages, f"stages = {self.stages}", "stages"
        else:
            return
        raise InputError(f"{setting} does not fit into {budget} batches: it takes at least {least}", name)

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        targets = backbone.targets(self.target_modules)
        model = lora_model(backbone, dict.fromkeys(targets, self.rank), self.alpha / self.rank, self.dropout)
        optimizer = adamw(model, self.learning_rate, self.weight_decay)
        return SqueezedAdaptation(self, model, optimizer, backbone, targets)


class SqueezedAdaptation(CutLoraAdaptation):
    """One run: a LoRA that is cut once or more often."""

    method: LoraSqueeze

    def after_step(self, step: Step) -> dict[str, Any]:
        """See `Adaptation.after_step`. The history of an update that cuts has the `rank` of all layers together."""
        size = self.method.cuts(len(self.targets), step.budget).get(step.used)
        return {"rank": sum(self.ranks().values())} if size is not None and self._cut(size) else {}

    def finish(self, step: Step) -> None:
        """See `Adaptation.finish`: to the target, where training has not been at it yet."""
        self._cut(self.method.sizes(len(self.targets))[-1])

    def _cut(self, size: int) -> bool:
        """Cut to one of the method's `sizes`. False, and nothing is touched, where no layer is larger."""
        ranks = list(self.ranks().values())
        together = self.method.components is not None
        if size >= (sum(ranks) if together else max(ranks)):
            return False
        values = [basis.sizes for basis in self.rotate()]
        left = among_largest(values, size) if together else [min(size, rank) for rank in ranks]
        if self.method.moments == "fresh":
            for parameter in itertools.chain.from_iterable(self.pairs()):
                self.optimizer.state.pop(parameter, None)
        self.keep([range(number) for number in left])
        return True
