"""Adapters that stock PEFT cannot hold, in files of this package's own: NAME.json, sealed, and trained.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from harness.errors import InputError
from harness.storage import VERSION, Damaged, file_sum, save_tensors, seal, unseal

WEIGHTS = "trained.safetensors"
SCHEMA = 1  # of NAME.json


def save(path: Path, name: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write settings, JSON values by name, and tensors into the folder `path`. Raises OSError where it cannot be
    written."""
    path.mkdir(parents=True, exist_ok=True)
    save_tensors({key: value.detach().contiguous() for key, value in tensors.items()}, path / WEIGHTS)
    content = {VERSION: SCHEMA, **settings, WEIGHTS: file_sum(path / WEIGHTS)}
    (path / f"{name}.json").write_text(json.dumps(seal(content), indent=2) + "\n")


def read(path: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `save` wrote. Raises InputError, in one line, where it is not there, or not as it was written."""
    config, weights = path / f"{name}.json", path / WEIGHTS
    try:
        for file in (config, weights):
            if not file.is_file():
                raise Damaged(f"'{file}' is not there or no regular file")
        settings = unseal(config.read_bytes(), SCHEMA, f"'{config}'")
        if settings.get(WEIGHTS) != file_sum(weights):
            raise Damaged(f"the checksum of '{weights}' is not the one in '{config}'")
        tensors = load_file(weights)
        for key, value in tensors.items():
            if not torch.isfinite(value).all():
                raise Damaged(f"'{key}' in '{weights}' holds numbers that are not finite")
    except (OSError, Damaged, SafetensorError, RecursionError) as error:
        told = " ".join(str(error).split())
        raise InputError(f"'{path}' holds no exported {name} adapter that can be read: {told}") from None
    return settings, tensors
