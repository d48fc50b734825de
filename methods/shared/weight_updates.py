"""Updates of whole weights, for methods whose update is no low-rank product: an export of our own, and its loader."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import InputError
from harness.storage import VERSION, Damaged, file_sum, save_tensors, seal, unseal

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG, WEIGHTS = "weight_updates.json", "trained.safetensors"
ADDED = "added"  # key of CONFIG: names of the weights that what is stored is added to; the others take its place
SCHEMA = 1  # of CONFIG


def save(path: Path, updates: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Write `trained.safetensors`, and `weight_updates.json`, which has its checksum and its own.

    updates: by the weight's name, in its shape. others: trained parameters that are kept whole, as the head's. Raises
    OSError where the folder cannot be written or the disk is full.
    """
    path.mkdir(parents=True, exist_ok=True)
    save_tensors({**updates, **others}, path / WEIGHTS)
    config = {VERSION: SCHEMA, ADDED: list(updates), WEIGHTS: file_sum(path / WEIGHTS)}
    (path / CONFIG).write_text(json.dumps(seal(config), indent=2) + "\n")


def load(module: nn.Module, path: Path) -> None:
    """Add the updates to the weights of a model that is as the adapted one was before training, in place, and give it
    the trained head. Once: a second call would add them again.

    Raises InputError, in one line, where `path` holds no such export, where it is damaged, or where it does not fit the
    model; the model is then as it was.
    """
    import torch

    try:
        added, tensors = _read(path)
    except (OSError, Damaged) as error:
        told = " ".join(str(error).split())
        raise InputError(f"'{path}' holds no exported weight updates that can be read: {told}") from None
    own = dict(module.named_parameters())
    for name, value in tensors.items():
        if name not in own or own[name].shape != value.shape:
            there = f"is {tuple(own[name].shape)} there" if name in own else "is not there"
            raise InputError(f"the export in '{path}' does not fit the model: '{name}', {tuple(value.shape)}, {there}")
    with torch.no_grad():
        for name, value in tensors.items():
            (own[name].add_ if name in added else own[name].copy_)(value.to(own[name]))


def _read(path: Path) -> tuple[frozenset[str], dict[str, Tensor]]:
    """(names of the weights that are added to, tensors by name). Raises Damaged, naming the file, or OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for file in (path / CONFIG, path / WEIGHTS):
        if not file.is_file():
            raise Damaged(f"'{file}' is not there or no regular file")
    config: dict[str, Any] = unseal((path / CONFIG).read_bytes(), SCHEMA, f"'{path / CONFIG}'")
    if config.get(WEIGHTS) != file_sum(path / WEIGHTS):
        raise Damaged(f"the checksum of '{path / WEIGHTS}' is not the one in '{path / CONFIG}'")
    try:
        tensors = load_file(path / WEIGHTS)
    except SafetensorError as error:
        raise Damaged(f"'{path / WEIGHTS}' is no safetensors file: {error}") from None
    return frozenset(config[ADDED]), tensors
