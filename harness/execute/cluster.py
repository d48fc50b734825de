"""The Ray cluster that runs are carried out on: one started on this machine, or one that is there."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from harness import storage
from harness.errors import InputError
from harness.execute.machine import check_address
from harness.record import processes
from harness.record.store import RecordStore
from harness.spec import Execution

LONGEST_PARENT = 24  # signs of the folder that holds Ray's own
PROBE_SECONDS = 60.0  # for every machine to say whether it sees the results folder


@contextmanager
def own_folder() -> Iterator[Path]:
    """A folder for the files of Ray and of Tune, which goes with this process; those of dead ones go now."""
    # Ray's sockets are in it, and a socket's path may have 107 signs.
    parent = Path(tempfile.gettempdir())
    parent = parent if len(str(parent)) <= LONGEST_PARENT else Path("/tmp")
    for owner in parent.glob("harness-ray-*/*-owner"):
        known = processes.owner_of(owner.name)
        if known is not None and known.state == "dead":
            storage.remove(owner.parent)
    folder = Path(tempfile.mkdtemp(prefix="harness-ray-", dir=parent))
    try:
        (folder / processes.own_name("sweep", "owner")).touch()
        yield folder
    finally:
        storage.remove(folder)


def connect(execution: Execution, folder: Path) -> None:
    """Start Ray with its files in `folder`, or join a cluster. Raises InputError where there is no such cluster."""
    address = execution.address
    if address not in (None, "auto"):
        check_address(address)
    handler = signal.getsignal(signal.SIGTERM)
    level = logging.INFO if execution.show_logs else logging.CRITICAL
    try:
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            log_to_driver=execution.show_logs,
            logging_level=level,
            **({} if address or "RAY_TMPDIR" in os.environ else {"_temp_dir": str(folder / "ray")}),
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        if address is None:
            raise InputError(f"Ray cannot be started here ({reason}); --executor serial does without") from None
        raise InputError(f"--address '{address}' cannot be joined ({reason}); `ray status` shows a cluster") from None
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray puts its own in place


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def bundle(execution: Execution, threads: int, device: str) -> dict[str, float]:
    """The resources of one run. Raises InputError where no machine has them."""
    most = {name: max(node["Resources"].get(name, 0) for node in _nodes()) for name in ("CPU", "GPU")}
    where = "this machine" if execution.address is None else f"the largest of the cluster's {len(_nodes())} machines"
    has = f"{where} has {most['CPU']:g} CPUs and {most['GPU'] or 'no'} GPU"
    if threads > most["CPU"]:
        raise InputError(f"--threads {threads} is more than there is: {has}")
    gpus = execution.gpus_per_run
    if gpus is None:
        gpus = 1.0 if most["GPU"] and device != "cpu" else 0.0
    if gpus > most["GPU"]:
        raise InputError(f"--gpus-per-run {gpus:g} is more than there is: {has}")
    if device.startswith("cuda") and (gpus == 0 or device != "cuda"):
        raise InputError(f"--device '{device}': Ray gives each run its own GPU: leave it at auto; {has}")
    return {"CPU": threads, "GPU": gpus} if gpus else {"CPU": threads}


def slots(bundle: dict[str, float]) -> int:
    """Runs that fit at a time."""
    return sum(
        math.floor(min(node["Resources"].get(name, 0) / amount for name, amount in bundle.items())) for node in _nodes()
    )


@contextmanager
def marker(store: RecordStore) -> Iterator[Path]:
    """A file in the results folder by which a machine knows that it sees it. Raises InputError where one does not."""
    path = (store.running / processes.own_name("sweep", "marker")).resolve()
    path.touch()
    try:
        blind = _blind(path)
        if blind:
            raise unseen(store.results, blind)
        yield path
    finally:
        path.unlink(missing_ok=True)


def _blind(path: Path) -> list[str]:
    """The machines that do not see a file of this one."""
    nodes = _nodes()
    if len(nodes) == 1:
        return []
    sees = ray.remote(num_cpus=0)(lambda file: Path(file).exists())
    answers = [
        sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(str(path))
        for node in nodes
    ]
    ray.wait(answers, num_returns=len(answers), timeout=PROBE_SECONDS)
    blind = []
    for node, answer in zip(nodes, answers, strict=True):
        with contextlib.suppress(RayError):  # a machine that leaves, or does not answer: its workers look again
            if not ray.get(answer, timeout=0):
                blind.append(str(node["NodeManagerHostname"]))
    return blind


def unseen(results: Path, machines: list[str]) -> InputError:
    """The error for a results folder that these machines do not see."""
    return InputError(
        f"--results '{results}' is not the same folder on {', '.join(machines)}: give a folder on a disk that every "
        "machine of the cluster mounts at the same path"
    )
