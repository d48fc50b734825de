"""SoRA (Ding et al., EMNLP 2023, arXiv 2311.11696): gates between a LoRA's factors, made sparse by a soft threshold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from harness.errors import InputError
from harness.method import Adaptation, Backbone
from methods.shared.gated_lora import ThresholdedLora, ThresholdedLoraAdaptation
from methods.shared.shares import least_budget

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Sora(ThresholdedLora):
    """SoRA (Ding et al., 2023): B diag(g) A, and g goes through a soft threshold after every step of AdamW.

    The gates start as draws from N(0, 1). After a step each becomes sign(g) max(|g| - threshold, 0), the proximal step
    of an L1 term. A gate at 0 keeps its gradient, and comes back where a step takes it further than the threshold. The
    threshold is not multiplied by the learning rate, as in the authors' code: so it reaches further in a longer run.

    "constant" has the threshold from the first update on. "linear" trains without one for `dense` of the budget, and
    then raises it in stages of equal length to its full value.

    Ours is `components`: the number of live ones falls along the same stages to at most that.
    """

    provenance = "from the authors' code; the threshold is the paper's, and the budget in components ours"

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    alpha: float = Field(
        16.0, gt=0, description="the update is scaled by alpha / rank", json_schema_extra={"peft": "lora_alpha"}
    )
    threshold: float = Field(3e-4, ge=0, description="soft threshold of the gates after an update, in the end")
    schedule: Literal["constant", "linear"] = Field(
        "constant", description="the threshold from the first update on, or from 0 in stages"
    )
    dense: float = Field(
        0.36, ge=0, lt=1, description="share of the budget before the first stage, of linear or components"
    )
    values: int = Field(
        7, ge=2, description="of linear or components: thresholds or numbers, those of the start included"
    )
    penalty: float = Field(0.0, ge=0, description="weight of the mean of |g| over all gates in the training loss")

    @model_validator(mode="after")
    def _fits_together(self) -> Sora:
        if self.penalty and not self.gate_ratio:
            raise ValueError(f"penalty = {self.penalty:g} is for gates that train, and gate_ratio = 0 stops them")
        if not self._staged:
            for name, value in self.changed("dense", "values").items():
                raise ValueError(f"{name} = {value:g} is for schedule = linear or components, and neither is given")
        return self

    @property
    def scale(self) -> float:
        """See `GatedLora.scale`."""
        return self.alpha / self.rank

    @property
    def _staged(self) -> bool:
        return self.schedule == "linear" or self.components is not None

    def stage(self, used: int, budget: int) -> float:
        """See `ThresholdedLora.stage`: 0 for `dense` of the budget, then `values` - 1 stages."""
        dense, last = round(self.dense * budget), self.values - 1
        return 0.0 if used <= dense else (1 + (used - dense - 1) * last // (budget - dense)) / last

    def threshold_at(self, used: int, budget: int) -> float:
        """See `ThresholdedLora.threshold_at`."""
        return self.threshold if self.schedule == "constant" else self.threshold * self.stage(used, budget)

    def misfit(self, budget: int) -> InputError | None:
        """See `ThresholdedLora.misfit`."""

        def fits(batches: int) -> bool:
            return batches - round(self.dense * batches) >= self.values - 1

        if not self._staged or fits(budget):
            return None
        given = f"values = {self.values} after dense = {self.dense:g} of the budget"
        needed = f"it takes at least {least_budget(fits)}"
        return InputError(f"{given} does not fit into {budget} batches: {needed}", "values")

    def adaptation(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, backbone: Backbone, targets: tuple[str, ...]
    ) -> Adaptation:
        """See `ThresholdedLora.adaptation`."""
        return SoraAdaptation(self, model, optimizer, backbone, targets)


class SoraAdaptation(ThresholdedLoraAdaptation):
    """One run, with the penalty of the authors' code."""

    method: Sora

    def penalty(self) -> Tensor | None:
        """See `Adaptation.penalty`."""
        import torch

        if self.method.penalty == 0:
            return None
        return self.method.penalty * torch.cat(list(self.gates().values())).abs().mean()
