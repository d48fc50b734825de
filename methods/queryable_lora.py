"""In the style of Queryable LoRA (Vaidya et al., 2026, arXiv 2605.08423): each token mixes r x r atoms by a query."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from harness.method import Backbone
from methods.shared.routed import NOT_STOCK, RoutedLora

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from harness.spec import TrainSpec
    from methods.shared.router import Router

BANK = "bank"  # the atoms, as a part of every layer's router
CHOSEN = 2  # atoms of a token where nothing else is said


class QueryableLora(RoutedLora):
    """In the style of Queryable LoRA (2026): a query of each token mixes r x r atoms of all layers.

    The update of a token x is scale B C(x) A x. C(x) is a convex combination of the `top_k` of the `atoms` whose keys
    answer the token's query best, with a softmax of their answers for weights. The query is linear in the low-rank
    state A x and in a summary of the layers before: the mean of their C(x) A x for this token. Atoms, keys and query
    are shared by all layers, and train.

    The source says what is combined and what a query sees. Every formula and default beyond that is ours, and
    docs/methods has them side by side. The prior that an instruction puts on the atoms is left out.

    With atoms = 1 there is no choice, and the atom is the identity: a LoRA, exported as one.
    """

    loaders = {"queryable_lora.json": "methods.queryable_lora.load"}
    provenance = "reimplementation: the source leaves open all formulas but B C(x) A, every size and the start"
    repeatable_blocks = False
    name: ClassVar[str] = "queryable_lora"

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    atoms: int = Field(4, ge=1, le=1024, description="r x r matrices that all layers share; 1: LoRA")
    top_k: int | None = Field(None, ge=1, description=f"atoms that a token mixes, at least 2; {CHOSEN} if unset")
    spread: float = Field(
        0.1, ge=0, description="deviation of the atoms' entries from the identity's at the start, the first atom's 0"
    )
    alpha: float = Field(
        16.0, gt=0, description="the update is scaled by alpha / rank", json_schema_extra={"peft": "lora_alpha"}
    )

    @model_validator(mode="after")
    def _fits_together(self) -> QueryableLora:
        if self.top_k is not None and self.top_k > self.atoms:
            raise ValueError(f"top_k = {self.top_k} is above atoms = {self.atoms}")
        if self.top_k == 1 < self.atoms:
            raise ValueError(
                "top_k = 1 has a weight of 1 whatever the query is, which would never train: give 2 or more"
            )
        return self

    @property
    def scale(self) -> float:
        """See `RoutedLora.scale`."""
        return self.alpha / self.rank

    @classmethod
    def details(cls) -> list[str]:
        """See `Method.details`."""
        return [f"\nWith more than one atom: {NOT_STOCK}. `methods.queryable_lora.load` reads its export."]

    def chosen(self, rank: int) -> int:
        """See `RoutedLora.chosen`: the atoms that a token mixes, whatever the rank."""
        return min(self.atoms, CHOSEN) if self.top_k is None else self.top_k

    def is_routed(self, ranks: Mapping[str, int]) -> bool:
        """See `RoutedLora.is_routed`."""
        return self.atoms > 1

    def check_choice(self, ranks: Mapping[str, int]) -> None:
        """See `RoutedLora.check_choice`: of atoms, which `_fits_together` has seen to."""

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`."""
        ranks = self.layer_ranks(backbone)
        components = f"{sum(ranks.values())} components in {len(ranks)} layers"
        if self.atoms == 1:
            return [f"{components}, a LoRA: there is one atom, the identity"]
        most = max(ranks.values())
        shared = self.atoms * most * (most + 1) + 2 * most * most
        return [
            f"{components}, which share {self.atoms} atoms, {shared:,} parameters with keys and query; a token mixes "
            f"{self.chosen(most)}; {NOT_STOCK}"
        ]

    def route(self, router: Router, activations: Tensor) -> tuple[Tensor, Tensor]:
        """See `RoutedLora.route`. What a token has chosen are atoms."""
        if self.atoms == 1:
            return activations, activations.new_ones(*activations.shape[:-1], 1).bool()
        found: tuple[Tensor, Tensor] = router.get_submodule(BANK)(activations)
        return found

    def adapted(
        self, backbone: Backbone, ranks: Mapping[str, int], rng: torch.Generator
    ) -> tuple[nn.Module, dict[str, Router]]:
        """See `RoutedLora.adapted`. The bank is drawn from `rng`."""
        model, routers = super().adapted(backbone, ranks, rng)
        if self.atoms > 1:
            from methods.shared.atoms import Atoms, add_atoms

            most = max(ranks.values())
            bank = Atoms(self.atoms, most, self.chosen(most), self.spread, rng)
            bank.to(next(iter(routers.values())).weight)
            add_atoms(backbone.module, bank)
            for router in routers.values():
                router.add_module(BANK, bank)
        return model, routers


def load(module: nn.Module, path: Path) -> nn.Module:
    """What was exported into `path`, on `module`: see `methods.shared.routed.load`. A stock LoRA is PEFT's to load."""
    from methods.shared import routed

    return routed.load(QueryableLora, module, path)
