"""Histories of the runs of a board, as many as pictures show: reading all of a large store would take minutes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from harness.record_store import RecordStore
from harness.report.leaderboard import Board, Run

MOST_ROWS, MOST_COLUMNS, MOST_SEEDS = 6, 3, 5  # of a board: its first ones
MOST_POINTS = 200  # of a curve

History = list[dict[str, Any]]


class Traced(NamedTuple):
    """The scored runs of one cell, by seed, with their histories."""

    label: str
    title: str
    runs: tuple[Run, ...]
    histories: tuple[History, ...]


def traced(board: Board, store: RecordStore) -> list[Traced]:
    """Histories of the board's first rows and columns; runs whose history cannot be read are left out."""
    found = []
    for column in board.columns[:MOST_COLUMNS]:
        for row in board.rows[:MOST_ROWS]:
            cell = row.cells.get(column.title)
            runs = [] if cell is None else cell.scored[:MOST_SEEDS]
            read = [(run, history) for run in runs if (history := _read(store, run["run_id"]))]
            if read:
                found.append(Traced(row.label, column.title, *zip(*read, strict=True)))
    return found


def excerpt(board: Board) -> str:
    """What the pictures leave out, in words; empty where they leave out nothing."""
    if len(board.rows) <= MOST_ROWS and len(board.columns) <= MOST_COLUMNS:
        return ""
    return f" The first {MOST_ROWS} rows and {MOST_COLUMNS} tasks of the leaderboard."


def series(history: History, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(batches, values) of the rows that have a number under `name`."""
    rows = [(row["batches"], row[name]) for row in history if isinstance(row.get(name), (int, float))]
    return tuple(np.array(values, dtype=float) for values in zip(*rows, strict=True)) if rows else (np.array([]),) * 2  # type: ignore[return-value]


def mean_series(
    histories: Sequence[History], name: str, smooth: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(batches, means, half-ranges) over the runs, at most `MOST_POINTS` of the batches that a run has a value at; each
    run smoothed by a running mean over a share `smooth` of it."""
    curves = [curve for history in histories if len((curve := series(history, name))[0])]
    if not curves:
        return (np.array([]),) * 3
    points = np.unique(np.concatenate([batches for batches, _ in curves]))
    grid = points[points <= min(batches[-1] for batches, _ in curves)]
    grid = grid[np.unique(np.linspace(0, len(grid) - 1, min(MOST_POINTS, len(grid))).round().astype(int))]
    values = np.stack([np.interp(grid, batches, _running_mean(each, smooth)) for batches, each in curves])
    return grid, values.mean(axis=0), (values.max(axis=0) - values.min(axis=0)) / 2


def _running_mean(values: np.ndarray, share: float) -> np.ndarray:
    half = int(len(values) * share / 2)
    if half == 0:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _read(store: RecordStore, run_id: str) -> History:
    try:
        return store.history(run_id)
    except (OSError, ValueError):
        return []
