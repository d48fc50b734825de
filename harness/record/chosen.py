"""The records of a results folder that a command is asked about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.errors import unknown
from harness.record.garbage import uncollected
from harness.record.store import Found, RecordStore


def chosen(
    results: Path, methods: Sequence[str] | None = None, tasks: Sequence[str] | None = None
) -> tuple[RecordStore, Found]:
    """The store and its records of these methods and tasks (None: all). Raises InputError for names without records."""
    store = RecordStore.existing(results)
    with uncollected():
        records, damaged = store.read_all()
    if methods and records:
        _check("method", methods, {record.spec.method for record in records})
        records = [record for record in records if record.spec.method in methods]
    if tasks and records:
        _check("task", tasks, {record.spec.task for record in records} | {r.spec.task.split("/")[0] for r in records})
        records = [r for r in records if r.spec.task in tasks or r.spec.task.split("/")[0] in tasks]
    return store, Found(records, damaged)


def _check(kind: str, given: Sequence[str], present: set[str]) -> None:
    for name in given:
        if name not in present:
            raise unknown(f"{kind} among the records", name, present)
