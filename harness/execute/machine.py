"""What a machine or a cluster can be asked before Ray starts and before anything is written.

Ray's own count has the last word, see `harness.execute.cluster`.
"""

from __future__ import annotations

import os
import socket

from harness.errors import InputError
from harness.spec import Execution

CONNECT_SECONDS = 5.0  # for a cluster's address to answer


def check(execution: Execution, threads: int) -> None:
    """Raises InputError where the machine has not what a run asks for, or where no cluster can be at the address."""
    if execution.address is not None:
        if execution.address != "auto":
            check_address(execution.address)
        return
    cpus, gpus = usable_cpus(), execution.gpus_per_run
    if threads > cpus:
        raise InputError(f"--threads {threads} is more than there is: this machine has {cpus} CPUs")
    if gpus:
        import torch

        if not torch.cuda.is_available():
            has = f"this machine has {cpus} CPUs and no GPU"
            raise InputError(f"--gpus-per-run {gpus:g} is more than there is: {has}")


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_address(address: str) -> None:
    """Ray itself would try for minutes. Raises InputError where nothing answers."""
    host, _, port = address.rpartition(":")
    number = int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else 0
    if not host or "/" in address or not 1 <= number <= 65535:
        raise InputError(f"--address '{address}' is not allowed: give auto, or HOST:PORT (Ray's port is 6379)")
    try:
        socket.create_connection((host, number), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:  # ValueError: a name that no machine can have
        raise InputError(f"--address '{address}': nothing answers there ({error}); is the cluster's head up?") from None
