"""What sweeps cost beside the runs themselves.

    python scripts/bench_executor.py empty [--runs 200]     runs of one batch: Ray's seconds a run above serial's
    python scripts/bench_executor.py real [--runs 12]       real runs: throughput of Ray's workers over serial's
    python scripts/bench_executor.py store [--cells 10000]  skipping finished cells, and `status` over them

`empty` and `real` time what comes after the workers have started, with one worker a CPU: from the end of each worker's
first run to the end of the last run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console

from harness.commands import status
from harness.contracts import Subject, spec_of
from harness.execute import session
from harness.execute.view import View
from harness.record.record import RunRecord
from harness.record.store import RecordStore
from harness.run.run import run_one
from harness.spec import Execution, RunSpec


class Clock(View):
    """Notes when each run ended, and prints nothing."""

    def __init__(self, specs: Sequence[RunSpec]) -> None:
        super().__init__(specs, Console(quiet=True))
        self.times: list[float] = []

    def ended(self, record: RunRecord) -> None:
        """See `View`."""
        assert record.status in ("done", "unsupported"), record.error
        self.times.append(time.perf_counter())


def main() -> None:
    """Print the seconds of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["empty", "real", "store"])
    parser.add_argument("--runs", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cells", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "store":
            many_cells(Path(folder), options.cells)
        elif options.what == "empty":
            compare(Path(folder), empty_specs(options.runs or 200), options.repeats)
        else:
            compare(Path(folder), real_specs(options.runs or 12), options.repeats)


def empty_specs(number: int) -> list[RunSpec]:
    """Runs of one batch of a tiny model."""
    spec = spec_of(Subject("head", Path(), batches=1))
    return [
        spec.model_copy(update={"seed": seed, "train": spec.train.model_copy(update={"holdout_points": 0})})
        for seed in range(number)
    ]


def real_specs(number: int) -> list[RunSpec]:
    """Runs of some seconds each."""
    spec = spec_of(Subject("full", Path(), batches=1500))
    return [spec.model_copy(update={"seed": seed}) for seed in range(number)]


def compare(folder: Path, specs: list[RunSpec], repeats: int) -> None:
    """Both executors on the same runs, in turn; medians of the seconds a run."""
    seconds: dict[str, list[float]] = {"serial": [], "ray": []}
    for repeat in range(repeats):
        for name, found in seconds.items():
            found.append(seconds_a_run(folder / f"{name}{repeat}", specs, name))
            print(f"{name}: {found[-1]:.3f} s a run", flush=True)
    serial, ray = (statistics.median(found) for found in seconds.values())
    print(f"medians of {repeats}: ray over serial {ray - serial:+.3f} s a run, {serial / ray:.2f} x throughput")


def seconds_a_run(folder: Path, specs: list[RunSpec], name: Literal["serial", "ray"]) -> float:
    """From the end of every worker's first run to the end of the last one."""
    store = RecordStore(folder)
    store.make_ready()
    clock = Clock(specs)
    with session.session(Execution(executor=name), 1, "cpu") as execute:
        execute(specs, store, clock)
    workers = 1 if name == "serial" else os.cpu_count() or 1
    return (clock.times[-1] - clock.times[workers - 1]) / (len(specs) - workers)


def many_cells(folder: Path, cells: int) -> None:
    """The skip check and `status` over finished cells."""
    store = RecordStore(folder)
    store.make_ready()
    spec = spec_of(Subject("lora", folder))
    text = (store.folder(run_one(spec, store).run_id) / "record.json").read_text()
    specs = [spec.model_copy(update={"seed": seed}) for seed in range(cells)]
    for each in specs:
        store.folder(each.run_id).mkdir(exist_ok=True)
        (store.folder(each.run_id) / "record.json").write_text(text)
    cells.write(store, specs)
    began = time.perf_counter()
    found = sum(store.read(each.run_id) is not None for each in specs)
    print(f"skip check of {found:,} cells: {time.perf_counter() - began:.1f} s")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        status.command(folder)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"status over them: {time.perf_counter() - began:.1f} s, peak memory grew by {grown:.0f} MiB")


if __name__ == "__main__":
    main()
