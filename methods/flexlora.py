"""FlexLoRA (Liu et al., ICLR 2026, arXiv 2601.22905): components exchanged between layers by entropy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from harness.method import Adaptation, Backbone, Trace, TrainData
from methods.shared.exchange import ExchangeAdaptation, ExchangeLora, Offer
from methods.shared.peft_names import ADAPTER

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from harness.spec import TrainSpec


class FlexLora(ExchangeLora):
    """FlexLoRA (Liu et al., 2026): LoRA whose layers exchange components by the entropy of their singular values.

    Updates are P diag(E) Q. With s = E^2 / sum(E^2) a layer's entropy is -sum(s log s) / log(r): 1 where all of its
    components are used alike, near 0 where few of them are. It needs no gradients. Every `interval`, the `exchanged`
    layers of lowest entropy lose their component of smallest |E|, unless it is their last, and as many of highest
    entropy gain a new one: E = 0, with random directions.
    """

    provenance = (
        "from the authors' code; entropy at rank 1, choice by magnitude, kept moments and small new vectors are ours"
    )
    traces: ClassVar[tuple[Trace, ...]] = (
        *ExchangeLora.traces,
        Trace("entropy", "entropy of the singular values", drawing="heat_map"),
    )

    decay: Literal["none", "late", "early"] = Field(
        "late",
        description="exchanged components over the phase, of which p is over: none: b; late: b (1 - p^3), as in the "
        "code; early: b (1 - p)^3, as in the paper",
    )
    new_std: float = Field(
        0.02, gt=0, description="standard deviation of a new component's directions: that of the start; the code has 1"
    )

    @property
    def falling(self) -> Literal["none", "late", "early"]:
        """See `ExchangeLora.falling`."""
        return self.decay

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        return FlexLoraAdaptation(self, backbone)


class FlexLoraAdaptation(ExchangeAdaptation):
    """One run."""

    method: FlexLora

    def worth(self, layer: Any) -> Tensor:
        """See `ExchangeAdaptation.worth`: |E|."""
        found: Tensor = layer.lora_E[ADAPTER].detach()[:, 0].abs()
        return found

    def offers(self) -> tuple[list[Offer], dict[str, list[float]]]:
        """See `ExchangeAdaptation.offers`: of each layer the smallest component, with the layer's entropy."""
        sizes = [self.worth(layer) for layer in self.layers.values()]
        entropies = [spectral_entropy(own) for own in sizes]
        found = [
            Offer(layer, int(own.argmin()), entropies[layer], may_leave=len(own) > 1) for layer, own in enumerate(sizes)
        ]
        return found, {"entropy": entropies}

    def directions(self, factor: Tensor, number: int, rng: torch.Generator) -> Tensor:
        """See `ExchangeAdaptation.directions`: normal numbers."""
        import torch

        return self.method.new_std * torch.randn(number, factor.shape[1], generator=rng)


def spectral_entropy(sizes: Tensor) -> float:
    """-sum(s log s) / log(r) with s = sizes^2 / sum(sizes^2), from 0 to 1, of r sizes >= 0.

    0 for a single component, for which it is 0 / 0, and where all sizes are 0: a layer that has learned nothing.
    """
    import torch

    squares = sizes.double().square()
    total = squares.sum()
    if len(sizes) == 1 or total == 0:
        return 0.0
    shares = squares / total
    return float(-torch.xlogy(shares, shares).sum()) / math.log(len(sizes))
