"""A LoRA that starts from the mean gradient of the frozen weights: what GoRA, RaLoRA and LoRA-GA have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from harness.errors import Diverged, InputError
from harness.method import Backbone, Step, TrainData, as_matrix
from methods.shared.peft_names import ADAPTER

if TYPE_CHECKING:
    import torch
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


def weight_importance(layer: Any, gradient: Tensor) -> float:
    """mean|W o G| of a PEFT layer's frozen weight (GoRA, He et al., 2025). gradient: (outputs, inputs)."""
    import torch

    base = layer.get_base_layer()
    return float((as_matrix(base, base.weight.detach()) * gradient).abs().mean(dtype=torch.float64))


def allocate(
    importance: Mapping[str, float],
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    limits: tuple[int, int],
    cost: Literal["root", "sum"],
) -> dict[str, int]:
    """The rank of each layer by its share of the importance (GoRA, He et al., 2025).

    importance: at least 0. shapes: (outputs, inputs). rank: whose cost in all layers is the budget. limits: the least
    and the largest rank. cost: of a rank of a layer, sqrt(outputs + inputs) or the sum itself. Where nothing has an
    importance, as without a gradient, all layers have the rank of the budget.
    """
    costs = {name: sum(shape) if cost == "sum" else math.sqrt(sum(shape)) for name, shape in shapes.items()}
    known = importance if any(importance.values()) else costs
    budget, total = rank * sum(costs.values()), sum(known.values())
    ranks = {name: int(round(budget * known[name] / total) // each) for name, each in costs.items()}
    least, most = limits
    return {name: min(max(found, least), most, *shapes[name]) for name, found in ranks.items()}


def resize(layer: Any, rank: int, rng: torch.Generator, optimizer: torch.optim.Optimizer) -> None:
    """Give a PEFT layer this rank. A keeps its first rows, and new ones are drawn as those were: LoRA's uniform A does
    not depend on the rank."""
    import torch

    from methods.shared.optimizer_state import append, keep

    B, A = layer.lora_B[ADAPTER].weight, layer.lora_A[ADAPTER].weight
    first = torch.arange(min(rank, len(A)), device=A.device)
    new = rank - len(first)
    rows = (2 * torch.rand(new, *A.shape[1:], generator=rng) - 1) / math.sqrt(A[0].numel())
    for factor, dim, grown in ((A, 0, rows.to(A)), (B, 1, B.new_zeros(len(B), new, *B.shape[2:]))):
        keep(factor, first, dim, optimizer)
        append(factor, grown, dim, optimizer)
