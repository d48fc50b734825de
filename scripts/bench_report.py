"""What reports and tracking cost: tables and pictures of 10,000 records, and 1,000 cells of 500 steps into MLflow.

python scripts/bench_report.py [records ...]      (default: 2500 5000 10000)
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

TASKS, SEEDS, EXAMPLES, STEPS = 20, 10, 500, 500


def main() -> None:
    """Print seconds and peak memory of each size, every one in a process of its own."""
    if sys.argv[1:2] == ["report"]:
        report(Path(sys.argv[2]))
        return
    for records in [int(size) for size in sys.argv[1:]] or [2500, 5000, 10_000]:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), records, STEPS)
            size = f"{records:,} records:"
            print(
                size,
                subprocess.run(
                    [sys.executable, __file__, "report", folder], check=True, capture_output=True, text=True
                ).stdout.strip(),
            )
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), 1000, STEPS)
        track(Path(folder))


def report(folder: Path) -> None:
    """Build the report and print what it took."""
    from harness.record_store import RecordStore
    from harness.report.build import build_report

    started = time.perf_counter()
    paths = build_report(RecordStore(folder))
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{seconds:.1f} s ({time.process_time():.1f} s of processor), {peak:.2f} GiB, {len(paths)} files")


def track(folder: Path) -> None:
    """Log every record and print what it took."""
    from harness.record_store import RecordStore
    from harness.tracking import log_records

    store = RecordStore(folder)
    records = store.records()
    started, busy = time.perf_counter(), time.process_time()
    logged = log_records(store, records)
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    print(f"MLflow, {logged:,} cells of {STEPS} steps: {seconds:.1f} s ({busy:.1f} s of processor)")
    started = time.perf_counter()
    log_records(store, records)
    print(f"MLflow, nothing new: {time.perf_counter() - started:.1f} s")


def make(folder: Path, count: int, steps: int) -> None:
    """Records of one real run, changed: configurations x tasks x seeds, with history and predictions."""
    from harness.contracts import Subject, spec_of
    from harness.record_store import RecordStore
    from harness.run import run_one

    random = np.random.default_rng(0)
    store = RecordStore(folder)
    store.make_ready()
    first = run_one(spec_of(Subject("lora", folder)), store)
    shutil.rmtree(store.folder(first.run_id))
    history = "".join(
        json.dumps(
            {"update": i, "batches": i + 1, "loss": 1 / (i + 1), "learning_rate_factor": 0.5, "gradient_norm": 1.0}
        )
        + "\n"
        for i in range(steps)
    )
    references = random.integers(0, 2, EXAMPLES)
    for place in range(count):
        configuration, cell = divmod(place, TASKS * SEEDS)
        task, seed = divmod(cell, SEEDS)
        parameters = {**first.spec.method_parameters, "alpha": float(configuration + 1)}
        spec = first.spec.model_copy(update={"task": f"task/{task}", "seed": seed, "method_parameters": parameters})
        right = random.random(EXAMPLES) < 0.7 + 0.002 * configuration
        rows = {"train": 900, "holdout": 100, "validation": EXAMPLES}
        changes = {"run_id": spec.run_id, "spec": spec, "score": float(right.mean()), "rows": rows}
        record = first.model_copy(update={**changes, "metrics": {"accuracy": float(right.mean())}})
        run = store.folder(spec.run_id)
        run.mkdir()
        (run / "record.json").write_text(record.model_dump_json(indent=1))
        (run / "history.jsonl").write_text(history)
        arrays = {
            "validation/predictions": np.where(right, references, 1 - references),
            "validation/references": references,
        }
        save_file(arrays, run / "predictions.safetensors")


if __name__ == "__main__":
    main()
