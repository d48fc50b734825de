"""`status`: how far the sweep is that was started last. Imports no torch, and reads the cells one by one."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from harness.notation import duration
from harness.record import locks
from harness.record.cells import Cell, newest
from harness.record.locks import Progress
from harness.record.store import RecordStore
from harness.storage import Unreadable


@dataclass
class Row:
    """The cells of one method on one task."""

    counts: Counter[str] = field(default_factory=Counter)
    timed: int = 0  # runs that ended by themselves
    seconds: float = 0.0  # of all of them
    to_do: float = 0.0  # cells still to make, a running one by the share that is left

    @property
    def mean_seconds(self) -> float | None:
        """Of a run; None where none has ended."""
        return self.seconds / self.timed if self.timed else None


def command(results: Path) -> int:
    """Print the newest sweep's cells by method and task, and what is running. Raises InputError without a sweep."""
    from tabulate import tabulate

    store = RecordStore.existing(results)
    at_work = locks.everything(store.running)
    rows: dict[tuple[str, str], Row] = defaultdict(Row)
    mine: list[tuple[Cell, Progress]] = []
    cells, garbled = newest(store)
    for line in garbled:
        print(f"passed over: {line}", file=sys.stderr)
    for cell in cells:
        progress = at_work.get(cell.run_id)
        _count(rows[cell.method, cell.task], store, cell, progress)
        if progress is not None:
            mine.append((cell, progress))
    total = sum((row.counts for row in rows.values()), Counter[str]())
    others = sorted(total.keys() - {"done", "running", "waiting"})
    names = ["done", *others, "running", "waiting"]
    table = [[*key, *(row.counts[name] or "-" for name in names)] for key, row in rows.items()]
    print(tabulate(table, ["method", "task", *(name.replace("_", " ") for name in names)], disable_numparse=True))
    waiting = Counter((cell.method, cell.task, cell.waits_for) for cell in cells if _waits(store, cell, at_work))
    for (method, task, waits_for), number in waiting.items():
        print(f"waits for {waits_for}: {method} · {task}, {number} {'run' if number == 1 else 'runs'}")
    for cell, progress in mine:
        print(f"running: {cell.method} · {cell.task} · seed {cell.seed}: {_details(progress)}")
    print(_summary(rows, total, len(mine)))
    return 0


def _waits(store: RecordStore, cell: Cell, at_work: Mapping[str, Progress]) -> bool:
    """Whether a cell that waits for others has still no record, and nobody is at it."""
    return bool(cell.waits_for) and cell.run_id not in at_work and not (cell.run_id and store.skim(cell.run_id))


def _count(row: Row, store: RecordStore, cell: Cell, progress: Progress | None) -> None:
    if progress is not None:
        row.counts["running"] += 1
        row.to_do += 1 - progress.share
        return
    try:
        found = store.skim(cell.run_id) if cell.run_id else None
    except Unreadable as error:
        print(error, file=sys.stderr)
        row.counts["unreadable"] += 1
        return
    row.counts[found.status if found else "waiting"] += 1
    if found is None:
        row.to_do += 1
    elif found.status == "done":
        row.timed += 1
        row.seconds += found.seconds


def _summary(rows: dict[tuple[str, str], Row], total: Counter[str], num_running: int) -> str:
    ended = total.total() - total["running"] - total["waiting"]
    text = f"{total.total()} cells: {ended} ended, {total['running']} running, {total['waiting']} waiting"
    if ended == total.total():
        return text
    if not num_running:
        return f"{text}; none is in progress: give the command of the sweep again"
    known = [row.mean_seconds for row in rows.values() if row.mean_seconds is not None]
    if not known:
        return f"{text}; the time to go is known when a run has ended"
    mean = sum(known) / len(known)
    seconds = sum(row.to_do * (row.mean_seconds or mean) for row in rows.values())
    return f"{text}, about {duration(seconds / num_running)} to go"


def _details(progress: Progress) -> str:
    return f"batch {progress.batches} of {progress.budget}, {progress.text()}" if progress.budget else "starting"
