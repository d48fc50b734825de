"""MoRA of Lu et al. (2025, arXiv 2506.21035): a mixture of rank-one updates, each weighted by its own activation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from harness.parameters import Range, SearchSpace
from methods.shared.routed import NOT_STOCK, RoutedLora

if TYPE_CHECKING:
    from torch import Tensor, nn

    from methods.shared.router import Router


class Mora(RoutedLora):
    """In the style of MoRA (Lu et al., 2025): rank-ones mixed by token, not kongds/MoRA's square matrix; no stock LoRA.

    Every rank-one B_i A_i is an expert that says itself how much a token x concerns it. With s = A x / |A x| and
    w = softmax(s / tau) the update is alpha sum_i m_i w_i B_i (A_i x), where m_i is 1 for the k largest s_i. In
    evaluations, with a threshold, m_i is 0 as well where s_i is below it. The paper collects experts over a sequence of
    tasks; here there is one task, and all of them train.

    Not the method of the same name by Jiang et al. (2024, arXiv 2405.12130, repository kongds/MoRA), whose update is a
    square matrix of high rank. The paper's third version calls its own method MoRAM.
    """

    loaders = {"mora.json": "methods.mora.load"}
    provenance = "reimplementation: the source leaves open start, scale, tau, k, the threshold and what it applies to"
    name: ClassVar[str] = "mora"
    search_space: ClassVar[SearchSpace] = {
        "learning_rate": Range(1e-5, 1e-2, log=True),
        "tau": Range(0.05, 5.0, log=True),
    }

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    tau: float = Field(
        0.5, gt=0, description="temperature of the softmax over s, of length 1: low, and the largest s has it all"
    )
    threshold: float | None = Field(
        None, ge=-1, le=1, description="in evaluations: least s of a component that a token uses; none if unset"
    )
    alpha: float = Field(
        16.0, gt=0, description="what the mixture is multiplied by: LoRA's where all weights are 1 / rank"
    )

    @property
    def scale(self) -> float:
        """See `RoutedLora.scale`: the weights sum to 1, and so are LoRA's 1 / rank on average."""
        return self.alpha

    @classmethod
    def details(cls) -> list[str]:
        """See `Method.details`."""
        return [
            "\nOf the two methods called MoRA this is the mixture of rank-ones, not the square matrix of kongds/MoRA, "
            "which PEFT does not have either.",
            f"Its export: {NOT_STOCK}. `methods.mora.load` reads it.",
        ]

    def route(self, router: Router, activations: Tensor) -> tuple[Tensor, Tensor]:
        """See `RoutedLora.route`. A token with A x = 0 has s = 0."""
        from torch.nn import functional

        from methods.shared.router import top_k

        s = functional.normalize(activations, dim=-1)
        chosen = top_k(s.detach(), self.chosen(s.shape[-1]))
        if self.threshold is not None and not router.training:
            chosen = chosen & (s.detach() >= self.threshold)
        return (s / self.tau).softmax(-1) * chosen * activations, chosen


def load(module: nn.Module, path: Path) -> nn.Module:
    """What was exported into `path`, on `module`: see `methods.shared.routed.load`."""
    from methods.shared import routed

    return routed.load(Mora, module, path)
