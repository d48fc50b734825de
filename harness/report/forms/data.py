"""Leaderboards as data, numbers unrounded: a tidy table, how a table becomes CSV, and JSON values."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pandas as pd

from harness.report.board.columns import Value
from harness.report.board.leaderboard import Board
from harness.report.board.rows import Column, Row, whole
from harness.report.redact import cut

FAILURES = ("unsupported", "diverged", "out_of_memory", "failed")
FORMULA = tuple(
    "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"
)  # what a cell begins with that a spreadsheet would carry out; the last: wide forms


def tidy(boards: Iterable[Board]) -> pd.DataFrame:
    """One row per cell and metric (`is_headline`: the score), numbers unrounded, for the CSV file.

    `ties_with_best`: not significantly different from the column's best by a paired test. `interval_95` is the
    half-width of the Student t interval. Runs that gave no score are counted by status; the columns after these are the
    table's own, of the cell's runs; run_ids holds all of them.
    """
    rows: list[dict[str, Any]] = []
    for board in boards:
        for row in board.rows:
            for column in board.columns:
                if column.title in row.cells:
                    rows += _tidy_cell(board, row, column)
    return pd.DataFrame(rows, dtype=object)


def csv_text(table: pd.DataFrame) -> str:
    """A table as the text of a CSV file. Text that a spreadsheet would take for a formula gets a "'" before it; numbers
    are left as they are."""
    columns = [pd.Series([_shown(value) for value in table.iloc[:, at]], dtype=object) for at in range(table.shape[1])]
    made = pd.concat(columns, axis=1) if columns else pd.DataFrame()
    made.columns = pd.Index([_shown(name) for name in table], dtype=object)
    return made.to_csv(index=False, lineterminator="\n")


def structured(boards: Iterable[Board]) -> dict[str, Any]:
    """The leaderboards as JSON values: settings, their columns and rows, and each cell's numbers and runs."""
    return {"settings": [_setting(board) for board in boards]}


def _setting(board: Board) -> dict[str, Any]:
    columns = [
        {"title": column.title, "metric": column.headline, "higher_is_better": column.higher_is_better}
        for column in board.columns
    ]
    return {
        "key": board.key,
        "caption": board.caption,
        "best_among": board.among,
        "notes": list(board.notes),
        "columns": columns,
        "rows": [
            {
                "label": row.label,
                "provenance": board.provenance.get(row.runs[0].spec.method),
                **{column.key("json"): column.value(row) for column in board.table if "json" in column.forms},
                "cells": {
                    column.title: _structured_cell(board, row, column)
                    for column in board.columns
                    if column.title in row.cells
                },
            }
            for row in board.rows
        ],
    }


def _structured_cell(board: Board, row: Row, column: Column) -> dict[str, Any]:
    cell = row.cells[column.title]
    scores = {run.run_id: run.score for run in cell.scored}
    return {
        "n": cell.score.n,
        "mean": cell.score.mean,
        "standard_deviation": cell.score.standard_deviation,
        "interval_95": cell.score.half_width,
        "is_ranked": board.is_ranked(row, column),
        "is_best": board.is_best(row, column),
        "is_second": board.is_second(row, column),
        "ties_with_best": board.is_tie(row, column),
        "runs": [
            {"run_id": run.run_id, "seed": run.seed, "status": run.status, "score": scores.get(run.run_id)}
            for run in cell.runs
        ],
    }


def _shown(value: Any) -> Any:
    """A value as a CSV cell holds it."""
    if not isinstance(value, str) or not value.startswith(FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def _whole(value: Value) -> Value:
    return value if isinstance(value, str) else whole(value)


def _cut_json(values: dict[str, Any]) -> str:
    return json.dumps(cut(values), sort_keys=True)


def _tidy_cell(board: Board, row: Row, column: Column) -> Iterable[dict[str, Any]]:
    cell = row.cells[column.title]
    spec = cell.runs[0].spec
    identity = {
        "setting": board.key,
        "setting_text": board.caption,
        "label": row.label,
        "method": cut(spec.method),
        "provenance": board.provenance.get(spec.method),
        "method_version": spec.method_version,
        "method_parameters": _cut_json(spec.method_parameters),
        "task": cut(spec.task),
        "task_version": spec.task_version,
        "task_parameters": _cut_json(spec.task_parameters),
        "data_fingerprint": spec.data_fingerprint,
        "model_fingerprint": spec.model_fingerprint,
    }
    counts = {"runs": len(cell.runs), "done": sum(run.status == "done" for run in cell.runs)}
    counts |= {status: sum(run.status == status for run in cell.runs) for status in FAILURES}
    alone = row.on(column.title)
    beside = {each.key("csv"): _whole(each.value(alone)) for each in board.table if "csv" in each.forms}
    trace = {"seeds": json.dumps([run.seed for run in cell.runs]), "run_ids": " ".join(run.run_id for run in cell.runs)}
    for metric, summary in {column.headline: cell.score, **cell.others}.items():
        numbers = {"n": summary.n, "mean": summary.mean, "standard_deviation": summary.standard_deviation}
        numbers |= {"interval_95": summary.half_width}
        is_headline = metric == column.headline
        named = {"column": column.title, "metric": metric, "is_headline": is_headline}
        if is_headline:
            named |= {"is_best": board.is_best(row, column), "ties_with_best": board.is_tie(row, column)}
        yield identity | named | numbers | {"settings": row.tuning} | counts | beside | trace
