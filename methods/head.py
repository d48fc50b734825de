"""Training the head alone: the floor that every adapter must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from harness.method import EVERY_DTYPE, Adaptation, Backbone, Method, TrainData
from harness.optimizer import adamw
from harness.parameters import Range

if TYPE_CHECKING:
    import torch

    from harness.spec import TrainSpec


class Head(Method):
    """The task's head alone on a frozen backbone: the floor (0 adapter parameters)."""

    version = 2
    provenance = "common practice"
    group = "controls"
    own_format = True
    capabilities = ("any layer",)
    backbone_dtypes = EVERY_DTYPE
    search_space = {"learning_rate": Range(1e-4, 1e-1, log=True)}

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        return None if backbone.head else "the backbone has no head to train"

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        backbone.freeze()
        optimizer = adamw(backbone.module, self.learning_rate, self.weight_decay)
        return Adaptation(backbone.module, optimizer, backbone)
