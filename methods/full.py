"""Full fine-tuning: every number of the backbone trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from harness.method import Adaptation, Backbone, Method, TrainData
from harness.optimizer import adamw
from harness.parameters import Range

if TYPE_CHECKING:
    import torch

    from harness.spec import TrainSpec


class Full(Method):
    """Full fine-tuning: every number of the backbone trains."""

    version = 2
    provenance = "common practice"
    group = "whole model"
    capabilities = ("any layer",)
    search_space = {"learning_rate": Range(1e-6, 1e-3, log=True)}

    learning_rate: float = Field(5e-5, gt=0, description="peak learning rate")

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        backbone.module.requires_grad_(True)
        optimizer = adamw(backbone.module, self.learning_rate, self.weight_decay)
        return Adaptation(backbone.module, optimizer, backbone)
