"""One trained adapter at several ranks: its scores, the area under their curve, and LoRAs that were trained at them."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pandas as pd

from harness.record.record import RunRecord
from harness.report.board.leaderboard import Board
from harness.report.board.rows import Cell, Column, Row
from harness.report.statistics import Summary, rank_aurac, summarize

IsLora = Callable[[RunRecord], bool]  # whether a run is the training of a LoRA at its ranks
TRAINED = "LoRA trained at each rank"


class Curves(NamedTuple):
    """The curves of one configuration on one task, over seeds, all at the same ranks."""

    column: Column
    label: str
    ranks: tuple[int, ...]
    cell: Cell

    def at(self, rank: int) -> Summary:
        """The score at a rank over the runs."""
        return at_rank(self.cell, rank).score

    def area(self, axis: str) -> Summary:
        """`rank_aurac` on an axis over the runs."""
        curves = (run.record.rank_curve for run in self.cell.runs)
        return summarize(rank_aurac([*curve], [*curve.values()])[axis] for curve in curves)


def at_rank(cell: Cell, rank: int) -> Cell:
    """The runs that have a score at a rank, with this score."""
    runs = [run for run in cell.scored if rank in run.record.rank_curve]
    cut = tuple(dataclasses.replace(run, score=run.record.rank_curve[rank], cut=rank) for run in runs)
    return Cell(cut, summarize(run.record.rank_curve[rank] for run in runs), {})


def curves_of(board: Board) -> Iterator[Curves]:
    """The rank curves of the board's scored runs; runs of one cell at different ranks are apart."""
    for column in board.tasks:
        for row in board.rows:
            cell = row.cells.get(column.title)
            found = defaultdict(list)
            for run in cell.scored if cell is not None else ():
                found[tuple(sorted(run.record.rank_curve))].append(run)
            for ranks, runs in found.items():
                if ranks:
                    yield Curves(column, row.label, ranks, Cell(tuple(runs), summarize(()), {}))


def ranks_on(board: Board, column: Column) -> list[int]:
    """The ranks that adapters were cut to on a task."""
    return sorted({rank for each in curves_of(board) if each.column == column for rank in each.ranks})


def trained_at(board: Board, column: Column, is_lora: IsLora) -> dict[int, Row]:
    """rank -> the row of the LoRA that has this rank in every layer of every run on the task; of several rows the one
    of the best mean score, the hardest to beat."""
    found: dict[int, Row] = {}
    for row in sorted(board.rows, key=lambda row: row.label):
        runs = row.cells[column.title].scored if column.title in row.cells else []
        ranks = {rank for run in runs for rank in run.record.ranks.values()}
        if len(ranks) == 1 and all(run.record.ranks for run in runs) and is_lora(runs[0].record):
            (rank,) = ranks
            found[rank] = max(found.get(rank, row), row, key=lambda each: _merit(each, column))
    return dict(sorted(found.items()))


def _merit(row: Row, column: Column) -> float:
    return column.merit(row.cells[column.title].score.mean or 0.0)


def rank_curves(board: Board) -> pd.DataFrame:
    """Scores at each rank: columns task, metric, ranks, method, rank, n, mean, interval_95 (half-width)."""
    rows = []
    for each in curves_of(board):
        for rank in each.ranks:
            rows.append((*_names(each), rank, *_numbers(each.at(rank))))
    names = ["task", "metric", "ranks", "method", "rank", "n", "mean", "interval_95"]
    return pd.DataFrame(rows, columns=names)


def areas(board: Board) -> pd.DataFrame:
    """`rank_aurac` on both axes, rows of the same ranks together, since others cannot be compared.

    Columns: task, metric, ranks, method, n, and for both axes the mean and the half-width of its 95 % interval.
    """
    rows = []
    for each in curves_of(board):
        linear, log = each.area("linear"), each.area("log2")
        rows.append((*_names(each), *_numbers(linear), *_numbers(log)[1:]))
    names = ["task", "metric", "ranks", "method", "n", "aurac_linear", "linear_interval_95", "aurac_log2"]
    return pd.DataFrame(rows, columns=[*names, "log2_interval_95"]).sort_values(["task", "ranks"], kind="stable")


def _names(each: Curves) -> tuple[str, str, str, str]:
    return each.column.title, each.column.metric, ",".join(map(str, each.ranks)), each.label


def _numbers(summary: Summary) -> tuple[int, float | None, float | None]:
    return summary.n, summary.mean, summary.half_width
