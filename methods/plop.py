"""PLoP (Hayou et al., 2025, arXiv 2506.20629): which kinds of layers get a LoRA, from the norms of their features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from harness.errors import InputError
from harness.method import (
    RANK,
    RANKS,
    Adaptation,
    Backbone,
    Indices,
    PeftForm,
    Step,
    Trace,
    TrainData,
    as_matrix,
)
from harness.optimizer import adamw
from methods.shared.lora_method import LoraMethod
from methods.shared.peft_model import lora_form, lora_model, shared_parameters, unfit
from methods.shared.peft_names import PREFIX
from methods.shared.prepared_lora import PreparedLora

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from harness.spec import TrainSpec

RANDOM_ROWS = 1024  # of the random term: its relative error is 2.4 % at rank 1, and falls with the weight's rank


class Plop(LoraMethod):
    """PLoP (Hayou et al., 2025): LoRA in the module types whose weights are least aligned with their inputs.

    Before the first update, `batches` go forward through the model. A layer's normalised feature norm is
    mean |W z| / mean |W u| over its inputs z, brought to length 1, and over random directions u: about 1 where the
    inputs are nothing special to W, above where they lie along its large singular directions. Its mean over the layers
    of each module type is taken, and the `types` lowest get a LoRA of `rank` in each of their layers; the others get
    none. `choice = inverse`, the control, takes the highest instead.

    A module type is what a layer's name has after its last number: "attention.output.dense" of
    "encoder.layer.0.attention.output.dense". Hyperparameters may be given by PEFT's names: plop[r=4,lora_alpha=8].
    """

    provenance: ClassVar[str] = "from the paper; what a module type is, and the rows of the random term, are ours"
    group: ClassVar[str] = "modules chosen"
    capabilities: ClassVar[tuple[str, ...]] = ("linear", "conv2d", "rank-adaptive")
    traces: ClassVar[tuple[Trace, ...]] = (
        RANK,
        RANKS,
        Trace("feature_norms", "normalised feature norm", drawing="heat_map"),
    )

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    rank: int = Field(
        8,
        ge=1,
        description="rank of every layer that is chosen, at most its smaller side",
        json_schema_extra={"peft": "r"},
    )
    alpha: float = Field(
        16.0, gt=0, description="the update is scaled by alpha / rank", json_schema_extra={"peft": "lora_alpha"}
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the adapter's input", json_schema_extra={"peft": "lora_dropout"}
    )
    types: int = Field(3, ge=1, description="module types that get a LoRA")
    choice: Literal["lowest", "inverse"] = Field(
        "lowest", description="those of the lowest feature norms, or, as a control, of the highest"
    )
    batches: int = Field(8, ge=1, description="batches that are read before the first update")
    target_modules: tuple[str, ...] | None = Field(
        None, min_length=1, description="ends of the names of the layers to choose among; all if unset"
    )

    def peft_form(self, ranks: Mapping[str, int]) -> PeftForm | None:
        """See `Method.peft_form`: LoRA in the chosen layers."""
        return lora_form(ranks, self.alpha / self.rank, shared_parameters(self, self.dropout))

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        from torch import nn

        if not backbone.layers:
            return backbone.without_layers()
        targets = backbone.targets(self.target_modules)
        types = list(by_type(targets))
        if len(types) == 1:
            return f"all layers are of one module type, '{types[0]}': there is nothing to choose"
        if self.types > len(types):
            raise InputError(
                f"types = {self.types} is above the {len(types)} module types that there are: {', '.join(types)}",
                "types",
            )
        backbone.check_rank(self.rank, targets)
        for name in targets:
            layer = backbone.module.get_submodule(name)
            if isinstance(layer, nn.Conv2d) and isinstance(layer.padding, str):
                return f"layer '{name}' is a convolution with padding '{layer.padding}', whose inputs are no rows"
        return unfit(backbone, list(targets))

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`: the sizes that can come out, and what it reads."""
        budget, types = train.budget(num_examples), by_type(backbone.targets(self.target_modules))
        if budget <= self.batches:
            raise InputError(
                f"plop reads batches = {self.batches} before the first update, and the budget is {budget}: give at "
                f"least {self.batches + 1}, or lower batches",
                "batches",
            )
        sizes = sorted(self.rank * sum(sum(backbone.shape(name)) for name in layers) for layers in types.values())
        least, most = sum(sizes[: self.types]), sum(sizes[-self.types :])
        read = f"{self.batches} of {budget} batches are read before the first update"
        return [f"LoRA in {self.types} of {len(types)} module types, {least:,} to {most:,} parameters; {read}"]

    def chosen(self, feature_norms: Mapping[str, float]) -> tuple[str, ...]:
        """The layers that get a LoRA, from each layer's normalised feature norm; of equal types the first is lower."""
        types = by_type(tuple(feature_norms))
        means = {kind: sum(feature_norms[name] for name in layers) / len(layers) for kind, layers in types.items()}
        order = sorted(means, key=lambda kind: means[kind])
        kinds = order[: self.types] if self.choice == "lowest" else order[-self.types :]
        return tuple(name for name in feature_norms if module_type(name) in kinds)

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`: a LoRA in every layer that may be chosen."""
        targets = backbone.targets(self.target_modules)
        model = lora_model(backbone, dict.fromkeys(targets, self.rank), self.alpha / self.rank, self.dropout)
        optimizer = adamw(model, self.learning_rate, self.weight_decay)
        return PlopAdaptation(self, model, optimizer, backbone, targets, data)


class PlopAdaptation(PreparedLora):
    """One run: the choice of layers, and LoRA there."""

    method: Plop

    def prepare(self, step: Step) -> None:
        """See `Adaptation.prepare`. The layers that are not chosen are their base layers again."""
        from harness.passes import evaluation_mode

        bases = {name: layer.get_base_layer() for name, layer in self.layers.items()}
        batches = (self.data.draw("all") for _ in range(self.method.batches))
        with evaluation_mode(self.model):  # where B = 0: the backbone as it is
            norms = feature_norms(step, self.model, bases, batches)
        self.found = {"feature_norms": [norms[name] for name in self.targets]}
        chosen = self.method.chosen(norms)
        self.build({name: self.method.rank if name in chosen else 0 for name in self.targets})
        self.follow()

    def build(self, ranks: Mapping[str, int]) -> None:
        """See `PreparedLora.build`."""
        from methods.shared.optimizer_state import train_anew

        for name, layer in self.layers.items():
            if ranks[name] == 0:
                self.model.set_submodule(PREFIX + name, layer.get_base_layer())
        train_anew(self.optimizer, self.model, self.method.weight_decay)


def module_type(layer: str) -> str:
    """What a layer's name has after its last number, numbers at its end left out: "attention.self.query",
    "downsample". A name of nothing but numbers is its own type."""
    parts = layer.split(".")
    while parts and parts[-1].isdecimal():
        parts.pop()
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts) or layer


def by_type(layers: Sequence[str]) -> dict[str, list[str]]:
    """The layers of each module type."""
    types: dict[str, list[str]] = {}
    for name in layers:
        types.setdefault(module_type(name), []).append(name)
    return types


def feature_norms(
    step: Step, model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Indices]
) -> dict[str, float]:
    """mean |W z| / mean |W u| of each layer: z its inputs in these batches, without padding, u random, all of length 1.

    A convolution's inputs are its patches. Inputs of 0 have no direction and are left out. u: `RANDOM_ROWS` from
    `step.rng`, evenly distributed over the sphere. Raises RuntimeError for a layer that has no number.
    """
    import torch

    from harness.passes import observe_inputs

    def norms_of(name: str, rows: Tensor) -> Tensor:
        weight = as_matrix(layers[name], layers[name].get_parameter("weight")).float()
        lengths = rows.norm(dim=1)
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            return (rows[lengths > 0] / lengths[lengths > 0][:, None] @ weight.T).norm(dim=1)

    sums: dict[str, Any] = dict.fromkeys(layers, 0.0)
    counts: dict[str, int] = dict.fromkeys(layers, 0)

    def see(name: str, rows: Tensor) -> None:
        found = norms_of(name, rows.float())
        sums[name] += found.sum(dtype=torch.float64)
        counts[name] += len(found)

    observe_inputs(step, model, layers, batches, see)
    ratios = {}
    for name, layer in layers.items():
        weight = layer.get_parameter("weight")
        drawn = torch.randn(RANDOM_ROWS, as_matrix(layer, weight).shape[1], generator=step.rng).to(weight.device)
        random = float(norms_of(name, drawn).mean(dtype=torch.float64))
        if not counts[name] or not random:
            raise RuntimeError(
                f"layer '{name}' gets no input but 0, or its weight is 0: leave it out of target_modules"
            )
        ratios[name] = float(sums[name]) / counts[name] / random
    return ratios
