"""BitFit (Ben Zaken, Goldberg and Ravfogel, 2022, arXiv 2106.10199): only biases train."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from harness.method import Adaptation, Backbone, Method, TrainData, in_modules
from harness.optimizer import adamw

if TYPE_CHECKING:
    import torch

    from harness.spec import TrainSpec


class BitFit(Method):
    """BitFit (Ben Zaken et al., 2022): every bias vector of the backbone trains, norms' included, and the head."""

    provenance = "from the paper"
    group = "not low-rank"
    own_format = True
    capabilities = ("any layer",)

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        return None if biases(backbone) else "the backbone has no bias"

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        trained = set(biases(backbone)) | {name for name, _ in backbone.head_parameters()}
        for name, parameter in backbone.module.named_parameters():
            parameter.requires_grad_(name in trained)
        return Adaptation(backbone.module, adamw(backbone.module, self.learning_rate, self.weight_decay), backbone)


def biases(backbone: Backbone) -> list[str]:
    """Qualified names of the backbone's bias vectors, the head left out."""
    names = [name for name, parameter in backbone.module.named_parameters() if parameter.dim() == 1]
    return [name for name in names if name.endswith("bias") and not in_modules(name, backbone.head)]
