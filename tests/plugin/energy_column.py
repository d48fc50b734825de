"""The energy that training took: a column of every table, in one file."""

from __future__ import annotations

from harness.report.board.columns import TableColumn
from harness.report.board.rows import Row, over

WATTS = 65.0  # of the processor


def watt_hours(row: Row) -> float | None:
    """Of one run's training, mean over the row's scored runs."""
    seconds = over(row.scored, "seconds_training")
    return None if seconds is None else seconds * WATTS / 3600


COLUMN = TableColumn("watt_hours", watt_hours, f"of training, at {WATTS:g} W", lambda energy: f"{energy:.4f}")
