"""What a large sweep costs when there is nothing to do: the real command over finished records, processor seconds and
peak memory, beside the same command over one cell (imports, the loading of data, and a report on one run).

python scripts/bench_plan.py [cells]      (default: 10000, in squares: values of alpha x seeds)
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from pathlib import Path

from bench_report import measured, told

from harness.execute.process import quiet_environment
from harness.plan.plan import plan_sweep
from harness.plan.sweep import Sweep
from harness.record.store import RecordStore
from harness.run.run import run_one
from harness.spec import Place


def main() -> None:
    """Print what planning takes, and what the command takes over one cell and over all."""
    quiet_environment()
    side = math.isqrt(int(sys.argv[1]) if sys.argv[1:] else 10_000)
    started, busy = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        store = RecordStore(Path(folder))
        specs = plan_sweep(_sweep(1000), Place(), store, try_models=False).runs(store)
    run_ids = {spec.run_id for spec in specs}
    took = f"{time.perf_counter() - started:.1f} s ({time.process_time() - busy:.1f} s of processor)"
    print(f"planning {len(specs):,} cells, {len(run_ids):,} run ids: {took}")
    for size in (1, side):
        with tempfile.TemporaryDirectory() as folder:
            _finish(Path(folder), _sweep(size))
            grid = f"lora.alpha={','.join(map(str, range(1, size + 1)))}"
            options = ["--methods", "lora", "--tasks", "synthetic", "--batches", "1", "--tracking-uri", "off"]
            options += ["--seeds", str(size), "--grid", grid, "--executor", "serial", "--results", folder]
            print(f"{size**2:,} finished cells again: {told(*measured(['run', *options]))}")


def _sweep(size: int) -> Sweep:
    """`size` values of alpha (at most 100) x `size` seeds."""
    grid = {"lora.alpha": list(range(1, min(size, 100) + 1))}
    values = {"methods": ["lora"], "tasks": ["synthetic"], "grid": grid, "seeds": list(range(size))}
    return Sweep.of(values | {"train": {"batches": 1}}, "sweep")


def _finish(folder: Path, sweep: Sweep) -> None:
    """Records of every cell, by the store's own writer: that of one real run, changed."""
    store = RecordStore(folder)
    store.make_ready()
    specs = plan_sweep(sweep, Place(), store, try_models=False).runs(store)
    first = run_one(specs[0], store)
    for spec in specs[1:]:
        store.write(first.model_copy(update={"run_id": spec.run_id, "spec": spec}), [], store.draft(spec.run_id))


if __name__ == "__main__":
    main()
