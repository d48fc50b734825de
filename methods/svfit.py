"""SVFit (Sun et al., 2024, arXiv 2409.05926): the largest singular values of each weight train, all else is frozen."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from harness.method import RANK, RANKS, Adaptation, Backbone, Step, Trace, TrainData
from harness.optimizer import adamw
from harness.parameters import Range, SearchSpace
from methods.shared.lora_method import LoraMethod
from methods.shared.peft_model import unfit
from methods.shared.placement import check_spread, spread
from methods.shared.spectral import SpectralAdaptation, add_bases, keep_largest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from harness.spec import TrainSpec

ENERGY = 0.99  # the abstract: singular values that hold over 99 % of a matrix's information


class SvFit(LoraMethod):
    """SVFit (Sun et al., 2024): the r largest singular values of each weight train, its singular vectors are frozen.

    With W = U diag(sigma) V^T a layer's weight becomes W + U_r diag(delta) V_r^T, delta of r numbers, 0 at the start: r
    parameters a layer. The residual beyond r stays as it is.

    r is `rank` in every layer; or `components` spread evenly over the layers; or, from each weight itself, the fewest
    singular values that hold `energy` of the sum of their squares.
    """

    provenance = (
        "reimplementation: the source leaves open how r is chosen and how it is trained, as far as we could read it"
    )
    group = "fixed rank"
    capabilities = ("linear", "conv2d")
    search_space: ClassVar[SearchSpace] = {"learning_rate": Range(1e-4, 1e-1, log=True)}
    traces: ClassVar[tuple[Trace, ...]] = (RANK, RANKS)

    learning_rate: float = Field(1e-2, gt=0, description="peak learning rate")
    rank: int | None = Field(
        None, ge=1, description="singular values of every layer that train, at most its smaller side; or give energy"
    )
    components: int | None = Field(
        None, ge=1, description="singular values of all layers together, spread evenly; or give energy"
    )
    energy: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the sum of squared singular values that those of a layer hold, at least; "
        f"{ENERGY} where nothing is given",
    )
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, description="ends of layer names; all if unset")

    @model_validator(mode="after")
    def _one_rule(self) -> SvFit:
        if len(given := self.changed("rank", "components", "energy")) > 1:
            said = " and ".join(f"{name} = {value:g}" for name, value in given.items())
            raise ValueError(f"{said} are set together; give one of them")
        return self

    @property
    def share(self) -> float | None:
        """`energy`, or what it is where nothing is given; None with `rank` or `components`."""
        return ENERGY if not self.changed("rank", "components", "energy") else self.energy

    def most(self, backbone: Backbone) -> dict[str, int]:
        """The rank of each layer; with `energy`, the most that it can be."""
        targets = backbone.targets(self.target_modules)
        if self.share is not None:
            return {name: min(backbone.shape(name)) for name in targets}
        return spread(self.components, self.rank or 0, targets)

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        if not backbone.layers:
            return backbone.without_layers()
        targets = backbone.targets(self.target_modules)
        if self.share is None:
            check_spread(self.components, self.rank or 0, backbone, targets)
        return unfit(backbone, list(targets))

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`: how many singular values train."""
        most = self.most(backbone)
        told = f"{sum(most.values())} singular values of {len(most)} layers train"
        if self.share is None:
            return [told]
        return [f"up to {told}: of each the fewest that hold {self.share:g} of their squares, found before training"]

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`; with `energy`, all singular values until `prepare`."""
        import torch
        from torch import nn

        most = self.most(backbone)
        bases = add_bases(backbone, list(most))
        for name, basis in bases.items():
            keep_largest(basis, most[name])
            basis.register_parameter("delta", nn.Parameter(torch.zeros_like(basis.sigma)))
        optimizer = adamw(backbone.module, self.learning_rate, self.weight_decay)
        return SvFitAdaptation(self, optimizer, backbone, bases)


class SvFitAdaptation(SpectralAdaptation):
    """One run: delta of each layer trains, (r,)."""

    method: SvFit

    def pair(self, basis: Any) -> tuple[Tensor, Tensor]:
        """See `SpectralAdaptation.pair`: B = U_r diag(delta) and A = V_r^T."""
        return basis.U * basis.delta, basis.Vh

    def prepare(self, step: Step) -> None:
        """See `Adaptation.prepare`. It takes no batch: the weights say the ranks."""
        if self.method.share is not None:
            self._cut({name: fewest(basis.sigma, self.method.share) for name, basis in self.bases.items()})

    def after_step(self, step: Step) -> dict[str, Any]:
        """See `Adaptation.after_step`. Where the weights said them, the first update's history has the ranks."""
        if self.method.share is None or step.index:
            return {}
        ranks = list(self.ranks().values())
        return {"rank": sum(ranks), "ranks": ranks}

    def ranks(self) -> dict[str, int]:
        """See `Adaptation.ranks`."""
        return {name: len(basis.delta) for name, basis in self.bases.items()}

    def at_rank(self, rank: int) -> AbstractContextManager[None]:
        """See `Adaptation.at_rank`: the largest |delta|. Singular vectors are orthonormal, so no approximation of the
        update is better."""
        from methods.shared.truncation import largest, swapped

        return swapped({basis.delta: largest(basis.delta, rank) for basis in self.bases.values()})

    def state_dict(self) -> dict[str, Any]:
        """See `Adaptation.state_dict`."""
        return super().state_dict() | {"ranks": self.ranks()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Adaptation.load_state_dict`. The layers get the saved ranks first."""
        self._cut(state["ranks"])
        super().load_state_dict(state)

    def _cut(self, ranks: dict[str, int]) -> None:
        """Leave so many of each layer's triples, those of the largest singular values."""
        import torch

        from methods.shared.optimizer_state import keep

        for name, basis in self.bases.items():
            keep_largest(basis, ranks[name])
            keep(basis.delta, torch.arange(ranks[name], device=basis.delta.device), 0, self.optimizer)


def fewest(sigma: Tensor, share: float) -> int:
    """How many of these values, which descend, hold at least `share` of the sum of their squares; at least 1."""
    held = sigma.double().square().cumsum(0)
    return min(len(sigma), 1 + int((held < share * held[-1]).sum()))
