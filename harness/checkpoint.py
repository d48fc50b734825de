"""Whole-state checkpoints: nested dicts and lists of tensors and JSON values as safetensors plus JSON, no pickle."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from harness.errors import InputError

KEPT = 2  # the newest checkpoints of a run that stay on disk


def save(folder: Path, batches: int, state: dict[str, Any]) -> None:
    """Write `folder/<batches>/` in one rename and drop all but the newest KEPT."""
    draft = folder / f".draft-{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    structure = _flatten(state, tensors)
    save_file(tensors, draft / "tensors.safetensors")
    (draft / "state.json").write_text(json.dumps(structure))
    place = folder / f"{batches:09d}"
    shutil.rmtree(place, ignore_errors=True)
    draft.rename(place)
    for old in _folders(folder)[:-KEPT]:
        shutil.rmtree(old)


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint's state, or None where there is none. Raises InputError for a damaged one."""
    folders = _folders(folder)
    if not folders:
        return None
    path = folders[-1]
    try:
        structure = json.loads((path / "state.json").read_text())
        state = _unflatten(structure, load_file(path / "tensors.safetensors"))
    except Exception as error:
        raise InputError(
            f"checkpoint '{path}' cannot be read ({error}): delete it to start from the one before"
        ) from error
    assert isinstance(state, dict)
    return state


def delete(folder: Path) -> None:
    """Remove a finished run's checkpoints."""
    shutil.rmtree(folder, ignore_errors=True)


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _flatten(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON with every tensor replaced by its key in `tensors`; dicts become lists of pairs, since optimizer state
    has integer keys."""
    if isinstance(value, torch.Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": key}
    if isinstance(value, dict):
        return {"pairs": [[key, _flatten(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_flatten(item, tensors) for item in value]
    return value


def _unflatten(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _unflatten(item, tensors) for key, item in value["pairs"]}
    if isinstance(value, list):
        return [_unflatten(item, tensors) for item in value]
    return value
