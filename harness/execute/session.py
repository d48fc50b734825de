"""Which executor carries out runs: `serial` or `ray`. Each has a `session`, which gives an `Execute`.

The two make equal records: what decides a result is in the RunSpec, and `execute.once.run_once` does the work.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

from harness.execute.protocol import Execute
from harness.spec import Execution

RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a run without a GPU sees none, else all would be on the first
}
RAY_OF_OUR_OWN = {  # for a cluster that is started here
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # its servers bind to localhost alone
    "RAY_worker_niceness": "0",  # 15 would starve the workers wherever anything else runs
}


def session(execution: Execution, threads: int, device: str) -> AbstractContextManager[Execute]:
    """The executor that `execution` names, for runs of `threads` threads each on `device`, a torch device's name.

    Raises InputError where the machine or the cluster has not what a run asks for.
    """
    if execution.executor == "serial":
        from harness.execute import serial

        return serial.session(execution)
    for name, value in (RAY if execution.address else RAY | RAY_OF_OUR_OWN).items():
        os.environ.setdefault(name, value)
    from harness.execute import ray

    return ray.session(execution, threads, device)
