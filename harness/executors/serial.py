"""One run after the other, in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from harness.record import RecordStore, RunRecord
from harness.run import Watch, run_one
from harness.spec import RunSpec


def execute(specs: Sequence[RunSpec], store: RecordStore, watch: Watch) -> Iterator[RunRecord]:
    """Yield the record of each run as it ends; the records are on disk by then."""
    for spec in specs:
        yield run_one(spec, store, watch)
