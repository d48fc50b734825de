"""ElaLoRA (Chang et al., 2025, arXiv 2504.00254): components exchanged between layers by their importance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from harness.method import Adaptation, Backbone, Trace, TrainData
from methods.shared.exchange import ExchangeAdaptation, ExchangeLora, Offer
from methods.shared.peft_names import ADAPTER
from methods.shared.svd_lora import FACTORS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from harness.spec import TrainSpec


class ElaLora(ExchangeLora):
    """ElaLoRA (Chang et al., 2025): LoRA whose layers exchange components by importance, the total being constant.

    Updates are P diag(E) Q. A component's importance is AdaLoRA's (Zhang et al., 2023, section 3.2): of every number w
    with gradient g the smoothed |w g| times the smoothed distance of |w g| from that, for its E, and on average over
    its column of P and its row of Q. Every `interval`, each layer offers its `offered` least important components. Of
    all that are offered, the `exchanged` least important are removed, and the owners of the most important gain a new
    one each: E = 0, and directions of length 1 that are orthogonal to those that the layer has.
    """

    provenance = "from the authors' code; exact orthogonality, and growth of layers at rank 1, are ours"
    traces: ClassVar[tuple[Trace, ...]] = (
        *ExchangeLora.traces,
        Trace("importance", "mean importance of a component", drawing="heat_map"),
    )

    offered: int = Field(2, ge=1, description="k: components that each layer offers, its least important ones")
    decay: Literal["none", "late"] = Field(
        "none", description="exchanged components over the phase, of which p is over: none: b; late: b (1 - p^3)"
    )
    beta1: float = Field(0.85, gt=0, lt=1, description="smoothing of the sensitivity")
    beta2: float = Field(0.85, gt=0, lt=1, description="smoothing of the uncertainty")

    @property
    def falling(self) -> Literal["none", "late", "early"]:
        """See `ExchangeLora.falling`."""
        return self.decay

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        return ElaLoraAdaptation(self, backbone)


class ElaLoraAdaptation(ExchangeAdaptation):
    """One run.

    The averages behind the importance stand in the optimizer's state beside the moments, so that they are cut, extended
    by 0 and saved with them.
    """

    method: ElaLora

    def observe(self) -> None:
        """See `ExchangeAdaptation.observe`: an update adds to the averages, as in AdaLoRA: the weights after the
        optimizer's step, with the gradients before it."""
        import torch

        for layer in self.layers.values():
            for name, _ in FACTORS:
                weight = getattr(layer, name)[ADAPTER]
                if weight.grad is None:
                    continue
                state, product = self.optimizer.state[weight], (weight.detach() * weight.grad).abs_()
                for average in ("sensitivity", "uncertainty"):
                    state.setdefault(average, torch.zeros_like(product))
                state["sensitivity"].lerp_(product, 1 - self.method.beta1)
                state["uncertainty"].lerp_((product - state["sensitivity"]).abs_(), 1 - self.method.beta2)

    def worth(self, layer: Any) -> Tensor:
        """See `ExchangeAdaptation.worth`: the importance; 0 where no gradient came."""
        found = layer.lora_E[ADAPTER].detach()[:, 0] * 0
        for name, dim in FACTORS:
            state = self.optimizer.state.get(getattr(layer, name)[ADAPTER], {})
            if "sensitivity" in state:
                found = found + (state["sensitivity"] * state["uncertainty"]).mean(1 - dim)
        return found

    def offers(self) -> tuple[list[Offer], dict[str, list[float]]]:
        """See `ExchangeAdaptation.offers`. A layer of one component offers that one too: it may gain by it."""
        worths = [self.worth(layer).tolist() for layer in self.layers.values()]
        found = []
        for layer, values in enumerate(worths):
            lowest = sorted(range(len(values)), key=lambda place: values[place])[: self.method.offered]
            found += [
                Offer(layer, place, values[place], number < len(values) - 1) for number, place in enumerate(lowest)
            ]
        return found, {"importance": [sum(values) / len(values) for values in worths]}

    def directions(self, factor: Tensor, number: int, rng: torch.Generator) -> Tensor:
        """See `ExchangeAdaptation.directions`: of random ones what is orthogonal to the rows of the factor, and to one
        another, with length 1."""
        import torch

        drawn = torch.randn(number, factor.shape[1], generator=rng, dtype=torch.float64).to(factor.device)
        return torch.linalg.qr(torch.cat([factor.double(), drawn]).T).Q.T[len(factor) :]
