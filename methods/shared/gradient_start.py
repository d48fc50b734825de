"""A LoRA that starts from the mean gradient of the frozen weights: what GoRA and LoRA-GA have in common."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from harness.errors import Diverged, InputError
from harness.method import Backbone, Step, TrainData

if TYPE_CHECKING:
    from torch import Tensor

    from harness.spec import TrainSpec
    from methods.shared.lora_adaptation import LoraAdaptation


def shared_weight(backbone: Backbone, targets: tuple[str, ...]) -> str | None:
    """Why a target's gradient is not its own, or None: another part of the model, target or not, has the same weight. A
    start that takes something out of it would change that part as well."""
    owners: dict[int, list[str]] = {}
    for name, parameter in backbone.module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.removesuffix(".weight"))
    for name in targets:
        first, *others = owners[id(backbone.module.get_parameter(f"{name}.weight"))]
        if others:
            both = f"layers '{first}' and '{others[0]}' share their weight"
            return f"{both}, and so its gradient: leave them out by target_modules"
    return None


def spending(batches: int, backbone: Backbone, targets: tuple[str, ...], train: TrainSpec, num_examples: int) -> str:
    """What a dry run says of the start: its batches, and its memory. Raises InputError where no batch is left."""
    budget = train.budget(num_examples)
    if batches >= budget:
        raise InputError(
            f"batches = {batches} before the first update leave none of the budget of {budget} to train with: "
            f"the least budget is {batches + 1}",
            "batches",
        )
    weights = [backbone.module.get_parameter(f"{name}.weight") for name in targets]
    size = sum(math.prod(weight.shape) * weight.element_size() for weight in weights) / 2**20
    return (
        f"{batches} of {budget} batches go before the first update, for the mean gradient of {len(targets)} layers, "
        f"which takes {size:,.1f} MiB beside the model meanwhile"
    )


def mean_gradients(adaptation: LoraAdaptation, step: Step, data: TrainData, batches: int) -> dict[str, Tensor]:
    """The mean gradient of each adapted layer's frozen weight over `batches` of the stream "all", as a matrix (outputs,
    inputs). Raises Diverged where one is not finite."""
    from harness.passes import mean_weight_gradients

    layers = {name: layer.get_base_layer() for name, layer in adaptation.layers.items()}
    found = mean_weight_gradients(step, adaptation.model, layers, (data.draw("all") for _ in range(batches)))
    for name, gradient in found.items():
        if not gradient.isfinite().all():
            raise Diverged(f"the gradient of layer '{name}' is not finite before the first update")
    return found
