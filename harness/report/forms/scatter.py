"""The page's scatter of any two columns: its data, which are the tables', and the library that draws it."""

from __future__ import annotations

import base64
import functools
import gzip
import math
from collections.abc import Callable, Iterable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, NamedTuple

from harness.report.board.leaderboard import Board
from harness.report.board.rows import Column, Row
from harness.report.wording import score_text, summary_text

LIBRARY = "plotly/package_data/plotly.min.js"  # of the package plotly
EVERY_TASK = "all tasks"


class Axis(NamedTuple):
    """One column that may be x or y. `value`, `text`: of a row, as the tables have them."""

    name: str
    lower_is_better: bool
    value: Callable[[Row], Any]
    text: Callable[[Row], str]


@functools.cache
def library() -> str:
    """plotly.js, gzipped, in base64: a third of its size, and equal packages make equal pages."""
    source = Path(str(distribution("plotly").locate_file(LIBRARY))).read_bytes()
    return base64.b64encode(gzip.compress(source, compresslevel=6, mtime=0)).decode()


def views(board: Board) -> list[dict[str, Any]]:
    """What there is to choose from, as JSON: a view for each task, with the numbers of its lines in leaderboard.csv,
    and one over all tasks, where there are several, with those of the table. Each has `axes`, the columns that have a
    number, and `rows` with a value for each axis, null where there is none. Views without two axes are left out."""
    found = [_view(board, column.title, _of_task(board, column), column) for column in board.columns]
    if len(board.counted) > 1:
        found.append(_view(board, EVERY_TASK, board.rows, None))
    return [view for view in found if len(view["axes"]) > 1]


def _of_task(board: Board, column: Column) -> list[Row]:
    return [row.on(column.title) for row in board.rows if column.title in row.cells]


def _view(board: Board, title: str, rows: Iterable[Row], column: Column | None) -> dict[str, Any]:
    rows = [row for row in rows if row.scored]
    axes = [axis for axis in _axes(board, column) if any(_number(axis.value(row)) is not None for row in rows)]
    return {
        "title": title,
        "axes": [{"name": axis.name, "lower_is_better": axis.lower_is_better} for axis in axes],
        "rows": [
            {
                "label": row.label,
                "method": row.runs[0].method,
                "ranked": board.is_ranked(row, column),
                "values": [_number(axis.value(row)) for axis in axes],
                "texts": [axis.text(row) for axis in axes],
                "half_width": None if column is None else row.cells[column.title].score.half_width,
                "runs": list(_runs(row, column is None)),
            }
            for row in rows
        ],
    }


def _axes(board: Board, column: Column | None) -> list[Axis]:
    """The score of a task first, then the columns beside the scores that the page's table of these rows has."""
    beside = [each for each in board.table if "page" in each.forms and each.shown(board.rows)]
    tasks = board.counted if column is None else [column]
    found = [Axis(each.heading, each.lower_is_better(tasks), each.value, each.text_of) for each in beside]
    if column is None:
        return sorted(found, key=lambda axis: axis.name != "average")
    return [_score(column), *(axis for axis in found if axis.name != "average")]


def _score(column: Column) -> Axis:
    return Axis(
        column.metric.replace("_", " "),
        not column.higher_is_better,
        lambda row: row.cells[column.title].score.mean,
        lambda row: summary_text(row.cells[column.title].score),
    )


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _runs(row: Row, name_tasks: bool) -> Iterable[str]:
    """The runs behind the row, a line each."""
    for title, cell in row.cells.items():
        for run in cell.scored:
            if run.score is not None:
                yield f"{f'{title}, ' * name_tasks}seed {run.seed}: {score_text(run.score)} · {run.run_id}"
