"""One run after the other, in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from harness.execute.once import run_once
from harness.execute.protocol import Execute, wait_for_others
from harness.record.store import RecordStore
from harness.spec import Execution, RunSpec

if TYPE_CHECKING:
    from harness.execute.view import View


@contextmanager
def session(execution: Execution) -> Iterator[Execute]:
    """See `harness.execute.protocol.Execute`."""

    def execute(specs: Sequence[RunSpec], store: RecordStore, view: View) -> None:
        missing = list(specs)
        while missing:
            busy = [spec for spec in missing if not _carried_out(spec, store, view, execution.max_retries)]
            missing = wait_for_others(busy, store, view)

    yield execute


def _carried_out(spec: RunSpec, store: RecordStore, view: View, max_retries: int) -> bool:
    """Make the run's record; False where another process has it in progress."""
    for attempt in range(max_retries + 1):
        record = run_once(spec, store, view.step)
        if record is None:
            return False
        if not record.may_do_better or attempt == max_retries:
            view.ended(record)
            return True
        view.retried(spec, record.error or "", attempt + 1, max_retries)
    raise AssertionError("unreachable")
