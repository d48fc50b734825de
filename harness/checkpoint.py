"""Whole-state checkpoints: nested dicts and lists of tensors and JSON values as safetensors plus JSON, no pickle."""

from __future__ import annotations

import errno
import json
import shutil
import uuid
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from harness.errors import InputError
from harness.parameters import flattened

KEPT = 2  # the newest checkpoints of a run that stay on disk
TENSORS, STATE, ORIGIN, SUMS = "tensors.safetensors", "state.json", "origin.json", "sums.json"


def save(folder: Path, batches: int, state: dict[str, Any], origin: dict[str, Any] | None = None) -> None:
    """Write `folder/<batches>/` in one rename and drop all but the newest KEPT.

    `origin`: nested JSON values that say what the state belongs to; `load_newest` refuses any other. Where another
    process was faster, its checkpoint stays: of one run, all are equal.
    """
    draft = folder / f".draft-{uuid.uuid4().hex}"
    draft.mkdir(parents=True)
    try:
        tensors: dict[str, torch.Tensor] = {}
        structure = _flatten(state, tensors)
        save_file(tensors, draft / TENSORS)
        (draft / STATE).write_text(json.dumps(structure))
        (draft / ORIGIN).write_text(json.dumps(origin or {}))
        (draft / SUMS).write_text(json.dumps(_sums(draft)))
        place = folder / f"{batches:09d}"
        shutil.rmtree(place, ignore_errors=True)
        draft.rename(place)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    for old in _folders(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


class Newest(NamedTuple):
    """The newest checkpoint that is whole, and the newer ones that are not."""

    state: dict[str, Any] | None  # None where there is none
    damaged: list[Path]


def load_newest(folder: Path, origin: dict[str, Any] | None = None) -> Newest:
    """Read the newest checkpoint that is whole.

    Raises InputError, naming the difference, for a checkpoint of another origin.
    """
    damaged: list[Path] = []
    for path in reversed(_folders(folder)):
        if _is_whole(path):
            _check(path, json.loads((path / ORIGIN).read_bytes()), json.loads(json.dumps(origin or {})))
            state = _unflatten(json.loads((path / STATE).read_bytes()), load_file(path / TENSORS))
            assert isinstance(state, dict)
            return Newest(state, damaged)
        damaged.append(path)
    return Newest(None, damaged)


def _is_whole(path: Path) -> bool:
    """Whether no file is missing or garbled; where one is, the checkpoint before will do."""
    try:
        return bool(_sums(path) == json.loads((path / SUMS).read_bytes()))
    except (OSError, ValueError):
        return False


def _sums(path: Path) -> dict[str, int]:
    """A checksum of each file: a flipped bit in a tensor would otherwise go into a result."""
    return {name: zlib.crc32((path / name).read_bytes()) for name in (TENSORS, STATE, ORIGIN)}


def _check(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    found, wanted = flattened(theirs), flattened(ours)
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise InputError(
                f"checkpoint '{path}' was made with {name} = {found.get(name)}, this run has {wanted.get(name)}: "
                f"delete '{path.parent}' to begin the run anew"
            )


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
