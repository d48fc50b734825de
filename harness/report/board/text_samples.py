"""The rises of the loss on text samples: means over runs that were measured on the same windows, and no others."""

from __future__ import annotations

from collections.abc import Sequence

from harness.report.board.rows import Row, over
from harness.report.board.runs import Run


def forgetting(row: Row) -> float | None:
    """Of a row: the mean rise over its runs on tasks that have one; None unless all of these were measured, on the same
    windows."""
    return over(row.scored, "forgetting") if len(set[object]().union(*_windows(row).values())) == 1 else None


def same_windows(rows: Sequence[Row]) -> bool:
    """Whether some were measured, and on each task all rows with a mean on the same windows: others are no match."""
    of_tasks: dict[str, set[object]] = {}
    for row in rows:
        for title, samples in _windows(row).items():
            of_tasks.setdefault(title, set()).update(samples if len(samples) == 1 else ())
    return bool(of_tasks) and all(len(samples) <= 1 for samples in of_tasks.values())


def _windows(row: Row) -> dict[str, set[object]]:
    """By task, what its runs were measured on, None for one that was not; without tasks that have no such run."""
    found = {title: {_sample(run) for run in cell.scored} for title, cell in row.cells.items()}
    return {title: samples for title, samples in found.items() if samples - {None}}


def _sample(run: Run) -> object:
    found = run.record.forgetting
    return None if found is None else (found.fingerprint, found.windows)
