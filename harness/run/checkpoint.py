"""Whole-state checkpoints: nested dicts and lists of tensors and JSON values as safetensors plus JSON, no pickle."""

from __future__ import annotations

import errno
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from harness import storage
from harness.errors import InputError
from harness.parameters import flattened
from harness.record import processes
from harness.record.environment import environment
from harness.spec import RunSpec

KEPT = 2  # the newest checkpoints of a run that stay on disk
SCHEMA = 2
TENSORS, STATE, ORIGIN, SUMS = "tensors.safetensors", "state.json", "origin.json", "sums.json"


class Unusable(Exception):
    """A checkpoint that is what was written, and does not fit the run that it is for."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"checkpoint '{path}' does not fit its run")
        self.path = path


def origin_of(spec: RunSpec) -> dict[str, Any]:
    """What a checkpoint belongs to: a run, and the versions that would carry it on."""
    made = environment("cpu")
    return {"spec": spec.model_dump(mode="json", exclude={"place"}), "harness": made.harness, "version": made.packages}


def save(folder: Path, batches: int, state: dict[str, Any], origin: dict[str, Any] | None = None) -> None:
    """Write `folder/<batches>/` in one rename and drop all but the newest KEPT.

    `origin`: nested JSON values that say what the state belongs to; `load_newest` refuses any other. Where another
    process was faster, its checkpoint stays: of one run, all are equal. Raises OSError where the disk is full.
    """
    draft = folder / processes.own_name(".checkpoint", "draft")
    draft.mkdir(parents=True)
    try:
        tensors: dict[str, torch.Tensor] = {}
        structure = _flatten(state, tensors)
        storage.save_tensors(tensors, draft / TENSORS)
        (draft / STATE).write_text(json.dumps(structure))
        (draft / ORIGIN).write_text(json.dumps(origin or {}))
        sums = {storage.VERSION: SCHEMA, "files": storage.file_sums(draft)}
        (draft / SUMS).write_text(storage.sealed_text(sums))
        place = folder / f"{batches:09d}"
        storage.remove(place)
        draft.rename(place)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    finally:
        storage.remove(draft)
    for old in _folders(folder)[:-KEPT]:
        storage.remove(old)


class Newest(NamedTuple):
    """The newest checkpoint that is whole, and the newer ones that are not."""

    state: dict[str, Any] | None  # None where there is none
    damaged: list[Path]
    path: Path | None  # of the state

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of those that are not whole, a line."""
        names = ", ".join(path.name for path in self.damaged)
        after = "anew" if self.state is None else "from the one before"
        return (f"damaged checkpoint {names} passed over: the run began {after}",) if self.damaged else ()


def load_newest(folder: Path, origin: dict[str, Any] | None = None, without: Collection[Path] = ()) -> Newest:
    """Read the newest checkpoint that is whole; those of `without` count as damaged.

    Raises InputError, naming the difference, for a checkpoint of another origin, and Unreadable for one of a newer
    version.
    """
    damaged: list[Path] = []
    for path in reversed(_folders(folder)):
        if path not in without and _is_whole(path):
            _check(path, json.loads((path / ORIGIN).read_bytes()), json.loads(json.dumps(origin or {})))
            try:
                state = _unflatten(json.loads((path / STATE).read_bytes()), load_file(path / TENSORS))
            except (KeyError, TypeError, ValueError, RecursionError, SafetensorError):  # not as `save` writes it
                state = None
            if isinstance(state, dict):
                return Newest(state, damaged, path)
        damaged.append(path)
    return Newest(None, damaged, None)


def _is_whole(path: Path) -> bool:
    """Whether no file is missing or garbled; where one is, the checkpoint before will do. Raises Unreadable."""
    try:
        sums = storage.unseal((path / SUMS).read_bytes(), SCHEMA, f"checkpoint '{path}'")
        return bool({name: storage.file_sum(path / name) for name in (TENSORS, STATE, ORIGIN)} == sums.get("files"))
    except storage.Unreadable:
        raise
    except (OSError, ValueError):
        return False


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
    storage.remove(folder)


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
