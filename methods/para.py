"""PARA (Kumaravelu et al., 2026, arXiv 2604.27796): a trained LoRA cut by one threshold for all layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from harness.errors import InputError
from harness.method import Adaptation, Backbone, PeftForm, Step, TrainData
from harness.optimizer import adamw
from methods.shared.cut_lora import CutLoraAdaptation, among_largest
from methods.shared.lora_method import LoraMethod
from methods.shared.peft_model import lora_form, lora_model, shared_parameters, unfit

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from harness.spec import TrainSpec

ENERGY = 0.9  # ours


class Para(LoraMethod):
    """PARA (Kumaravelu et al., 2026): LoRA, its singular values cut after training at one threshold for all layers.

    Every layer is brought to the SVD of its update, by QR of both factors and the SVD of the small core, and the
    singular values of all layers are pooled (all updates have one scale, alpha / rank). The smallest are removed as
    long as `energy` is kept, the share of their sum of squares; or all but the `components` largest. The squared error
    of all layers together is the sum of the squares that were removed: no other choice of as many is better.

    Ours is `parameters`: a component of a layer costs its outputs plus its inputs, so the largest sigma^2 / cost stay,
    as many as fit. No other choice of at most as many parameters as are left then has a smaller error.
    """

    provenance = "from the paper; no official code; the budget in parameters is ours"
    group = "ranks after training"
    capabilities = ("linear", "conv2d", "rank-adaptive")

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    rank: int = Field(
        8,
        ge=1,
        description="rank of every adapted layer while it trains, at most its smaller side",
        json_schema_extra={"peft": "r"},
    )
    energy: float | None = Field(
        None,
        gt=0,
        le=1,
        description=f"share of the sum of squared singular values that stays, at least; {ENERGY} where no budget is "
        "given; 1: only what adds nothing goes",
    )
    components: int | None = Field(None, ge=1, description="components that stay, over all layers; or give energy")
    parameters: int | None = Field(None, ge=1, description="adapter parameters that stay, at most; or give energy")
    alpha: float = Field(
        16.0,
        gt=0,
        description="the update is scaled by alpha / rank, before and after the cut",
        json_schema_extra={"peft": "lora_alpha"},
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the adapter's input", json_schema_extra={"peft": "lora_dropout"}
    )
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, description="ends of layer names; all if unset")

    @model_validator(mode="after")
    def _one_threshold(self) -> Para:
        given = {name: getattr(self, name) for name in ("energy", "components", "parameters")}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) > 1:
            said = " and ".join(f"{name} = {value:g}" for name, value in given.items())
            raise ValueError(f"{said} are set together; give one of them")
        return self

    def peft_form(self, ranks: Mapping[str, int]) -> PeftForm | None:
        """See `Method.peft_form`: LoRA with the components that stayed."""
        return lora_form(ranks, self.alpha / self.rank, shared_parameters(self, self.dropout))

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        if not backbone.layers:
            return backbone.without_layers()
        targets = backbone.targets(self.target_modules)
        backbone.check_rank(self.rank, targets)
        costs = {layer: sum(backbone.shape(layer)) for layer in targets}
        for name, most in (("components", self.rank * len(costs)), ("parameters", self.rank * sum(costs.values()))):
            if (value := getattr(self, name)) is not None and value > most:
                raise InputError(f"{name} = {value} is above the {most} that there are", name)
        dearest = max(costs, key=lambda layer: costs[layer])
        if self.parameters is not None and self.parameters < costs[dearest]:
            raise InputError(
                f"parameters = {self.parameters} holds no component of layer '{dearest}', which has {costs[dearest]}: "
                "give as many at least",
                "parameters",
            )
        return unfit(backbone, list(targets))

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`."""
        targets = backbone.targets(self.target_modules)
        whole = f"after training, of {self.rank * len(targets)} components in {len(targets)} layers"
        if self.components is not None:
            return [f"{whole} the {self.components} largest stay"]
        if self.parameters is not None:
            return [f"{whole} those stay that fit into {self.parameters} parameters"]
        return [f"{whole} the fewest stay that hold {self.share:g} of the squared singular values"]

    @property
    def share(self) -> float:
        """`energy`, or what it is where nothing is given."""
        return ENERGY if self.energy is None else self.energy

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        targets = backbone.targets(self.target_modules)
        model = lora_model(backbone, dict.fromkeys(targets, self.rank), self.alpha / self.rank, self.dropout)
        optimizer = adamw(model, self.learning_rate, self.weight_decay)
        return ParaAdaptation(self, model, optimizer, backbone, targets)


class ParaAdaptation(CutLoraAdaptation):
    """One run: a LoRA that is cut when it is trained."""

    method: Para

    def finish(self, step: Step) -> None:
        """See `Adaptation.finish`. Where all components stay, nothing is touched."""
        from methods.shared.canonical import lora_basis

        left = self._left([lora_basis(B, A).sizes for B, A in self.pairs()])
        if left != list(self.ranks().values()):
            self.rotate()
            self.keep([range(number) for number in left])

    def _left(self, values: list[Tensor]) -> list[int]:
        """How many components of each layer stay. values: the singular values of each, descending."""
        import torch

        squares = [own.cpu().square() for own in values]
        if self.method.parameters is not None:
            costs = [(B.numel() + A.numel()) // len(A) for B, A in self.pairs()]
            worth = [own / cost for own, cost in zip(squares, costs, strict=True)]
            order = torch.cat(worth).argsort(descending=True, stable=True)
            spent = torch.cat([torch.full_like(own, cost) for own, cost in zip(squares, costs, strict=True)])[order]
            return among_largest(worth, int((spent.cumsum(0) <= self.method.parameters).sum()))
        if self.method.components is not None:
            return among_largest(squares, self.method.components)
        ascending = torch.cat(squares).sort().values
        removed = ascending.cumsum(0) <= (1 - self.method.share) * ascending.sum()
        return among_largest(squares, int((~removed).sum()))
