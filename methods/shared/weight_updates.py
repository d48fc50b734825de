"""Updates of whole weights, for methods whose update is no low-rank product: an export of our own, and its loader."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import InputError
from methods.shared import own_format

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "weight_updates"
ADDED = "added"  # names of the weights that what is stored is added to; the others take its place


def save(path: Path, updates: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Write the export, see `own_format.save`.

    updates: by the weight's name, in its shape. others: trained parameters that are kept whole, as the head's. Raises
    OSError where the folder cannot be written or the disk is full.
    """
    own_format.save(path, NAME, {ADDED: list(updates)}, {**updates, **others})


def load(module: nn.Module, path: Path) -> nn.Module:
    """Add the updates to the weights of a model that is as the adapted one was before training, in place, and give it
    with the trained head. Once: a second call would add them again.

    Raises InputError, in one line, where `path` holds no such export, where it is damaged, or where it does not fit the
    model; the model is then as it was.
    """
    import torch

    settings, tensors = own_format.read(path, NAME)
    own = dict(module.named_parameters())
    for name, value in tensors.items():
        if name not in own or own[name].shape != value.shape:
            there = f"is {tuple(own[name].shape)} there" if name in own else "is not there"
            raise InputError(f"the export in '{path}' does not fit the model: '{name}', {tuple(value.shape)}, {there}")
    with torch.no_grad():
        for name, value in tensors.items():
            (own[name].add_ if name in settings[ADDED] else own[name].copy_)(value.to(own[name]))
    return module
