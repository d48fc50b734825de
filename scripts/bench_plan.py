"""What large sweeps cost before the first run: planning 100,000 cells, and skipping 10,000 that are finished.

python scripts/bench_plan.py
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from harness.contracts import Subject, spec_of
from harness.plan import Fingerprints, Sweep, plan
from harness.record_store import RecordStore
from harness.run import run_one
from harness.spec import Place


def main() -> None:
    """Print the seconds of each."""
    grid = {"lora.alpha": list(range(1, 101))}
    values = {"methods": ["lora"], "tasks": ["synthetic"], "grid": grid, "seeds": list(range(1000))}
    started = time.perf_counter()
    specs = plan(Sweep.of(values, "sweep"), [Fingerprints("data", "model")], Place())
    planned = time.perf_counter()
    run_ids = {spec.run_id for spec in specs}
    print(f"planning {len(specs):,} specs: {planned - started:.1f} s")
    print(f"their run ids: {time.perf_counter() - planned:.1f} s")
    with tempfile.TemporaryDirectory() as folder:
        store = RecordStore(Path(folder))
        store.make_ready()
        record = run_one(spec_of(Subject("lora", Path(folder))), store)
        text = (store.folder(record.run_id) / "record.json").read_text()
        chosen = sorted(run_ids)[:10_000]
        for run_id in chosen:
            store.folder(run_id).mkdir()
            (store.folder(run_id) / "record.json").write_text(text)
        started = time.perf_counter()
        found = sum(store.read(run_id) is not None for run_id in chosen)
        print(f"checking {found:,} finished runs: {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
