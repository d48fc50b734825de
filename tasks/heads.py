"""The head of a pretrained model: what belongs to it, a new one, or the checkpoint's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from harness.errors import InputError
from harness.method import in_modules

if TYPE_CHECKING:
    from torch import Tensor, nn


def beside_base(module: nn.Module, model: str) -> list[str]:
    """Names of the modules with parameters beside the base model. Raises InputError where there is no base model."""
    prefix = getattr(module, "base_model_prefix", "")
    children = dict(module.named_children())
    if prefix not in children:
        raise InputError(f"model '{model}' has no base model under its head; the task cannot tell one from the other")
    return [name for name, child in children.items() if name != prefix and has_numbers(child)]


def has_numbers(module: nn.Module) -> bool:
    """Whether the module has a parameter."""
    return next(module.parameters(), None) is not None


def draw_anew(module: nn.Module, model: str, missing: Iterable[str], unfit: Iterable[str], state: Tensor) -> None:
    """Give a checkpoint's classifier new parameters: those that the head would have if the checkpoint had none.

    missing, unfit: names of the parameters that the checkpoint lacks, or has in another shape; they were drawn already.
    state: torch's random state before that. Without an output layer in the checkpoint, what it has of the head is of
    its pretraining (ModernBERT's dense layer) and stays.
    """
    import torch

    names = [name for name, _ in module.named_parameters() if in_modules(name, beside_base(module, model))]
    missing = set(missing)
    if not names or names[-1] in missing:
        return
    loaded: Any = module
    new = {*names, *missing, *unfit}
    for part in loaded.modules():
        part._is_hf_initialized = False
    for name, tensor in (*loaded.named_parameters(), *loaded.named_buffers()):
        tensor._is_hf_initialized = name not in new
    torch.set_rng_state(state)
    loaded.initialize_weights()  # draws what is not marked, in transformers' own order


def keep_head(module: nn.Module, model: str, lacking: Iterable[str], own: Any, classes: Sequence[str]) -> None:
    """Put the rows of a checkpoint's own output layer into the order of `classes` (none: regression), by name.

    lacking: names of the parameters that the checkpoint does not have in this shape. own: its configuration. Raises
    InputError for a checkpoint without a head, or with other classes.
    """
    import torch

    head = beside_base(module, model)
    names = [own.id2label[number] for number in sorted(own.id2label)]
    places = {name.lower(): number for number, name in enumerate(names)}
    wanted = [name.lower() for name in classes]
    if len(classes) > 1 and (len(places) < len(names) or set(places) != set(wanted)):
        raise InputError(
            f"head = keep: model '{model}' has the classes {', '.join(names[:8])}, the task {', '.join(classes[:8])}: "
            "they should have the same names (id2label in config.json)",
            "head",
        )
    lost = [name for name in lacking if in_modules(name, head)]
    if lost or not head:
        raise InputError(f"head = keep: model '{model}' has no head of its own for this task", "head")
    if len(classes) < 2:
        return
    order = torch.tensor([places[name] for name in wanted])
    last = [name for name, _ in module.named_parameters() if in_modules(name, head)][-1].rpartition(".")[0]
    with torch.no_grad():
        for parameter in module.get_submodule(last).parameters():
            if not parameter.is_meta:
                parameter.copy_(parameter[order])
