"""What an executor is, and how one waits for runs that another process has in progress."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from harness.record import locks
from harness.spec import RunSpec

if TYPE_CHECKING:
    from harness.execute.view import View
    from harness.record.store import RecordStore

WAIT_SECONDS = 2.0  # between looks at runs of other processes


class Execute(Protocol):
    """Carry out runs: their records are in the store when this returns, and the view was told of each.

    A run that fails is resumed from its last checkpoint, `max_retries` times. A run that another process has in
    progress is waited for.
    """

    def __call__(self, specs: Sequence[RunSpec], store: RecordStore, view: View) -> None: ...


def wait_for_others(busy: Sequence[RunSpec], store: RecordStore, view: View) -> list[RunSpec]:
    """Wait until another process has let go of one of its runs. Returns those that are still to be made."""
    if busy:
        holders = sorted({locks.holder(store.running, spec.run_id) for spec in busy})
        view.note(f"waiting for {len(busy)} runs in progress elsewhere: {', '.join(holders)}")
    while busy and all(locks.progress(store.running, spec.run_id) for spec in busy):
        time.sleep(WAIT_SECONDS)
    missing = []
    for spec in busy:
        record = store.read(spec.run_id)
        if record is None:
            missing.append(spec)
        else:
            view.ended(record)
    return missing
