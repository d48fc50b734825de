"""FlyLoRA (Zou et al., NeurIPS 2025, arXiv 2510.08396): a frozen sparse A, of whose outputs a token uses the top k."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from harness.method import Adaptation, Backbone, Step
from methods.shared.routed import NOT_STOCK, RoutedLora, RoutedLoraAdaptation

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from methods.shared.router import Router

BIAS = "load_bias"  # d: a buffer of A's module


class FlyLora(RoutedLora):
    """FlyLoRA (Zou et al., 2025): a frozen sparse A; a token uses its top k outputs, so no stock LoRA if k < rank.

    The update of a token x is (alpha / rank) B (y o m) with y = A x. m is 1 at the k largest scores, which `selection`
    makes of y and d. Every row of A, of r, has floor(n k / r) of its n entries drawn from N(0, 1 / r^2), the others 0;
    A never trains. After an update, d + balance_step * sign(mean count - count) takes the place of d, where a
    component's count is that of the batch's tokens that have chosen it, padding left out. B alone trains.

    The authors' fork of PEFT chooses by y + d, their single file by |y + d|. The paper says by magnitude. |y + d| grows
    with |d| whatever its sign, so that d balances nothing there; |y| + d is ours.

    With top_k = rank nothing is chosen: a LoRA with a frozen A, as LoRA-FA (Zhang et al., 2023), exported as one.
    """

    loaders = {"flylora.json": "methods.flylora.load"}
    provenance = "from the authors' code; that d is added to magnitudes, and that padding does not count, is ours"
    name: ClassVar[str] = "flylora"
    frozen: ClassVar[bool] = True

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    rank: int = Field(
        32, ge=1, description="components of every layer, at most its smaller side", json_schema_extra={"peft": "r"}
    )
    selection: Literal["magnitude", "value", "shifted"] = Field(
        "magnitude", description="what components are chosen by: |y| + d (ours), y + d (the fork) or |y + d| (the file)"
    )
    balance_step: float = Field(
        1e-3, ge=0, description="u: how far an update moves d, which evens out how often components are chosen"
    )
    alpha: float = Field(
        64.0,
        gt=0,
        description="the update is scaled by alpha / rank, with components too",
        json_schema_extra={"peft": "lora_alpha"},
    )

    @property
    def scale(self) -> float:
        """See `RoutedLora.scale`."""
        return self.alpha / self.rank

    @classmethod
    def details(cls) -> list[str]:
        """See `Method.details`."""
        return [f"\nWith top_k below rank: {NOT_STOCK}. `methods.flylora.load` reads its export."]

    def is_routed(self, ranks: Mapping[str, int]) -> bool:
        """See `RoutedLora.is_routed`."""
        return any(self.chosen(rank) < rank for rank in ranks.values())

    def route(self, router: Router, activations: Tensor) -> tuple[Tensor, Tensor]:
        """See `RoutedLora.route`. The choice has no gradient; what is chosen has its own, to the layer's input."""
        from methods.shared.router import top_k

        y, d = activations.detach(), router.get_buffer(BIAS)
        scores = y.abs() + d if self.selection == "magnitude" else y + d
        if self.selection == "shifted":
            scores = scores.abs()
        chosen = top_k(scores, self.chosen(scores.shape[-1]))
        return activations * chosen, chosen

    def adapted(
        self, backbone: Backbone, ranks: Mapping[str, int], rng: torch.Generator
    ) -> tuple[nn.Module, dict[str, Router]]:
        """See `RoutedLora.adapted`. A is drawn from `rng`; d = 0."""
        model, routers = super().adapted(backbone, ranks, rng)
        for router in routers.values():
            rank, inputs = router.weight.shape
            router.register_buffer(BIAS, router.weight.new_zeros(rank))
            if not router.weight.is_meta:
                router.weight.copy_(sparse_projection(rank, inputs, inputs * self.chosen(rank) // rank, rng))
        return model, routers

    def adaptation(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, backbone: Backbone, routers: dict[str, Router]
    ) -> Adaptation:
        """See `RoutedLora.adaptation`."""
        return FlyLoraAdaptation(self, model, optimizer, backbone, routers)


class FlyLoraAdaptation(RoutedLoraAdaptation):
    """One run."""

    method: FlyLora

    def is_counted(self, step: Step) -> bool:
        """See `RoutedLoraAdaptation.is_counted`: d needs it."""
        return self.method.balance_step > 0 or super().is_counted(step)

    def after_step(self, step: Step) -> dict[str, Any]:
        """See `RoutedLoraAdaptation.after_step`. d follows the counts of the update's batch, all its micro batches."""
        for name, count in self.counts.items():
            bias = self.routers[name].get_buffer(BIAS)
            bias += self.method.balance_step * (count.to(bias.dtype).mean() - count).sign()
        return super().after_step(step)


def sparse_projection(rank: int, inputs: int, entries: int, rng: torch.Generator) -> Tensor:
    """A, (rank, inputs): so many entries of a row, at places of chance, are drawn from N(0, 1 / rank^2); others 0."""
    import torch

    places = torch.rand(rank, inputs, generator=rng).argsort(1)[:, :entries]
    return torch.zeros(rank, inputs).scatter(1, places, torch.randn(rank, entries, generator=rng) / rank)


def load(module: nn.Module, path: Path) -> nn.Module:
    """What was exported into `path`, on `module`: see `methods.shared.routed.load`. A stock LoRA is PEFT's to load."""
    from methods.shared import routed

    return routed.load(FlyLora, module, path)
