"""What a score costs: the Pareto front, scores at matched parameters, costs with the search, time to a score."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from harness.report.board.leaderboard import Board
from harness.report.board.rows import Column, Row, over, peak_bytes, whole
from harness.report.board.runs import Run
from harness.report.pictures.histories import History, Traced

Point = tuple[float, float]  # adapter parameters, score


def pareto_front(points: Iterable[Point], higher_is_better: bool = True) -> list[Point]:
    """The points that no other one betters with as few parameters, by rising parameters."""
    front: list[Point] = []
    sign = 1 if higher_is_better else -1
    for parameters, score in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not front or sign * score > sign * front[-1][1]:
            front.append((parameters, score))
    return front


def at_parameters(points: Sequence[Point], parameters: float) -> tuple[float, bool] | None:
    """(score, whether it was interpolated) at a parameter count, from points of different counts: linear in the
    logarithm of the parameters between the two nearest. None outside them: nothing is extrapolated."""
    known = sorted(points)
    for count, score in known:
        if count == parameters:
            return score, False
    for (low, first), (high, second) in pairwise(known):
        if 0 < low < parameters < high:
            share = math.log(parameters / low) / math.log(high / low)
            return first + share * (second - first), True
    return None


def matched(board: Board) -> pd.DataFrame:
    """Scores at matched parameters: a row for each task, curve and count that a rival has.

    Columns: task, parameters, method, score, interpolated. A curve is a sweep whose values give counts that all differ
    ("lora, rank varied"); any other configuration stands for itself, at its own count. Nothing is averaged but seeds.
    """
    rows = []
    for column in board.columns:
        curves = _curves(board, column)
        counts = sorted({count for points in curves.values() for count, _ in points})
        for count in counts:
            found = {name: at_parameters(points, count) for name, points in curves.items()}
            if sum(each is not None for each in found.values()) > 1:
                rows += [(column.title, count, name, *each) for name, each in found.items() if each is not None]
    return pd.DataFrame(rows, columns=["task", "parameters", "method", "score", "interpolated"])


def _curves(board: Board, column: Column) -> dict[str, list[Point]]:
    """(parameters, mean score) of the configurations that lack no score on one task, by curve."""
    points = {}
    for row in board.rows:
        cell = row.cells.get(column.title)
        count = over(cell.scored, "parameters_final") if cell is not None and not cell.failures else None
        if cell is not None and cell.score.mean is not None and count is not None:
            points[row.label] = count, cell.score.mean
    curves: dict[str, list[Point]] = {}
    alone = dict.fromkeys(points)
    for sweep in _of_board(board):
        labels = [label for _, label in sweep.values if label in points]
        if len(labels) > 1 and len({points[label][0] for label in labels}) == len(labels):
            curves[f"{sweep.method}, {sweep.parameter} varied"] = [points[label] for label in labels]
            for label in labels:
                alone.pop(label, None)
    return curves | {label: [points[label]] for label in alone}


def costs(board: Board) -> pd.DataFrame:
    """What each row cost in all: columns method, settings, runs, batches, seconds (of training), search_batches,
    search_seconds, peak_bytes, optimizer_bytes. Sums over the row's runs, failed ones too; the search for
    hyperparameters apart, once for each task (not a number where a trial's record is gone), and in the peak.
    optimizer_bytes is the largest of the runs, None where all their records are older than it."""
    rows = [_cost(row) for row in board.rows]
    return pd.DataFrame(rows)


def _cost(row: Row) -> dict[str, Any]:
    runs = row.runs
    searched = {cell.runs[0].run_id: cell.runs[0] for cell in row.cells.values()}.values()
    return {
        "method": row.label,
        "settings": row.tuning,
        "runs": len(runs),
        "batches": sum(run.batches for run in runs),
        "seconds": math.fsum(run.seconds_training for run in runs),
        "search_batches": whole(math.fsum(_number(run.search_batches) for run in searched)),
        "search_seconds": math.fsum(_number(run.search_seconds) for run in searched),
        "peak_bytes": whole(peak_bytes(runs)),
        "optimizer_bytes": whole(over(runs, "optimizer_bytes", max)),
    }


def _number(value: float | None) -> float:
    """The value; NaN, which a sum keeps, where there is none."""
    return math.nan if value is None else value


class Sweep(NamedTuple):
    """Configurations of one method that differ in one number alone: `values` by rising number, with their labels."""

    method: str
    parameter: str
    values: tuple[tuple[float, str], ...]


def varied(configurations: Iterable[Run]) -> list[Sweep]:
    """The sweeps among configurations, a run of each, of one version of a method and one kind of tuning."""
    groups: dict[tuple[str, str, str], list[tuple[float, str]]] = defaultdict(list)
    for run in configurations:
        values = run.spec.method_parameters
        tuned = run.tuning if run.tuning.startswith("tuned") else None
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                others = {key: other for key, other in values.items() if key != name}
                same = json.dumps([run.spec.method_version, tuned, others], sort_keys=True)
                groups[run.method, name, same].append((value, run.label))
    return [
        Sweep(method, name, tuple(sorted(values))) for (method, name, _), values in groups.items() if len(values) > 1
    ]


def _of_board(board: Board) -> list[Sweep]:
    return varied(next(iter(row.cells.values())).runs[0] for row in board.rows)


def sweeps(board: Board) -> pd.DataFrame:
    """Scores along each sweep (of tau, of the learning rate): a row for each value and task.

    Columns: method, parameter, value, label, task, metric, n, mean, interval_95 (half-width), parameters_final.
    """
    by_label = {row.label: row for row in board.rows}
    rows = []
    for sweep in _of_board(board):
        for value, label in sweep.values:
            row = by_label[label]
            for column in board.columns:
                if column.title in row.cells:
                    score = row.cells[column.title].score
                    numbers = (score.n, score.mean, score.half_width, over(row.scored, "parameters_final"))
                    rows.append((sweep.method, sweep.parameter, value, label, column.title, column.headline, *numbers))
    names = ["method", "parameter", "value", "label", "task", "metric", "n", "mean", "interval_95", "parameters_final"]
    return pd.DataFrame(rows, columns=names)


def time_to_score(board: Board, found: Sequence[Traced]) -> pd.DataFrame:
    """Batches until the holdout's metric first reached a target, the median of the runs' last ones, for the rows and
    tasks that pictures show: `found` (see `traced`).

    Columns: task, metric, target, method, seed, batches (None: never), seconds (of training, in proportion).
    """
    rows = []
    for column in board.columns:
        name = f"holdout_{column.headline}"
        of_task = [each for each in found if each.title == column.title]
        last = [history.series(name)[1][-1] for each in of_task for history in each.histories if name in history]
        if last:
            target = float(np.median(last))
            for each in of_task:
                for run, history in zip(each.runs, each.histories, strict=True):
                    batches = time_to(history, name, target, column.higher_is_better)
                    seconds = None if batches is None else run.seconds_training * batches / run.batches
                    rows.append((column.title, column.headline, target, each.label, run.seed, batches, seconds))
    return pd.DataFrame(rows, columns=["task", "metric", "target", "method", "seed", "batches", "seconds"])


def time_to(history: History, name: str, score: float, higher_is_better: bool = True) -> int | None:
    """Batches until a metric on the holdout first reached `score`, from a run's history; None where it never did."""
    batches, values = history.series(name)
    reached = np.flatnonzero(values >= score if higher_is_better else values <= score)
    return int(batches[reached[0]]) if len(reached) else None
