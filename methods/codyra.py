"""CoDyRA (Lu et al., 2024, arXiv 2412.01004): Dynamic Rank-Selective LoRA, for one task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from harness.errors import InputError
from harness.method import Adaptation, Backbone
from methods.shared.gated_lora import ThresholdedLora, ThresholdedLoraAdaptation
from methods.shared.shares import least_budget

if TYPE_CHECKING:
    import torch
    from torch import nn


class Codyra(ThresholdedLora):
    """CoDyRA (Lu et al., 2024): B diag(g) A, dense at first, then with a soft threshold of g that rises.

    The gates start as draws from N(0, 1), and the update has no scale. For `dense` of the budget all train. Then, after
    every step of AdamW, each gate becomes sign(g) max(|g| - k, 0), where k rises on a grid of `values` numbers from 0
    to `threshold`. A gate at 0 keeps its gradient and may come back.

    The paper trains one task after another and merges each into the weights. This is one task.

    Ours is `components`: the number of live ones falls along the same grid to at most that.
    """

    provenance = "from the authors' code; the threshold is the paper's, and the budget in components ours"

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    rank: int = Field(
        16,
        ge=1,
        description="rank of every adapted layer at the start, at most its smaller side",
        json_schema_extra={"peft": "r"},
    )
    threshold: float = Field(5e-3, ge=0, description="soft threshold of the gates after an update, in the end")
    dense: float = Field(0.5, ge=0, lt=1, description="share of the budget without a threshold")
    values: int = Field(50, ge=2, description="numbers on the grid of thresholds, 0 and the last one included")
    beta2: float = Field(0.9999, gt=0, lt=1, description="AdamW's decay of the second moments")

    @property
    def scale(self) -> float:
        """See `GatedLora.scale`."""
        return 1.0

    def stage(self, used: int, budget: int) -> float:
        """See `ThresholdedLora.stage`. As in the authors' loop: the next threshold begins where the number of updates
        made before is a multiple of the width and not in the dense share, whose first follower has none."""
        done, dense, width = used - 1, self.dense * budget, self._width(budget)
        if done <= dense:
            return 0.0
        begun = done // width + 1 - int(-(-dense // width))
        return min(begun, self.values - 1) / (self.values - 1)

    def threshold_at(self, used: int, budget: int) -> float:
        """See `ThresholdedLora.threshold_at`."""
        return self.threshold * self.stage(used, budget)

    def misfit(self, budget: int) -> InputError | None:
        """See `ThresholdedLora.misfit`."""
        if self._width(budget) > 0:
            return None
        given = f"values = {self.values} after dense = {self.dense:g} of the budget"
        needed = f"it takes at least {least_budget(lambda batches: self._width(batches) > 0)}"
        return InputError(f"{given} does not fit into {budget} batches: {needed}", "values")

    def _width(self, budget: int) -> int:
        """How many updates a threshold holds."""
        return int((budget - self.dense * budget) // self.values)

    def adaptation(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, backbone: Backbone, targets: tuple[str, ...]
    ) -> Adaptation:
        """See `ThresholdedLora.adaptation`."""
        for group in optimizer.param_groups:
            group["betas"] = (group["betas"][0], self.beta2)
        return ThresholdedLoraAdaptation(self, model, optimizer, backbone, targets)
