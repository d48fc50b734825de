"""What a score costs: the Pareto front, scores at matched parameters, costs with the search, time to a score."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from harness.record import RecordStore
from harness.report.histories import series, traced
from harness.report.leaderboard import Board, Column, Row, over, peak_bytes, whole

Point = tuple[float, float]  # adapter parameters, score


def pareto_front(points: Iterable[Point], higher_is_better: bool = True) -> list[Point]:
    """The points that no other one betters with as few parameters, by rising parameters."""
    front: list[Point] = []
    sign = 1 if higher_is_better else -1
    for parameters, score in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not front or sign * score > sign * front[-1][1]:
            front.append((parameters, score))
    return front


def at_parameters(points: Iterable[Point], parameters: float) -> tuple[float, bool] | None:
    """(score, whether it was interpolated) at a parameter count, from the points of one method: linear in the logarithm
    of the parameters between the two nearest, equal counts averaged. None outside them: nothing is extrapolated."""
    by_count: dict[float, list[float]] = defaultdict(list)
    for count, score in points:
        by_count[count].append(score)
    known = [(count, math.fsum(scores) / len(scores)) for count, scores in sorted(by_count.items())]
    for count, score in known:
        if count == parameters:
            return score, False
    for (low, first), (high, second) in pairwise(known):
        if 0 < low < parameters < high:
            share = math.log(parameters / low) / math.log(high / low)
            return first + share * (second - first), True
    return None


def matched(board: Board) -> pd.DataFrame:
    """Scores at matched parameters: a row for each task, method and count that a rival's configuration has.

    Columns: task, parameters, method, score, interpolated. A method with one configuration has its own count only.
    """
    rows = []
    for column in board.columns:
        points = _points(board, column)
        counts = sorted({count for of_method in points.values() for count, _ in of_method})
        for count in counts:
            found = {method: at_parameters(of_method, count) for method, of_method in points.items()}
            if sum(each is not None for each in found.values()) > 1:
                rows += [(column.title, count, method, *each) for method, each in found.items() if each is not None]
    return pd.DataFrame(rows, columns=["task", "parameters", "method", "score", "interpolated"])


def _points(board: Board, column: Column) -> dict[str, list[Point]]:
    """(parameters, mean score) of each method's configurations on one task."""
    points = defaultdict(list)
    for row in board.rows:
        cell = row.cells.get(column.title)
        if cell is not None and cell.score.mean is not None:
            count = over(cell.scored, "parameters_final")
            if count is not None:
                points[cell.runs[0]["method"]].append((count, cell.score.mean))
    return points


def costs(board: Board) -> pd.DataFrame:
    """What each row cost in all: columns method, settings, runs, batches, seconds (of training), search_batches,
    search_seconds, peak_bytes. Sums over the row's runs, failed ones too; the search for hyperparameters apart, once
    for each task (not a number where a trial's record is gone), and in the peak."""
    rows = [_cost(row) for row in board.rows]
    return pd.DataFrame(rows)


def _cost(row: Row) -> dict[str, Any]:
    runs = [run for cell in row.cells.values() for run in cell.runs]
    searched = [cell.runs[0] for cell in row.cells.values()]
    return {
        "method": row.label,
        "settings": row.tuning,
        "runs": len(runs),
        "batches": sum(run["batches"] for run in runs),
        "seconds": math.fsum(run["seconds_training"] for run in runs),
        "search_batches": whole(math.fsum(_number(run["search_batches"]) for run in searched)),
        "search_seconds": math.fsum(_number(run["search_seconds"]) for run in searched),
        "peak_bytes": whole(peak_bytes(runs)),
    }


def _number(value: float | None) -> float:
    """The value; NaN, which a sum keeps, where there is none."""
    return math.nan if value is None else value


class Sweep(NamedTuple):
    """Configurations of one method that differ in one number alone: `values` by rising number, with their labels."""

    method: str
    parameter: str
    values: tuple[tuple[float, str], ...]


def varied(configurations: Iterable[tuple[str, str, str]]) -> list[Sweep]:
    """The sweeps among (method, label, parameters in JSON)."""
    groups: dict[tuple[str, str, str], list[tuple[float, str]]] = defaultdict(list)
    for method, label, parameters in configurations:
        values = json.loads(parameters)
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                rest = json.dumps({key: other for key, other in values.items() if key != name}, sort_keys=True)
                groups[method, name, rest].append((value, label))
    return [Sweep(*key[:2], tuple(sorted(values))) for key, values in groups.items() if len(values) > 1]


def sweeps(board: Board) -> pd.DataFrame:
    """Scores along each sweep (of tau, of the learning rate): a row for each value and task.

    Columns: method, parameter, value, label, task, metric, n, mean, interval_95 (half-width), parameters_final.
    """
    runs = {row.label: next(iter(row.cells.values())).runs[0] for row in board.rows}
    found = varied((run["method"], label, run["method_parameters"]) for label, run in runs.items())
    by_label = {row.label: row for row in board.rows}
    rows = []
    for sweep in found:
        for value, label in sweep.values:
            row = by_label[label]
            for column in board.columns:
                if column.title in row.cells:
                    score = row.cells[column.title].score
                    numbers = (score.n, score.mean, score.half_width, row.parameters)
                    rows.append((sweep.method, sweep.parameter, value, label, column.title, column.headline, *numbers))
    names = ["method", "parameter", "value", "label", "task", "metric", "n", "mean", "interval_95", "parameters_final"]
    return pd.DataFrame(rows, columns=names)


def time_to_score(board: Board, store: RecordStore) -> pd.DataFrame:
    """Batches until the holdout's metric first reached a target, the median of the runs' last ones, for the rows and
    tasks that pictures show.

    Columns: task, metric, target, method, seed, batches (None: never), seconds (of training, in proportion).
    """
    rows = []
    found = traced(board, store)
    for column in board.columns:
        name = f"holdout_{column.headline}"
        of_task = [each for each in found if each.title == column.title]
        last = [values[-1] for each in of_task for history in each.histories if len(values := series(history, name)[1])]
        if last:
            target = float(np.median(last))
            for each in of_task:
                for run, history in zip(each.runs, each.histories, strict=True):
                    batches = time_to(history, name, target, column.higher_is_better)
                    seconds = None if batches is None else run["seconds_training"] * batches / run["batches"]
                    rows.append((column.title, column.headline, target, each.label, run["seed"], batches, seconds))
    return pd.DataFrame(rows, columns=["task", "metric", "target", "method", "seed", "batches", "seconds"])


def time_to(history: Sequence[Mapping[str, Any]], name: str, score: float, higher_is_better: bool = True) -> int | None:
    """Batches until a metric on the holdout first reached `score`, from a run's history; None where it never did."""
    for row in history:
        value = row.get(name)
        if value is not None and (value >= score if higher_is_better else value <= score):
            return int(row["batches"])
    return None
