"""What `report`, `compare` and tracking cost: processor seconds and peak memory of the real commands, each in a
process of its own, imports included.

python scripts/bench_report.py [--records 2000] [--steps 500] [--examples 1000] [--tasks 20] [--seeds 5] [--settings 2]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from harness.execute.process import quiet_environment

TRACKED = 1000  # records that go into MLflow
# Linux counts the memory of the process that starts another as the other's, but for VmHWM.
MEASURED = """
import re, sys, time
from pathlib import Path
from harness import cli
code = cli.main(sys.argv[1:])
peak = re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]
print(time.process_time(), peak, file=sys.stderr)
sys.exit(code)
"""


def main() -> None:
    """Print what each command takes on a store of made-up records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"records": 2000, "steps": 500, "examples": 1000, "tasks": 20, "seeds": 5, "settings": 2}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    options = parser.parse_args()
    quiet_environment()
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), options)
        print(f"{options.records:,} records of {options.steps:,} steps and {options.examples:,} predictions:")
        for command in (["report"], ["compare", "lora[alpha=1]", "lora[alpha=2]"]):
            print(f"  {command[0]}: {told(*measured([*command, '--results', folder]))}")
    with tempfile.TemporaryDirectory() as folder:
        options.records = TRACKED
        make(Path(folder), options)
        track(Path(folder), options.steps)


def measured(arguments: list[str]) -> tuple[float, float]:
    """(processor seconds, peak MiB) of `python -m harness ...` in a process of its own. Raises CalledProcessError."""
    command = [sys.executable, "-c", MEASURED, *arguments]
    found = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)
    seconds, kibibytes = found.stderr.splitlines()[-1].split()
    return float(seconds), int(kibibytes) / 1024


def told(seconds: float, memory: float) -> str:
    """What `measured` gave, in words."""
    return f"{seconds:.1f} s of processor, {memory:.0f} MiB at most"


def track(folder: Path, steps: int) -> None:
    """Log every record and print what it took."""
    from harness.record.mlflow import log_records
    from harness.record.store import RecordStore

    store = RecordStore(folder)
    records = store.records()
    started, busy = time.perf_counter(), time.process_time()
    logged = log_records(store, records)
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    print(f"MLflow, {logged:,} cells of {steps} steps: {seconds:.1f} s ({busy:.1f} s of processor)")
    started = time.perf_counter()
    log_records(store, records)
    print(f"MLflow, nothing new: {time.perf_counter() - started:.1f} s")


def make(folder: Path, options: argparse.Namespace) -> None:
    """Records of one real run, changed: settings x configurations x tasks x seeds, with histories and predictions."""
    from harness.contracts import Subject, spec_of
    from harness.record.store import RecordStore
    from harness.run.run import run_one

    random = np.random.default_rng(0)
    store = RecordStore(folder)
    store.make_ready()
    first = run_one(spec_of(Subject("lora", folder)), store)
    shutil.rmtree(store.folder(first.run_id))
    history = _history(options.steps)
    references = random.integers(0, 2, options.examples)
    for place in range(options.records):
        cell, setting = divmod(place, options.settings)
        cell, seed = divmod(cell, options.seeds)
        configuration, task = divmod(cell, options.tasks)
        parameters = {**first.spec.method_parameters, "alpha": float(configuration + 1)}
        changes: dict[str, Any] = {"task": f"task/{task}", "seed": seed, "threads": setting + 1}
        spec = first.spec.model_copy(update=changes | {"method_parameters": parameters})
        right = random.random(options.examples) < 0.7 + 0.002 * configuration
        score, rows = float(right.mean()), {"train": 900, "holdout": 100, "validation": options.examples}
        changes = {"run_id": spec.run_id, "spec": spec, "score": score, "metrics": {"accuracy": score}, "rows": rows}
        draft = store.draft(spec.run_id)
        _predictions(draft, np.where(right, references, 1 - references), references)
        store.write(first.model_copy(update=changes), history, draft)


def _history(steps: int) -> list[dict[str, Any]]:
    """With all that a picture shows: ranks and an active set at every step, the holdout at twenty."""
    rows: list[dict[str, Any]] = []
    for i in range(steps):
        row = {"update": i, "batches": i + 1, "loss": 1 / (i + 1), "learning_rate_factor": 0.5, "gradient_norm": 1.0}
        row |= {"rank": 100 - 50 * i // steps, "gap": 1 / (i + 1), "active_components": 40 - 20 * i // steps}
        row |= {"holdout_accuracy": 0.7} if (i + 1) % max(1, steps // 20) == 0 else {}
        rows.append(row)
    return rows


def _predictions(folder: Path, predictions: np.ndarray, references: np.ndarray) -> None:
    from harness.storage import save_arrays

    arrays = {"validation/predictions": predictions, "validation/references": references}
    save_arrays(arrays, folder / "predictions.safetensors")


if __name__ == "__main__":
    main()
