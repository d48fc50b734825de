"""Which cells each sweep has: what `status` compares with the records. A file a sweep, below `results/sweeps/`."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from harness import registry
from harness.errors import InputError
from harness.record import RecordStore
from harness.spec import RunSpec


class Cell(NamedTuple):
    """One run of a sweep."""

    run_id: str
    method: str  # with the parameters that are not at their default
    task: str
    seed: int


def write(store: RecordStore, specs: Sequence[RunSpec]) -> None:
    """Note a sweep's cells; the same sweep given again is the same file, and the newest.

    Raises InputError where the folder cannot be written.
    """
    digest = hashlib.sha256(" ".join(sorted(spec.run_id for spec in specs)).encode()).hexdigest()[:12]
    path = store.sweeps / f"{digest}.jsonl"
    draft = path.with_name(f".{uuid.uuid4().hex}")
    try:
        with draft.open("w") as stream:
            for spec in specs:
                name = registry.label_of(spec.method, spec.method_parameters)
                cell = Cell(spec.run_id, name, spec.task, spec.seed)
                stream.write(json.dumps(cell) + "\n")
        draft.replace(path)
    except OSError as error:
        raise store.unwritable(error) from None


def newest(store: RecordStore) -> Path:
    """The file of the sweep that was started last. Raises InputError where there is none."""
    files = sorted(store.sweeps.glob("[!.]*.jsonl"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise InputError(f"--results '{store.results}' holds no sweep: sweeps are made by `python -m harness run`")
    return files[-1]


def cells(path: Path) -> Iterator[Cell]:
    """The cells of a sweep's file, one after the other."""
    with path.open() as stream:
        for line in stream:
            yield Cell(*json.loads(line))
