"""The optimizer that methods share: AdamW without decay of vectors, fused where torch has that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

EQUAL: Mapping[str, float] = MappingProxyType({})  # ratios: one learning rate for all


def adamw(
    model: nn.Module, learning_rate: float, weight_decay: float, ratios: Mapping[str, float] = EQUAL
) -> torch.optim.Optimizer:
    """AdamW over the model's trainable parameters; biases, norms and other vectors are not decayed. `ratios`: see
    `parameter_groups`."""
    import torch

    groups = parameter_groups(model, learning_rate, weight_decay, ratios)
    return torch.optim.AdamW(groups, lr=learning_rate, fused=can_fuse(groups))


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, ratios: Mapping[str, float] = EQUAL
) -> list[dict[str, Any]]:
    """`decay_groups` of the model, each with its learning rate.

    ratios: part of a parameter's name -> what the learning rate is multiplied by there, above 0, as {".lora_B.": 16.0}
    (LoRA+, Hayou et al., 2024, arXiv 2402.12354); of several parts that fit, the first. Schedules and checkpoints keep
    the ratios. Raises ValueError for a part that is in no trainable parameter's name.
    """
    by_ratio: dict[str | None, list[nn.Parameter]] = {None: []} | {part: [] for part in ratios}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_ratio[next((part for part in ratios if part in name), None)].append(parameter)
    for part in ratios:
        if not by_ratio[part]:
            raise ValueError(f"no trainable parameter's name holds '{part}'")
    return [
        group | {"lr": learning_rate * (1.0 if part is None else ratios[part])}
        for part, parameters in by_ratio.items()
        for group in decay_groups(parameters, weight_decay)
    ]


def can_fuse(groups: Iterable[dict[str, Any]]) -> bool:
    """Whether torch has its fused AdamW for these (not on meta): on a CPU 20 times as fast for small matrices."""
    return all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of the trainable ones: matrices, decayed, and vectors, not decayed; no empty group."""
    trained = [p for p in parameters if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
