"""`run --dry-run`: what a plan holds, what it costs, and how much of it is there. Trains and keeps nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from tabulate import tabulate

from harness.plan import estimate
from harness.plan.plan import Cell, Planned
from harness.record.store import RecordStore
from harness.spec import RunSpec

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
    trials, runs = planned.trials(store), planned.runs(store)
    missing = {spec.run_id for spec in (*trials, *runs) if store.skim(spec.run_id) is None}
    to_train = [spec for cell in planned.cells for spec in _to_train(planned, cell, missing, store)]
    for line in estimate.lines(to_train, store):
        print(line)
    seeds = ", ".join(map(str, planned.sweep.seeds))
    before = f"{len(trials)} trials ({planned.sweep.tune} for each method and task), then " if trials else ""
    finished = len(trials) + len(runs) - len(missing)
    print(f"{before}{len(runs)} runs (seeds {seeds}), {finished} of them finished. Nothing was kept.")
    return 0


def _to_train(planned: Planned, cell: Cell, missing: Collection[str], store: RecordStore) -> list[RunSpec]:
    """The cell's runs that are missing, at the sizes that are known now."""
    if cell.reason is not None:
        return []
    specs = [*cell.trials(store), *cell.runs(planned.sweep.seeds, store)]
    specs = [spec for spec in specs if spec.run_id in missing]
    if not cell.parents or cell.sized is None:
        return specs
    sizes = cell.sized.model_dump(mode="json", exclude=set(cell.method.waits_for))
    searched = () if cell.search is None else tuple(cell.search.space)
    return [
        spec.model_copy(update={"method_parameters": sizes | {name: spec.method_parameters[name] for name in searched}})
        for spec in specs
    ]


def _row(planned: Planned, cell: Cell) -> list[str | int]:
    """The cell's parameter counts, from shapes alone."""
    train, num_examples = planned.sweep.train, len(cell.task.splits.train)
    counts = ["unsupported" if cell.reason is not None else "", "", ""]
    if cell.at_start is not None and (count := cell.at_start.parameters) is not None:
        counts = [f"{number:,}" for number in (count.adapter_initial, count.head, count.total)]
    return [cell.label, cell.task.name, *counts, train.budget(num_examples)]
