"""Train the LayerNorms alone: a method in one file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from harness.method import Adaptation, Backbone, Method, TrainData
from harness.optimizer import adamw

if TYPE_CHECKING:
    import torch

    from harness.spec import TrainSpec


class NormTuning(Method):
    """The backbone's LayerNorms alone."""

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    bias: bool = Field(True, description="train the norms' biases too")

    def unsupported(self, backbone: Backbone) -> str | None:
        """A backbone without LayerNorm becomes a reported cell."""
        return None if self._norms(backbone) else "the backbone has no LayerNorm"

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """Freeze everything but the norms and the head."""
        backbone.module.requires_grad_(False)
        for norm in self._norms(backbone):
            norm.weight.requires_grad_(True)
            norm.bias.requires_grad_(self.bias)
        for _, parameter in backbone.head_parameters():
            parameter.requires_grad_(True)
        optimizer = adamw(backbone.module, self.learning_rate, self.weight_decay)
        return Adaptation(backbone.module, optimizer, backbone)

    def _norms(self, backbone: Backbone) -> list[torch.nn.LayerNorm]:
        from torch.nn import LayerNorm

        return [module for module in backbone.module.modules() if isinstance(module, LayerNorm)]
