"""One trained adapter at several ranks: its scores, and the area under their curve."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import pandas as pd

from harness.record.record import RunRecord
from harness.report.board.leaderboard import Board
from harness.report.board.rows import Column
from harness.report.statistics import Summary, summarize

Curve = dict[int, float]  # rank -> score, by rising rank


class Curves(NamedTuple):
    """The curves of one configuration on one task, over seeds, all at the same ranks."""

    column: Column
    label: str
    ranks: tuple[int, ...]
    runs: tuple[Curve, ...]

    def at(self, rank: int) -> Summary:
        """The score at a rank over the runs."""
        return summarize(curve[rank] for curve in self.runs)

    def area(self, axis: str) -> Summary:
        """`rank_aurac` on an axis over the runs."""
        return summarize(rank_aurac(self.ranks, [curve[rank] for rank in self.ranks])[axis] for curve in self.runs)


def rank_aurac(ranks: Sequence[int], scores: Sequence[float]) -> dict[str, float]:
    """Area under the rank-accuracy curve of one trained adapter cut to several ranks, in the unit of the scores.

    "linear" and "log2": trapezoid means over the rank and over its logarithm, comparable only on the same ranks. Any
    order of the ranks gives the same. From MatryoshkaLoRA's code (IST-DASLab, `metrics.py`); the name is ours, since
    AURAC elsewhere is the area under a rejection curve. Raises ValueError for unequal lengths, a rank given twice or
    below 1.
    """
    if len(ranks) != len(scores) or not ranks or len(set(ranks)) != len(ranks) or min(ranks) < 1:
        raise ValueError(f"needs a score for each rank, ranks from 1 up and none twice: {ranks}, {scores}")
    points = sorted(zip(ranks, scores, strict=True))
    return {
        "linear": _trapezoid([(float(rank), score) for rank, score in points]),
        "log2": _trapezoid([(math.log2(rank), score) for rank, score in points]),
    }


def _trapezoid(points: Sequence[tuple[float, float]]) -> float:
    if len(points) == 1:
        return points[0][1]
    area = math.fsum((right[0] - left[0]) * (left[1] + right[1]) / 2 for left, right in pairwise(points))
    return area / (points[-1][0] - points[0][0])


def curves_of(board: Board, records: Mapping[str, RunRecord]) -> Iterator[Curves]:
    """The rank curves of the board's scored runs; runs of one cell at different ranks are apart."""
    for column in board.tasks:
        for row in board.rows:
            cell = row.cells.get(column.title)
            found: dict[tuple[int, ...], list[Curve]] = defaultdict(list)
            for run in cell.scored if cell is not None else ():
                curve = dict(sorted(records[run.run_id].rank_curve.items()))
                if curve:
                    found[tuple(curve)].append(curve)
            for ranks, runs in found.items():
                yield Curves(column, row.label, ranks, tuple(runs))


def rank_curves(board: Board, records: Mapping[str, RunRecord]) -> pd.DataFrame:
    """Scores at each rank: columns task, metric, ranks, method, rank, n, mean, interval_95 (half-width)."""
    rows = []
    for each in curves_of(board, records):
        for rank in each.ranks:
            rows.append((*_names(each), rank, *_numbers(each.at(rank))))
    names = ["task", "metric", "ranks", "method", "rank", "n", "mean", "interval_95"]
    return pd.DataFrame(rows, columns=names)


def areas(board: Board, records: Mapping[str, RunRecord]) -> pd.DataFrame:
    """`rank_aurac` on both axes, rows of the same ranks together, since others cannot be compared.

    Columns: task, metric, ranks, method, n, and for both axes the mean and the half-width of its 95 % interval.
    """
    rows = []
    for each in curves_of(board, records):
        linear, log = each.area("linear"), each.area("log2")
        rows.append((*_names(each), *_numbers(linear), *_numbers(log)[1:]))
    names = ["task", "metric", "ranks", "method", "n", "aurac_linear", "linear_interval_95", "aurac_log2"]
    return pd.DataFrame(rows, columns=[*names, "log2_interval_95"]).sort_values(["task", "ranks"], kind="stable")


def _names(each: Curves) -> tuple[str, str, str, str]:
    return each.column.title, each.column.metric, ",".join(map(str, each.ranks)), each.label


def _numbers(summary: Summary) -> tuple[int, float | None, float | None]:
    return summary.n, summary.mean, summary.half_width
