"""A backbone with PEFT's LoRA at given ranks, and what PEFT's LoRA does not fit."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from harness.errors import InputError
from harness.method import Backbone, Method, PeftForm, is_transposed

if TYPE_CHECKING:
    import torch
    from torch import nn

# Hyperparameters of a LoRA that say nothing of its layers' ranks.
OF_ALL_RANKS = {"learning_rate", "weight_decay", "rank", "alpha", "dropout", "rslora", "dora", "init", "target_modules"}


def unfit(backbone: Backbone, layers: list[str], linear_only: str | None = None) -> str | None:
    """Why PEFT's LoRA does not fit one of the layers, or None. `linear_only`: a setting that knows no convolution."""
    from torch import nn

    for name in layers:
        layer = backbone.module.get_submodule(name)
        if is_transposed(layer) and linear_only == "init = olora":
            return f"layer '{name}' is of kind Conv1D, whose weight is transposed, which PEFT's OLoRA does not know of"
        if not isinstance(layer, nn.Conv2d):
            continue
        if linear_only:
            return f"{linear_only} is for linear layers, and layer '{name}' is a convolution"
        if layer.groups != 1 or layer.dilation != (1, 1) or layer.padding_mode != "zeros":
            return f"layer '{name}' is a convolution with groups, dilation or padding that PEFT's LoRA does not follow"
    return None


def unfit_at_rank(
    backbone: Backbone,
    target_modules: tuple[str, ...] | None,
    rank: int,
    components: int | None = None,
    linear_only: str | None = None,
) -> str | None:
    """`Method.unsupported` of a LoRA that starts with one rank in all layers, and ends with so many components.

    Raises InputError for a rank above a layer's smaller side, and for more components than there are."""
    if not backbone.layers:
        return backbone.without_layers()
    targets = backbone.targets(target_modules)
    backbone.check_rank(rank, targets)
    if components is not None and components > (most := rank * len(targets)):
        raise InputError(f"components = {components} is above the {most} that there are", "components")
    return unfit(backbone, list(targets), linear_only)


def nearest_rank(backbone: Backbone, targets: tuple[str, ...], parameters: int, dora: bool) -> int:
    """The rank whose LoRA has nearest to so many `parameters`, the smaller of two, among those that every layer can
    have."""
    shapes = [backbone.shape(layer) for layer in targets]
    fixed = sum(outputs for outputs, _ in shapes) if dora else 0
    each = sum(map(sum, shapes))
    return min(range(1, 1 + min(map(min, shapes))), key=lambda rank: abs(fixed + rank * each - parameters))


def pattern_of(ranks: Mapping[str, int], targets: tuple[str, ...]) -> dict[str, int]:
    """A run's ranks as a `rank_pattern`: targets that it did not adapt have rank 0."""
    return dict.fromkeys(targets, 0) | {layer: rank for layer, rank in ranks.items() if rank > 0}


def shuffled(ranks: dict[str, int], backbone: Backbone, rng: torch.Generator) -> dict[str, int]:
    """The ranks permuted among the layers whose weights have the same shape."""
    import torch

    by_shape: dict[tuple[int, ...], list[str]] = {}
    for layer in ranks:
        shape = backbone.module.get_parameter(f"{layer}.weight").shape
        kernel = shape if len(shape) > 2 else backbone.shape(layer)
        by_shape.setdefault(tuple(kernel), []).append(layer)
    drawn: dict[str, int] = {}
    for layers in by_shape.values():
        order = torch.randperm(len(layers), generator=rng).tolist()
        drawn |= {layer: ranks[layers[place]] for layer, place in zip(layers, order, strict=True)}
    return {layer: drawn[layer] for layer in ranks}


def lora_model(backbone: Backbone, ranks: dict[str, int], scale: float, dropout: float, **settings: Any) -> nn.Module:
    """The backbone as a PEFT LoRA model with these ranks, not all of them 0; every update is multiplied by `scale`.

    settings: further fields of PEFT's LoraConfig.
    """
    from peft import LoraConfig

    fields = lora_fields(ranks, scale, dropout)
    return peft_model(backbone.module, LoraConfig(**fields, modules_to_save=list(backbone.head), **settings))


def lora_fields(ranks: Mapping[str, int], scale: float, dropout: float) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig for these ranks, not all of them 0; every update is multiplied by `scale`."""
    live = {name: rank for name, rank in ranks.items() if rank > 0}
    common = max(live.values())
    # PEFT reads these keys as regular expressions for the end of a name: this form matches one layer only.
    own = {f"^{re.escape(name)}": rank for name, rank in live.items() if rank != common}
    return {
        "r": common,
        "lora_alpha": scale * common,
        "rank_pattern": own,
        "alpha_pattern": {name: scale * rank for name, rank in own.items()},
        "lora_dropout": dropout,
        "target_modules": "|".join(map(re.escape, live)),
    }


def lora_form(ranks: Mapping[str, int], scale: float, parameters: dict[str, Any], **settings: Any) -> PeftForm | None:
    """The LoRA with these ranks; None where all are 0. See `Method.peft_form`.

    parameters: of the method "lora", its `rank` among them unless the largest of the ranks is to be it, with a fitting
    `alpha`. settings: further fields of PEFT's LoraConfig.
    """
    if not any(ranks.values()):
        return None
    fields = lora_fields(ranks, scale, parameters["dropout"])
    parameters = {"rank": fields["r"], "alpha": fields["lora_alpha"], **parameters}
    pattern = {name: rank for name, rank in ranks.items() if rank != parameters["rank"]}
    return PeftForm(fields | settings, "lora", parameters | {"rank_pattern": pattern})


def shared_parameters(method: Method, dropout: float = 0.0) -> dict[str, Any]:
    """The hyperparameters that any method has in common with a LoRA."""
    of_method = method.model_dump(mode="json", include={"learning_rate", "weight_decay", "target_modules"})
    return of_method | {"dropout": dropout}


def peft_model(module: nn.Module, config: Any) -> nn.Module:
    """PEFT's `get_peft_model`, without its warning where it sees, layer by layer, which weights are transposed, and
    without its advice on memory with EVA."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        warnings.filterwarnings("ignore", "lora with eva initialization used with", UserWarning)
        model: nn.Module = get_peft_model(module, config)
    return model


def with_values(module: nn.Module) -> nn.Module:
    """A copy with values: the module's own, or made-up ones where it is on the meta device, for a tuner that computes
    with weights when it is put into a model."""
    import copy

    from torch import nn

    made_up, module = next(module.parameters()).is_meta, copy.deepcopy(module)
    if made_up:
        module.to_empty(device="cpu")
        for tensor in (*module.parameters(), *module.buffers()):
            nn.init.normal_(tensor, std=0.02) if tensor.is_floating_point() else tensor.zero_()
    return module
