"""`run --dry-run`: what a plan holds, what it costs, and how much of it is there. Trains and keeps nothing."""

from __future__ import annotations

from collections import defaultdict

from tabulate import tabulate

from harness.plan import estimate, preflight
from harness.plan.plan import Cell, Planned
from harness.record.store import RecordStore

HEADERS = ("method", "task", "adapter at start", "head", "total", "batches")


def show(planned: Planned, store: RecordStore) -> int:
    """Print the plan's cells, notes, time and number of runs. Returns 0."""
    print("\n".join(planned.summaries))
    rows = [_row(planned, cell) for cell in planned.cells]
    print(tabulate(rows, HEADERS, disable_numparse=True, colalign=("left", "left", *["right"] * 4)))
    tasks = defaultdict(list)
    for cell in planned.cells:
        for note in cell.notes if cell.reason is None else (cell.reason,):
            tasks[cell.label, note].append(cell.task.name)
    for (label, note), names in tasks.items():
        print(f"{label} on {', '.join(names)}: {note}")
    for line in planned.said:
        print(line)
    trials, runs = planned.trials, planned.runs(store)
    missing = [spec for spec in (*trials, *runs) if store.skim(spec.run_id) is None]
    unsupported = [cell for cell in planned.cells if cell.reason is not None]
    untrained = {spec.run_id for cell in unsupported for spec in cell.runs(planned.sweep.seeds, store)}
    for line in estimate.lines([spec for spec in missing if spec.run_id not in untrained], store):
        print(line)
    seeds = ", ".join(map(str, planned.sweep.seeds))
    before = f"{len(trials)} trials ({planned.sweep.tune} for each method and task), then " if trials else ""
    finished = len(trials) + len(runs) - len(missing)
    print(f"{before}{len(runs)} runs (seeds {seeds}), {finished} of them finished. Nothing was kept.")
    return 0


def _row(planned: Planned, cell: Cell) -> list[str | int]:
    """The cell's parameter counts, from shapes alone."""
    train, num_examples = planned.sweep.train, len(cell.task.splits.train)
    counts = ["unsupported", "", ""]
    if cell.reason is None:
        count = preflight.preview(cell.method, cell.task.meta_backbone(planned.place), train, num_examples)
        counts = [f"{number:,}" for number in (count.adapter_initial, count.head, count.total)]
    return [cell.label, cell.task.name, *counts, train.budget(num_examples)]
