"""Runs from before a method could name another configuration, told which runs they took ranks or sizes from.

A results folder may hold `parents.json`: {"takes": {"ranks_of": ["ranks", "rank_pattern"]}, "parents": {run_id:
{"ranks_of": run_id of the parent}}}. In tables such a run is what `lora[ranks_of=LABEL]` would be now: "takes" names
the parameters that followed from other runs, and which its row leaves out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from harness.errors import InputError
from harness.notation import label
from harness.record.record import RunRecord
from harness.record.store import RecordStore
from harness.report.board.labels import Naming

PARENTS = "parents.json"


def grouped(store: RecordStore, records: Iterable[RunRecord], naming: Naming) -> list[RunRecord]:
    """The records, for tables: those that `parents.json` knows with labels in place of what they took.

    Raises InputError for a file that is not of this form.
    """
    records = list(records)
    path = store.results / PARENTS
    if not path.is_file():
        return records
    known = {record.run_id: record for record in records}
    try:
        content = json.loads(path.read_bytes())
        takes, parents = dict(content["takes"]), dict(content["parents"])
        children = dict(_children(store, known, naming, takes, parents))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"'{path}' is no map from runs to their parents: {type(error).__name__}: {error}") from None
    return [children.get(record.run_id, record) for record in records]


def _children(
    store: RecordStore, known: dict[str, RunRecord], naming: Naming, takes: dict[str, Any], parents: dict[str, Any]
) -> Iterator[tuple[str, RunRecord]]:
    labels: dict[str, str] = {}
    for run_id, of_run in parents.items():
        if run_id not in known:
            continue
        named = {}
        for parameter, parent in of_run.items():
            if parent not in labels:
                found = known.get(parent) or store.read(parent)
                labels[parent] = parent if found is None else _label(found, naming)
            named[parameter] = labels[parent]
        record = known[run_id]
        taken = {name for parameter in of_run for name in takes[parameter]}
        own = {name: value for name, value in record.spec.method_parameters.items() if name not in taken}
        spec = record.spec.model_copy(update={"method_parameters": own | named, "parents": dict(of_run)})
        yield run_id, record.model_copy(update={"spec": spec})


def _label(record: RunRecord, naming: Naming) -> str:
    """The configuration as its row has it, without what a search chose."""
    spec = record.spec
    searched = spec.search.parameters if spec.search else ()
    parameters = {name: value for name, value in spec.method_parameters.items() if name not in searched}
    return label(spec.method, naming[spec.method](parameters) if spec.method in naming else {})
