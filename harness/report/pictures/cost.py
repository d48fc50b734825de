"""What a score is drawn against: something that a method costs, to the right, where less is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from harness.report.board import text_samples
from harness.report.board.columns import of_runs
from harness.report.board.rows import Row
from harness.report.pictures.broken_axis import BrokenAxis, of_counts, of_scores, widened


class Cost(NamedTuple):
    """What runs to the right, where less is better. `name`: the attribute of a run. `words`: at the axis. `value`: of a
    row on one task. `comparable`: whether the values of a task's rows are. `axis`: of the values of all panels."""

    name: str
    words: str
    value: Callable[[Row], float | None]
    comparable: Callable[[Sequence[Row]], bool]
    axis: Callable[[Sequence[float]], BrokenAxis]


def _of_rises(rises: Sequence[float]) -> BrokenAxis:
    """With room around them, and for 0, where nothing is forgotten."""
    axis = of_scores(rises, higher_is_better=False)
    margin = 0.08 * (max(axis.high, 0) - min(axis.low, 0)) or 0.01
    return widened(axis, min(axis.low, 0) - margin, max(axis.high, 0) + margin)


PARAMETERS = Cost(
    "parameters_final",
    "adapter parameters",
    of_runs("parameters_final"),
    lambda rows: True,
    of_counts,
)
FORGETTING = Cost(
    "forgetting",
    "forgetting (nats a token)",
    text_samples.forgetting,
    text_samples.same_windows,
    _of_rises,
)
