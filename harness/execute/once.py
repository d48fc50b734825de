"""One run, made by one process at a time and once."""

from __future__ import annotations

from harness.record import locks
from harness.record.locks import Progress
from harness.record.record import RETRIED, RunRecord
from harness.record.store import RecordStore
from harness.run.run import Watch, run_one
from harness.spec import RunSpec
from harness.storage import Unwritable


def run_once(
    spec: RunSpec, store: RecordStore, watch: Watch = lambda progress: None, sweep: str = ""
) -> RunRecord | None:
    """`run_one`, unless another process has this run in progress (None) or has finished it since it was planned.

    `sweep`: of the driver that this process works for. Raises Unwritable where the results folder cannot be written,
    and Unreadable where it holds a record of this run that must not be written over.
    """
    with store.writing(), locks.locked(store.running, spec.run_id, sweep) as lock:
        if lock is None:
            return None
        store.clear(spec.run_id)

        def tell(progress: Progress) -> None:
            lock.tell(progress)
            watch(progress)

        found = _finished(spec, store)
        try:
            return found or run_one(spec, store, tell)
        except Unwritable as error:
            # Where another process could not see that this one lives, it may have made the run meanwhile, or cleared
            # away what this one had begun.
            if not error.is_gone or not store.running.is_dir():
                raise
            return _finished(spec, store) or run_one(spec, store, tell)


def _finished(spec: RunSpec, store: RecordStore) -> RunRecord | None:
    found = store.read(spec.run_id)
    return found if found is not None and found.status not in RETRIED else None
