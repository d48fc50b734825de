"""`diff`: how two runs differ."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tabulate import tabulate

from harness.parameters import flattened
from harness.record.record import RunRecord
from harness.record.store import RecordStore
from harness.report.redact import one_line

SECTIONS = ("spec", "environment", "status", "headline", "score", "metrics", "holdout", "parameters", "ranks")  # first
WIDTH, LONGEST = 40, 200  # signs of a value, of a name


def command(results: Path, first: str, second: str) -> int:
    """Print what differs between two runs, by the part of the record. Raises InputError for an unknown run."""
    store = RecordStore.existing(results)
    records = store.find(first), store.find(second)
    rows = list(differences(*records))
    if rows:
        print(tabulate(rows, ["", first, second], disable_numparse=True))
    else:
        print(f"{first} and {second} have the same spec, versions, metrics and ranks")
    return 0


def differences(first: RunRecord, second: RunRecord) -> Iterator[tuple[str, str, str]]:
    """(name, first value, second value) of everything that is not equal: spec, environment, result, ranks."""
    parts = [_parts(record) for record in (first, second)]
    sections = list(dict.fromkeys([*SECTIONS, *(name.split(".")[0] for part in parts for name in part)]))
    names = dict.fromkeys([*parts[0], *parts[1]])
    for name in sorted(names, key=lambda name: sections.index(name.split(".")[0])):
        values = [part.get(name) for part in parts]
        if values[0] != values[1]:
            yield _short(name, LONGEST), _text(values[0]), _text(values[1])


def _parts(record: RunRecord) -> dict[str, Any]:
    values = record.model_dump(mode="json", exclude={"run_id", "schema_version", "traceback", "started"})
    return flattened({name: values.pop(name) for name in SECTIONS} | values)


def _text(value: Any) -> str:
    return _short("-" if value is None else value if isinstance(value, str) else json.dumps(value))


def _short(text: str, width: int = WIDTH) -> str:
    text = one_line(text)
    return text if len(text) <= width else f"{text[: width - 3]}..."
