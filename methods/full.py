"""Full fine-tuning: every number of the backbone trains, with AdamW or an optimizer that keeps less."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from harness.errors import InputError
from harness.method import Adaptation, Backbone, Method, Step, TrainData, is_transposed
from harness.optimizer import adamw, decay_groups
from harness.parameters import Range
from methods.full_optimizers.memory import adamw_bytes, optimizer_bytes

if TYPE_CHECKING:
    import torch

    from harness.spec import TrainSpec
    from methods.full_optimizers.matrix_adamw import MatrixAdamW

OPTIMIZERS: dict[str, dict[str, Any]] = {  # their settings with the defaults; None: what is not given stays open
    "adamw": {},
    "galore": {"rank": 4, "interval": 500, "scale": 4.0, "target_modules": None},
    "frugal": {"density": 0.25, "interval": 500, "kappa": 0.1, "subspace": "columns", "target_modules": None},
    "dct_adamw": {"rank": 4, "interval": 1, "selection": "l1", "error_feedback": False, "target_modules": None},
}
SETTINGS = tuple(dict.fromkeys(name for settings in OPTIMIZERS.values() for name in settings))
GALORE_RATE = 3e-5  # its own command for GLUE


def _unset(value: Any) -> bool:
    """Of the settings below, which are younger than the first records."""
    return value is None


class Full(Method):
    """Full fine-tuning: every number of the backbone trains.

    `optimizer` says with what. AdamW keeps two moments for every number. The three others keep less for the weights of
    linear layers, and are AdamW for all else, the head included:

    - galore (Zhao et al., 2024): Adam on the gradient's projection onto its leading singular vectors
    - frugal (Zmushko et al., 2024): AdamW for some columns, drawn anew now and then, signSGD for the others
    - dct_adamw (Modoranu et al., 2025): as galore, on columns of one fixed cosine transform

    Each has its own settings, and takes no other's. A dry run says how many bytes the optimizer will keep.
    """

    version = 2
    provenance = "common practice; optimizers other than adamw are from the authors' code"
    group = "whole model"
    own_format = True
    capabilities = ("any layer",)
    search_space = {"learning_rate": Range(1e-6, 1e-3, log=True)}

    learning_rate: float = Field(5e-5, gt=0, description="peak learning rate; unset: 3e-5 for galore")
    optimizer: Literal["adamw", "galore", "frugal", "dct_adamw"] = Field(
        "adamw", description="what trains the weights of linear layers", exclude_if=lambda value: value == "adamw"
    )
    rank: int | None = Field(
        None,
        ge=1,
        description="galore, dct_adamw: directions of a gradient that have moments, at most its smaller side; unset: 4",
        exclude_if=_unset,
    )
    interval: int | None = Field(
        None,
        ge=1,
        description="updates between two choices of these directions or columns; unset: 500, for dct_adamw 1",
        exclude_if=_unset,
    )
    scale: float | None = Field(
        None, gt=0, description="galore: the update is multiplied by it; unset: 4", exclude_if=_unset
    )
    density: float | None = Field(
        None,
        ge=0,
        le=1,
        description="frugal: share of the columns that AdamW trains; 0 is signSGD; unset: 0.25",
        exclude_if=_unset,
    )
    kappa: float | None = Field(
        None, ge=0, description="frugal: signSGD's learning rate over AdamW's; unset: 0.1", exclude_if=_unset
    )
    subspace: Literal["columns", "svd"] | None = Field(
        None,
        description="frugal: AdamW has columns at random, or the gradient's leading directions; unset: columns",
        exclude_if=_unset,
    )
    selection: Literal["l1", "l2"] | None = Field(
        None,
        description="dct_adamw: the norm by which columns of the transform are chosen; l2 keeps the most of the "
        "gradient; unset: l1",
        exclude_if=_unset,
    )
    error_feedback: bool | None = Field(
        None,
        description="dct_adamw: what is left out of a gradient is added to the next one, at the cost of a whole "
        "gradient in memory; unset: false",
        exclude_if=_unset,
    )
    target_modules: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="ends of the names of the linear layers that galore or dct_adamw trains, AdamW the others; frugal: "
        "of those with AdamW's columns, signSGD trains the others; all if unset",
        exclude_if=_unset,
    )

    @model_validator(mode="after")
    def _settings_of_the_optimizer(self) -> Full:
        own = OPTIMIZERS[self.optimizer]
        for name in SETTINGS:
            given = getattr(self, name)
            if given is None:
                object.__setattr__(self, name, own.get(name))
            elif name not in own:
                having = " and ".join(each for each, settings in OPTIMIZERS.items() if name in settings)
                raise ValueError(f"{name} = {given} is no setting of optimizer = {self.optimizer}, but of {having}")
        if self.optimizer == "galore" and "learning_rate" not in self.model_fields_set:
            object.__setattr__(self, "learning_rate", GALORE_RATE)
        return self

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        if self.optimizer == "adamw":
            return None
        targets = self._targets(backbone)
        if not targets:
            return backbone.without_layers("linear layer")
        if self.rank is not None:
            backbone.check_rank(self.rank, targets)
        return None

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`: the memory, which is these optimizers' point."""
        if self.optimizer == "adamw":
            return []
        kept = optimizer_bytes(self.optimizer, self._settings, backbone, self._targets(backbone))
        return [f"the optimizer keeps {kept:,} bytes, AdamW would keep {adamw_bytes(backbone):,}"]

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        backbone.module.requires_grad_(True)
        if self.optimizer == "adamw":
            optimizer = adamw(backbone.module, self.learning_rate, self.weight_decay)
            return Adaptation(backbone.module, optimizer, backbone)
        return FullAdaptation(backbone.module, self._optimizer(backbone), backbone)

    @property
    def _settings(self) -> dict[str, Any]:
        """The optimizer's own."""
        return {name: getattr(self, name) for name in OPTIMIZERS[self.optimizer] if name != "target_modules"}

    def _targets(self, backbone: Backbone) -> tuple[str, ...]:
        """The linear layers whose weights have a subspace. Raises InputError for a named one that is not linear."""
        targets = backbone.targets(self.target_modules)
        linear = _linear(backbone, targets)
        if self.target_modules is not None and len(linear) < len(targets):
            other = next(name for name in targets if name not in linear)
            raise InputError(
                f"target module '{other}' is no linear layer: optimizer = {self.optimizer} is for matrices", other
            )
        return linear

    def _optimizer(self, backbone: Backbone) -> MatrixAdamW:
        from methods.full_optimizers.dct_adamw import DctAdamW
        from methods.full_optimizers.frugal import Frugal
        from methods.full_optimizers.galore import GaLore

        classes: dict[str, type[MatrixAdamW]] = {"galore": GaLore, "frugal": Frugal, "dct_adamw": DctAdamW}
        return classes[self.optimizer](self._groups(backbone), self.learning_rate, **self._settings)

    def _groups(self, backbone: Backbone) -> list[dict[str, Any]]:
        """Parameter groups: weights of linear layers, as they lie in memory and with or without moments, and all others
        as `decay_groups` has them."""
        targets = self._targets(backbone)
        matrices: dict[tuple[bool, bool], dict[Any, None]] = {}
        taken = set()
        for name in targets if self.optimizer != "frugal" else _linear(backbone, backbone.layers):
            layer, weight = backbone.module.get_submodule(name), backbone.module.get_parameter(f"{name}.weight")
            if weight not in taken:
                matrices.setdefault((is_transposed(layer), name in targets), {})[weight] = None
                taken.add(weight)
        groups = [
            {"params": list(weights), "weight_decay": self.weight_decay, "transposed": transposed, "moments": moments}
            for (transposed, moments), weights in matrices.items()
        ]
        return groups + decay_groups((p for p in backbone.module.parameters() if p not in taken), self.weight_decay)


class FullAdaptation(Adaptation):
    """One run with an optimizer of matrices."""

    optimizer: MatrixAdamW

    def before_step(self, step: Step) -> None:
        """See `Adaptation.before_step`: what the optimizer draws comes from the run's seed."""
        self.optimizer.rng = step.rng

    def optimizer_bytes(self) -> int:
        """See `Adaptation.optimizer_bytes`: bases that all layers share belong to it."""
        return super().optimizer_bytes() + sum(basis.nbytes for basis in self.optimizer.shared.values())


def _linear(backbone: Backbone, layers: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the layers whose weight is a matrix."""
    return tuple(name for name in layers if backbone.module.get_parameter(f"{name}.weight").dim() == 2)
