"""Which cells each sweep has: what `status` compares with the records. A file a sweep, below `results/sweeps/`: a line
that seals the others, then a line a cell."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from harness import registry, storage
from harness.errors import InputError
from harness.record import processes
from harness.record.record import RUN_ID
from harness.record.store import RecordStore
from harness.spec import RunSpec
from harness.storage import Damaged

SCHEMA = 3  # from 3 on, cells may wait for others


class Cell(NamedTuple):
    """One run of a sweep."""

    run_id: str  # "" while it depends on a search that has not ended
    method: str  # with the parameters that are not at their default
    task: str
    seed: int
    waits_for: str = ""  # the methods whose runs have to end first


def write(store: RecordStore, specs: Sequence[RunSpec], waiting: Sequence[Cell] = ()) -> None:
    """Note a sweep's cells, those to carry out now and those that wait for them; the same sweep given again is the
    same file, and the newest.

    Raises Unwritable where the folder cannot be written, and Unreadable where a newer version has written this sweep.
    """
    labels: dict[str, str] = {}

    def label(spec: RunSpec) -> str:
        key = json.dumps([spec.method, spec.method_parameters])
        if key not in labels:
            labels[key] = registry.label_of(spec.method, spec.method_parameters)
        return labels[key]

    cells = [*(Cell(spec.run_id, label(spec), spec.task, spec.seed) for spec in specs), *waiting]
    lines = "".join(json.dumps(cell) + "\n" for cell in cells)
    digest = hashlib.sha256(" ".join(sorted(cell.run_id for cell in cells)).encode()).hexdigest()[:12]
    path = store.sweeps / f"{digest}.jsonl"
    with contextlib.suppress(FileNotFoundError, Damaged):
        _sealed_sum(path)  # refuses that of a newer version
    seal = storage.seal({storage.VERSION: SCHEMA, "cells": hashlib.sha256(lines.encode()).hexdigest()})
    draft = store.running / processes.own_name("sweep", "cells")
    with store.writing():
        try:
            draft.write_text(json.dumps(seal) + "\n" + lines)
            draft.replace(path)
        finally:
            storage.remove(draft)


def newest(store: RecordStore) -> tuple[list[Cell], list[str]]:
    """The cells of the sweep that was started last, and a line about each newer file that is not whole.

    Raises InputError where there is none, and Unreadable for one of a newer version.
    """
    garbled: list[str] = []
    for path in sorted(store.sweeps.glob("[!.]*.jsonl"), key=_changed, reverse=True):
        try:
            return cells(path), garbled
        except FileNotFoundError:  # it has just been removed
            continue
        except Damaged as error:
            garbled.append(str(error))
    unusable = f" that can be read ({'; '.join(garbled)})" if garbled else ""
    raise InputError(
        f"--results '{store.results}' holds no sweep{unusable}: sweeps are made by `python -m harness run`"
    )


def cells(path: Path) -> list[Cell]:
    """The cells of a sweep's file. Raises Damaged where it is not what was written, and Unreadable."""
    expected = _sealed_sum(path)
    with _opened(path) as stream:
        stream.readline()
        lines = stream.readlines()
    if hashlib.sha256(b"".join(lines)).hexdigest() != expected:
        raise Damaged(f"the checksum of sweep file '{path}' is not that of its cells")
    try:
        found = [Cell(*json.loads(line)) for line in lines]
        if all(RUN_ID.fullmatch(cell.run_id) or (cell.waits_for and not cell.run_id) for cell in found):
            return found
    except (ValueError, TypeError, RecursionError):
        pass
    raise Damaged(f"sweep file '{path}' has a line that is no cell")


def _sealed_sum(path: Path) -> Any:
    """SHA-256 of the cells, as the first line has it. Raises FileNotFoundError, Damaged and Unreadable."""
    with _opened(path) as stream:
        return storage.unseal(stream.readline(), SCHEMA, f"sweep file '{path}'").get("cells")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with path.open("rb") as stream:
            yield stream
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Damaged(f"sweep file '{path}' cannot be read ({error.strerror})") from None


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # it has just been replaced
        return 0.0
