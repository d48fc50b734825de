"""The model that is adapted, and which of its layers adapters may change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from harness.errors import InputError, unknown

if TYPE_CHECKING:
    from torch import Tensor, nn

BackboneDtype = Literal["fp32", "bf16", "fp16", "int8", "nf4"]  # see harness.backbone_dtype
PACKED: tuple[BackboneDtype, ...] = ("int8", "nf4")  # weights are no tensors of their layer's shape
FLOATS: tuple[BackboneDtype, ...] = ("fp32", "bf16", "fp16")
EVERY_DTYPE: tuple[BackboneDtype, ...] = (*FLOATS, *PACKED)

# What turns gradient checkpointing on, and its arguments: transformers of today, of before 5.23, and diffusers.
CHECKPOINTING: dict[str, tuple[dict[str, bool], ...]] = {
    "activation_checkpointing_enable": ({"use_reentrant": False},),
    "gradient_checkpointing_enable": ({"use_reentrant": False},),
    "enable_gradient_checkpointing": (),
}


@dataclass
class Backbone:
    """The model that a task hands to a method, not yet adapted.

    module: the whole model, head included; on the meta device during a dry run.
    head:   qualified names of the submodules that are new for the task; every method trains them.
    layers: qualified names of the layers that adapters may change (see `is_adaptable`), head excluded.
    dtype:  what the frozen weights are held in, the head's excepted. Packed ones are read by `weight_shape` and
            `number_of` alone; on the meta device they are not packed.
    """

    module: nn.Module
    head: tuple[str, ...]
    layers: tuple[str, ...]
    dtype: BackboneDtype = "fp32"

    def targets(self, patterns: tuple[str, ...] | None) -> tuple[str, ...]:
        """The layers whose qualified name is, or ends in, one of `patterns` ("query", "attention.output.dense");
        all of them for None. Raises InputError where a pattern matches no layer."""
        if patterns is None:
            return self.layers
        chosen: set[str] = set()
        for pattern in patterns:
            found = [name for name in self.layers if f".{name}".endswith(f".{pattern}")]
            if not found:
                raise self._no_target(pattern)
            chosen.update(found)
        return tuple(name for name in self.layers if name in chosen)

    def shape(self, layer: str) -> tuple[int, int]:
        """(outputs, inputs) of the layer's weight as `as_matrix` gives it."""
        module = self.module.get_submodule(layer)
        outputs, *others = weight_shape(module)
        sides = outputs, math.prod(others)
        return sides[::-1] if is_transposed(module) else sides

    def without_layers(self, wanted: str = "linear or convolution layer", to: str = "adapt") -> str:
        """The reason of a cell whose method finds nothing to adapt: it names the kinds of layers that there are."""
        kinds = {
            type(part).__name__: None
            for name, part in self.module.named_modules()
            if any(p.dim() > 1 for p in part.parameters(recurse=False)) and not in_modules(f"{name}.", self.head)
        }
        return f"the backbone has no {wanted} to {to}: its layers are of kind {', '.join(kinds)}"

    def check_rank(self, rank: int, targets: tuple[str, ...], parameter: str = "rank") -> None:
        """Raises InputError where `rank`, which the method calls `parameter`, is above the smaller side of a layer."""
        for layer in targets:
            smaller = min(self.shape(layer))
            if rank > smaller:
                raise InputError(
                    f"{parameter} = {rank} is above the smaller side of layer '{layer}': allowed is 1 to {smaller}",
                    parameter,
                )

    def checkpoint_activations(self) -> None:
        """Let the model's blocks compute their activations again in a backward pass instead of keeping them (gradient
        checkpointing, Chen et al., 2016, arXiv 1604.06174). Random numbers are those of the first pass, and losses and
        gradients stay bit-equal; equal but for rounding where transformers would put a decoder's keys and values into
        a cache in training, which it then does not. Raises InputError for a model whose library has not provided for
        it."""
        module: Any = self.module
        name = next((name for name in CHECKPOINTING if hasattr(module, name)), None)
        try:
            if name is None:
                raise ValueError
            getattr(module, name)(*CHECKPOINTING[name])
        except ValueError:
            raise InputError(f"{type(module).__name__} has no gradient checkpointing") from None
        if hasattr(module, "disable_input_require_grads"):  # needed by the reentrant kind alone; else a cost, of `head`
            module.disable_input_require_grads()  # a backward pass through the whole backbone

    def _no_target(self, pattern: str) -> InputError:
        """What is wrong with a pattern that matches no layer: the kind of what it names, or what comes near it."""
        kinds = {type(self.module.get_submodule(name)).__name__ for name in self.layers}
        for name, part in self.module.named_modules():
            if f".{name}".endswith(f".{pattern}") and (kind := type(part).__name__) not in kinds:
                adapted = ", ".join(sorted(kinds))
                return InputError(f"target module '{pattern}' is of kind {kind}; adapted are {adapted}", pattern)
        return unknown("target module", pattern, {name.rsplit(".", 1)[-1] for name in self.layers})

    def head_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(qualified name, parameter) of the head."""
        return ((name, p) for name, p in self.module.named_parameters() if in_modules(name, self.head))

    def freeze(self) -> None:
        """Have the head alone train."""
        self.module.requires_grad_(False)
        for _, parameter in self.head_parameters():
            parameter.requires_grad_(True)


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer is linear with a weight of (inputs, outputs): transformers' Conv1D, which GPT-2 has."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of the layer's weight, also where it is packed."""
    from torch import nn

    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return tuple(layer.get_parameter("weight").shape)


def number_of(parameter: Tensor) -> int:
    """How many numbers a parameter holds: nf4 packs two of them into a byte."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else math.prod(packed.shape)


def as_matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """The layer's weight, or its gradient, as (outputs, inputs): a view of a linear one, transposed or not; a kernel
    is flattened to C_out x (C_in kH kW)."""
    return weight.T if is_transposed(layer) else weight.flatten(1)


def is_adaptable(layer: nn.Module) -> bool:
    """Whether adapters may change the layer: `nn.Linear`, transformers' Conv1D (the same, transposed), `nn.Conv2d`."""
    from torch import nn

    return isinstance(layer, nn.Linear | nn.Conv2d) or is_transposed(layer)


def in_modules(parameter: str, modules: Iterable[str]) -> bool:
    """Whether a parameter's qualified name lies in one of `modules`, also below a wrapper's prefix."""
    return any(f".{module}." in f".{parameter}" for module in modules)
