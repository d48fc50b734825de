"""Histories of the runs of a board, as many as pictures show: reading all of a large store would take minutes."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pydantic_core import from_json

from harness.record.record import HISTORY
from harness.record.store import RecordStore
from harness.report.board.leaderboard import Board, Run
from harness.storage import Damaged
from harness.trace import HOLDOUT, OF_THE_LOOP, Trace

MOST_ROWS, MOST_COLUMNS, MOST_SEEDS = 6, 3, 5  # of a board: its first ones
MOST_POINTS = 200  # of a curve

MOST_UNDECLARED = 6  # values of a method that declares none

LARGEST = 1e100  # a number beyond it is no measurement, and no axis can show it


class History:
    """One run's numbers over time, by column: far smaller than its rows."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], lists: Collection[str] = ()) -> None:
        """`lists`: names of values that are lists of numbers and are kept too, where all of one are equally long.

        Raises ValueError for rows that no run writes: none at all, or without a rising number of batches."""
        counts: list[Any] = [row.get("batches") for row in rows]
        if not counts or any(type(count) is not int for count in counts):
            raise ValueError("it has no row, or one without its number of batches")
        if counts[0] < 0 or counts[-1] > 2**53 or any(b < a for a, b in itertools.pairwise(counts)):
            raise ValueError("its numbers of batches do not rise")
        batches = np.array(counts, dtype=float)
        self.last: int = counts[-1]  # batches at the end
        self._columns = {}
        for name in set().union(*rows) - {"batches", "update"}:
            column = _numbers([row.get(name) for row in rows])
            known = np.abs(column) <= LARGEST
            if known.any():
                self._columns[name] = batches[known], column[known]
        self._lists = {}
        for name in lists:
            known, table = _table([row.get(name) for row in rows])
            if len(table):
                self._lists[name] = batches[known], table

    @classmethod
    def read(cls, raw: bytes, lists: Collection[str] = ()) -> History:
        """The history that a file holds. Raises ValueError where it holds anything else."""
        lines = raw.splitlines()
        rows = from_json(b"[" + b",".join(lines) + b"]")  # one call: each costs more than a row; deep ones are refused
        if len(rows) != len(lines) or not all(type(row) is dict for row in rows):
            raise ValueError("it has a line that is no row")
        return cls(rows, lists)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(batches, values) of the rows that have a number under `name`."""
        return self._columns.get(name, (np.array([]), np.array([])))

    def table(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(batches, (batches, length)) of the rows that have a list of numbers under `name`, one of those kept."""
        return self._lists.get(name, (np.array([]), np.empty((0, 0))))

    @property
    def of_method(self) -> list[str]:
        """Names of the numbers that are not the loop's own."""
        return sorted(name for name in self._columns if name not in OF_THE_LOOP and not name.startswith(HOLDOUT))

    def __contains__(self, name: str) -> bool:
        return name in self._columns


def _numbers(values: Sequence[Any]) -> np.ndarray:
    """As floats; NaN for what is none."""
    try:
        return np.array([value if type(value) in (int, float) else np.nan for value in values], dtype=float)
    except OverflowError:
        raise ValueError("it has a number beyond all floats") from None


def _table(values: Sequence[Any]) -> tuple[list[int], np.ndarray]:
    """(positions of lists, their numbers as float32); nothing where lists differ in length or hold anything else."""
    places = [place for place, value in enumerate(values) if type(value) is list]
    found = [_numbers(values[place]) for place in places]
    if len({len(each) for each in found}) != 1 or not all((np.abs(each) <= LARGEST).all() for each in found):
        return [], np.empty((0, 0))
    return places, np.stack(found).astype(np.float32)


class Traced(NamedTuple):
    """The scored runs of one cell, by seed, with their histories. `traces`: the values of their method, in its order;
    those that are lists for each layer are there of the first seed alone."""

    label: str
    title: str
    runs: tuple[Run, ...]
    histories: tuple[History, ...]
    traces: tuple[Trace, ...]


def traced(
    board: Board,
    store: RecordStore,
    damaged: dict[str, str] | None = None,
    traces: Mapping[str, tuple[Trace, ...]] | None = None,
) -> list[Traced]:
    """Histories of the board's first rows and columns. Runs without one are left out, and so are those whose history
    is damaged: `damaged` gets the reasons, by run_id. `traces`: see `report.known.Known`."""
    found = []
    damaged = {} if damaged is None else damaged
    declared = traces or {}
    for column in board.columns[:MOST_COLUMNS]:
        for row in board.rows[:MOST_ROWS]:
            cell = row.cells.get(column.title)
            runs = [] if cell is None else cell.scored[:MOST_SEEDS]
            if not runs:
                continue
            own = declared.get(runs[0]["method"])
            lists = [trace.name for trace in own or () if trace.drawing == "heat_map"]
            read: list[tuple[Run, History]] = []
            for run in runs:
                history = _read(store, run["run_id"], damaged, () if read else lists)
                read += [] if history is None else [(run, history)]
            if read:
                shown, histories = zip(*read, strict=True)
                found.append(Traced(row.label, column.title, shown, histories, _traces_of(own, histories)))
    return found


def _traces_of(declared: tuple[Trace, ...] | None, histories: Sequence[History]) -> tuple[Trace, ...]:
    """What a method declares; of one that nobody knows, what is in its histories, by the names alone."""
    if declared is not None:
        return declared
    names = sorted({name for history in histories for name in history.of_method})[:MOST_UNDECLARED]
    return tuple(Trace(name, name.replace("_", " ")) for name in names)


def excerpt(board: Board) -> str:
    """What the pictures leave out, in words; empty where they leave out nothing."""
    if len(board.rows) <= MOST_ROWS and len(board.columns) <= MOST_COLUMNS:
        return ""
    return f" The first {MOST_ROWS} rows and {MOST_COLUMNS} tasks of the leaderboard."


def mean_series(
    histories: Sequence[History], name: str, smooth: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(batches, means, half-ranges) over the runs, at most `MOST_POINTS` of the batches that a run has a value at; each
    run smoothed by a running mean over a share `smooth` of it."""
    curves = [history.series(name) for history in histories if name in history]
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


def _read(store: RecordStore, run_id: str, damaged: dict[str, str], lists: Collection[str]) -> History | None:
    try:
        raw = store.verified(run_id, HISTORY).read_bytes()
        return History.read(raw, lists) if raw else None
    except FileNotFoundError:
        return None
    except Damaged as error:
        damaged[run_id] = str(error)
    except (OSError, ValueError) as error:
        damaged[run_id] = f"'{HISTORY}' of run '{run_id}' cannot be used: {one_line(error)}"
    return None


def one_line(error: BaseException) -> str:
    """An error's message, or its name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
