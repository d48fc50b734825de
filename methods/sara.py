"""SaRA (Hu et al., ICLR 2025, arXiv 2409.06633): the smallest weights train, under a nuclear norm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from harness.errors import InputError
from harness.method import Adaptation, Backbone, Method, Step, Trace, TrainData
from harness.optimizer import can_fuse, decay_groups
from methods.shared.gradient_start import shared_weight
from methods.shared.shares import SHARE, check_shares, in_updates, least_budget

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from harness.spec import TrainSpec
    from methods.shared.sparse_weights import SparseValues

PLACES, VALUES = ".weight.places", ".weight.values"  # ends of names in an export


class Sara(Method):
    """SaRA (Hu et al., 2025): the smallest weights train, under a nuclear norm.

    Of the adapted layers' weights the smallest train: a `share` of all, or as many as `parameters` says, or those below
    an absolute `threshold`. The others stay as they are. At `reselect_at` those that have grown to the threshold keep
    their values from then on; the small ones train on. Every update adds low_rank times the nuclear norm of what trains
    in one layer, which is drawn.

    The update is sparse and of full rank. So there is no LoRA to export, and an export holds places and values, which
    `methods.sara.load` puts into a model.
    """

    provenance = "from the authors' code; a share or number of weights for the threshold is ours"
    group = "not low-rank"
    own_format = True
    loaders = {"sara.json": "methods.sara.load"}
    capabilities = ("linear", "conv2d")
    traces: ClassVar[tuple[Trace, ...]] = (Trace("trained", "weights in training", drawing="steps"),)

    learning_rate: float = Field(5e-4, gt=0, description="peak learning rate")
    share: float = Field(0.1, gt=0, le=1, description="of the adapted layers' weights, how many train")
    parameters: int | None = Field(None, ge=1, description="weights that train, of all layers together, for share")
    threshold: float | None = Field(
        None, gt=0, description="weights below this magnitude train, for share; the authors' is 2e-3"
    )
    reselect_at: float = Field(
        0.5, ge=0, description=f"when weights that have grown to the threshold stop: {SHARE}; 0: never"
    )
    low_rank: float = Field(5e-4, ge=0, description="weight of the nuclear norm of one layer, drawn in every update")
    penalised: Literal["weights", "update"] = Field(
        "weights", description="what the nuclear norm is of: the weights that train, or their change"
    )
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, description="ends of layer names; all if unset")

    @classmethod
    def details(cls) -> list[str]:
        """See `Method.details`."""
        return [
            "\nThe update is sparse and of full rank: no LoRA, and nothing that stock PEFT could hold. "
            "`methods.sara.load` reads an export."
        ]

    @model_validator(mode="after")
    def _fits_together(self) -> Sara:
        given = self.changed("parameters", "threshold", "share")
        if len(given) > 1:
            first, second, *_ = given
            raise ValueError(f"{first} = {given[first]:g} sets what trains, and so does {second}: give one")
        check_shares(self, "reselect_at")
        return self

    def number(self, backbone: Backbone) -> int:
        """How many weights train; with a threshold, which asks for the weights themselves, how many there are."""
        total = sum(self._sizes(backbone).values())
        if self.threshold is not None:
            return total
        return max(1, round(self.share * total)) if self.parameters is None else self.parameters

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        if not backbone.layers:
            return backbone.without_layers()
        total = sum(self._sizes(backbone).values())
        if self.parameters is not None and self.parameters > total:
            raise InputError(
                f"parameters = {self.parameters} is above the {total} weights of the layers to adapt", "parameters"
            )
        return shared_weight(backbone, backbone.targets(self.target_modules))

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`."""
        sizes, budget = self._sizes(backbone), train.budget(num_examples)
        number, total = self.number(backbone), sum(sizes.values())
        told = f"{number:,} of {total:,} weights in {len(sizes)} layers train, the smallest"
        if self.threshold is not None:
            told = (
                f"weights below {self.threshold:g} train, at most the {total:,} in {len(sizes)} layers: how many they "
                "are is known when a run starts"
            )
        if at := self.reselection(budget):
            told += f"; after update {at} of {budget} those that have grown stop"
        return [told]

    def reselection(self, budget: int) -> int:
        """After how many updates weights that have grown stop; 0: never. Raises InputError where none would be left."""
        (at,) = in_updates(budget, self.reselect_at)
        if at < budget or at == 0:
            return at
        least = least_budget(lambda batches: in_updates(batches, self.reselect_at)[0] < batches)
        raise InputError(
            f"reselect_at = {self.reselect_at:g} does not fit into {budget} batches: it takes at least {least}",
            "reselect_at",
        )

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`. With a threshold that no weight is below, the head alone trains."""
        import torch

        from methods.shared.sparse_weights import train_entries

        model = backbone.module
        backbone.freeze()
        head = [parameter for _, parameter in backbone.head_parameters()]
        layers = {name: model.get_submodule(name) for name in backbone.targets(self.target_modules)}
        places, limit = self._chosen(backbone, {name: layer.get_parameter("weight") for name, layer in layers.items()})
        chosen = {name: own for name, own in places.items() if len(own)} or places
        parts = {name: train_entries(layers[name], own) for name, own in chosen.items()}
        # A vector that stands for entries of matrices is decayed as they are.
        values = {"params": [part.values for part in parts.values()], "weight_decay": self.weight_decay}
        groups = [values, *decay_groups(head, self.weight_decay)]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, fused=can_fuse(groups))
        return SaraAdaptation(self, model, optimizer, backbone, parts, limit)

    def _sizes(self, backbone: Backbone) -> dict[str, int]:
        targets = backbone.targets(self.target_modules)
        return {name: backbone.module.get_parameter(f"{name}.weight").numel() for name in targets}

    def _chosen(self, backbone: Backbone, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        """The places that train, by layer, and the threshold. On the meta device, right in their number alone."""
        import torch

        from methods.shared.sparse_weights import below, smallest

        number = self.number(backbone)
        if next(iter(weights.values())).is_meta:
            places = {}
            for name, weight in weights.items():
                places[name] = torch.empty(min(number, weight.numel()), dtype=torch.int64, device="meta")
                number -= len(places[name])
            return places, float("inf")
        if self.threshold is None:
            return smallest(weights, number)
        return below(weights, self.threshold), self.threshold


class SaraAdaptation(Adaptation):
    """One run. Its adapter is every weight that trains or has trained."""

    def __init__(
        self,
        method: Sara,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        backbone: Backbone,
        parts: dict[str, SparseValues],
        limit: float,
    ) -> None:
        super().__init__(model, optimizer, backbone)
        self.method, self.parts, self.limit = method, parts, limit
        self.layers: dict[str, Any] = {name: model.get_submodule(name) for name in parts}
        self.drawn: str | None = None  # the layer whose nuclear norm this update adds

    def before_forward(self, step: Step) -> None:
        """See `Adaptation.before_forward`."""
        import torch

        live = [name for name, part in self.parts.items() if len(part.values)]
        self.drawn = None
        if live and self.method.low_rank:
            self.drawn = live[int(torch.randint(len(live), (1,), generator=step.rng))]

    def penalty(self) -> Tensor | None:
        """See `Adaptation.penalty`: low_rank times the nuclear norm of the layer drawn, as a matrix."""
        from methods.shared.sparse_weights import nuclear_norm

        if self.drawn is None:
            return None
        part, layer = self.parts[self.drawn], self.layers[self.drawn]
        matrix = part.trained_alone(layer)
        if self.method.penalised == "update":
            matrix = matrix - part.start_alone(layer)
        return self.method.low_rank * nuclear_norm(matrix)

    def after_step(self, step: Step) -> dict[str, Any]:
        """See `Adaptation.after_step`. The history has how many weights train, at the start and once it changes."""
        is_time = step.index + 1 == self.method.reselection(step.budget)
        if is_time:
            self._reselect()
        if is_time or step.index == 0:
            return {"trained": sum(len(part.values) for part in self.parts.values())}
        return {}

    def _reselect(self) -> None:
        """Weights that have grown to the threshold keep their values; the others train on, with their moments."""
        from methods.shared.optimizer_state import keep

        for part in self.parts.values():
            stays = part.values.detach().abs() < self.limit
            part.settle(stays)
            keep(part.values, stays.nonzero().flatten(), 0, self.optimizer)

    def remarks(self) -> list[str]:
        """See `Adaptation.remarks`."""
        return [] if self.adapter_parameters() else ["no weight is below the threshold: at most the head has trained"]

    def adapter_parameters(self) -> int:
        """See `Adaptation.adapter_parameters`: those that have settled stay in effect."""
        return sum(part.numbers() for part in self.parts.values())

    def other_parameters(self) -> int:
        """See `Adaptation.other_parameters`: the deployed model has the backbone's size."""
        return super().other_parameters() - self.adapter_parameters()

    def stored_bytes(self) -> int:
        """See `Adaptation.stored_bytes`: places and values, and the head."""
        from methods.shared.sparse_weights import place_bytes

        return self.head_bytes() + sum(
            part.numbers() * (part.values.element_size() + place_bytes(part.places)) for part in self.parts.values()
        )

    def state_dict(self) -> dict[str, Any]:
        """See `Adaptation.state_dict`."""
        from methods.shared.optimizer_state import shapes

        settled = [len(part.settled) for part in self.parts.values()]
        return super().state_dict() | {"shapes": shapes(self.optimizer), "settled": settled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Adaptation.load_state_dict`."""
        from methods.shared.optimizer_state import match_shapes

        match_shapes(self.optimizer, state["shapes"])
        for part, settled in zip(self.parts.values(), state["settled"], strict=True):
            part.settled = part.values.new_empty(settled)
            part.settled_places = part.places.new_empty(settled)
            part.places = part.places.new_empty(len(part.values))
        super().load_state_dict(state)

    def export(self, path: Path) -> None:
        """See `Adaptation.export`: places and values of each layer, and the head, as `load` reads them."""
        from methods.shared.own_format import save

        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        tensors = {name: p.detach() for name, p in trained.items() if ".parametrizations." not in name}
        for name, part in self.parts.items():
            tensors[name + PLACES], tensors[name + VALUES] = part.entries()
        shapes = {name: list(layer.weight.shape) for name, layer in self.layers.items()}
        save(path, "sara", {"layers": shapes}, tensors)


def load(module: nn.Module, path: Path) -> nn.Module:
    """`module`, a model built as the one that was trained, with an export put into it, in place; a plain model.

    Raises InputError, in one line, where `path` holds no such export, where it is damaged, or where it does not fit the
    model; do not use the model then.
    """
    import torch

    from methods.shared.own_format import read

    settings, tensors = read(path, "sara")
    own = dict(module.named_parameters())
    changed = {}
    for name, shape in settings["layers"].items():
        places, values = tensors.pop(name + PLACES).long(), tensors.pop(name + VALUES)
        weight = own.get(f"{name}.weight")
        if weight is None:
            raise _misfit(path, f"it has no layer '{name}'")
        if list(weight.shape) != shape:
            raise _misfit(path, f"'{name}.weight' is {tuple(weight.shape)} there and {tuple(shape)} here")
        flat = weight.detach().flatten().scatter(0, places.to(weight.device), values.to(weight))
        changed[f"{name}.weight"] = flat.view(weight.shape)
    for name, value in (changed | tensors).items():
        if name not in own:
            raise _misfit(path, f"it has no '{name}'")
        if own[name].shape != value.shape:
            raise _misfit(path, f"'{name}' is {tuple(own[name].shape)} there and {tuple(value.shape)} here")
        with torch.no_grad():
            own[name].copy_(value)
    return module


def _misfit(path: Path, reason: str) -> InputError:
    return InputError(f"the export in '{path}' does not fit the model: {reason}")
