"""Ways to carry out runs. Each module has a `session`, which gives a function that carries out a list of them.

The two make equal records: what decides a result is in the RunSpec, and `harness.run.run_once` does the work.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from harness import running
from harness.spec import Execution, RunSpec

if TYPE_CHECKING:
    from harness.progress import View
    from harness.record_store import RecordStore

WAIT_SECONDS = 2.0  # between looks at runs that another process is at
RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a run without a GPU sees none, else all would be on the first
}
RAY_OF_OUR_OWN = {  # for a cluster that is started here
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # its servers bind to localhost alone
    "RAY_worker_niceness": "0",  # 15 would starve the workers wherever anything else runs
}


class Execute(Protocol):
    """Carry out runs: their records are in the store when this returns, and the view was told of each.

    A run that fails is taken up again, from its last checkpoint, `max_retries` times. A run that another process is at
    is waited for.
    """

    def __call__(self, specs: Sequence[RunSpec], store: RecordStore, view: View) -> None: ...


def session(execution: Execution, threads: int, device: str) -> AbstractContextManager[Execute]:
    """The executor that `execution` names, for runs of `threads` threads each on `device`, a torch device's name.

    Raises InputError where the machine or the cluster has not what a run asks for.
    """
    if execution.executor == "serial":
        from harness.executors import serial

        return serial.session(execution)
    for name, value in (RAY if execution.address else RAY | RAY_OF_OUR_OWN).items():
        os.environ.setdefault(name, value)
    from harness.executors import ray  # takes seconds, and reads the environment

    return ray.session(execution, threads, device)


def wait_for_others(busy: Sequence[RunSpec], store: RecordStore, view: View) -> list[RunSpec]:
    """Wait until another process has let go of one of its runs. Returns those that are still to be made."""
    if busy:
        holders = sorted({running.holder(store.running, spec.run_id) for spec in busy})
        view.note(f"waiting for {len(busy)} runs that {', '.join(holders)} {'is' if len(holders) == 1 else 'are'} at")
    while busy and all(running.progress(store.running, spec.run_id) for spec in busy):
        time.sleep(WAIT_SECONDS)
    missing = []
    for spec in busy:
        record = store.read(spec.run_id)
        if record is None:
            missing.append(spec)
        else:
            view.ended(record)
    return missing
