"""The report as one self-contained HTML page: tables that sort, pictures, and links from each cell to its runs."""

from __future__ import annotations

import base64
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from harness.report.board.columns import TableColumn
from harness.report.board.leaderboard import Board, words_of
from harness.report.board.rows import Cell, Column, Row
from harness.report.forms.plain import spaced
from harness.report.forms.scatter import library, views
from harness.report.forms.summary import what_it_shows
from harness.report.redact import cut, one_line
from harness.report.tables.table import Entry, Table
from harness.report.wording import TIE, cell_text, human, legend, score_text

TABLES = {  # by name: what a table of the page shows
    "costs": "Costs of each row in all: its runs on every task and seed, failed ones too, and its searches",
    "learning_rates": "Learning-rate sensitivity: scores of the searches' trials on the holdout",
    "rank_aurac": "Area under the rank curves, comparable only on the same ranks",
}


def page(
    boards: Sequence[Board],
    damaged: Iterable[str],
    tables: Mapping[str, Mapping[str, pd.DataFrame]],
    pictures: Mapping[str, Sequence[tuple[str, Path]]],
    further: Iterable[Table] = (),
) -> str:
    """The page. By a board's key, `tables`: frames by their names, of which it shows some, and `pictures`: titles and
    PNG files, which are taken into the page but for links to others; `further`: tables, of any board. Hyperlinks lead
    to runs/<run_id>/record.json beside it. Scripts and styles are in it: it loads nothing."""
    further = list(further)
    sections = [
        _section(
            board,
            tables.get(board.key, {}),
            pictures.get(board.key, ()),
            [table for table in further if table.key == board.key],
        )
        for board in boards
    ]
    return _template().render(
        sections=sections,
        legend=legend(words_of(boards, "page")),
        tie=TIE,
        damaged=[one_line(cut(name)) for name in damaged],
        library=library() if any(section["views"] for section in sections) else "",
    )


@functools.cache
def _template() -> Template:
    files = FileSystemLoader(Path(__file__).parent)
    found = Environment(loader=files, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return found.get_template("page.html")


def _section(
    board: Board,
    tables: Mapping[str, pd.DataFrame],
    pictures: Sequence[tuple[str, Path]],
    further: Sequence[Table],
) -> dict[str, Any]:
    places = {row.label: place for place, row in enumerate(board.rows)}
    headings = [("method", "")]
    for column in board.across("page"):
        if isinstance(column, Column):
            headings.append((column.title, column.metric.replace("_", " ")))
        else:
            headings.append((column.heading, ""))
    return {
        "key": board.key,
        "caption": f"{board.caption} Intervals are over n = {board.n or 0} runs, or n as given. {board.among}",
        "headings": headings,
        "shows": what_it_shows(board),
        "groups": [
            {
                "title": section.title,
                "ranked": section.ranked,
                "rows": [_row(board, row, places[row.label]) for row in section.rows],
            }
            for section in board.sections
        ],
        "tables": [(TABLES[name], _plain(tables[name])) for name in TABLES if name in tables and len(tables[name])],
        "further": [_further(table) for table in further],
        "cells": _details(board),
        "views": views(board),
        "notes": board.notes,
        "pictures": [
            (title, base64.b64encode(path.read_bytes()).decode())
            for title, path in pictures
            if path.is_file() and not path.is_symlink()
        ],
    }


def _row(board: Board, row: Row, place: int) -> list[dict[str, Any]]:
    """The row's cells: text, the number it sorts by, and what it is."""
    cells = [_text(row.label.replace(",", ", "))]
    for across, column in enumerate(board.across("page")):
        if isinstance(column, Column):
            cells.append(_score(board, row, column, f"{board.key}-{place}-{across}"))
        else:
            cells.append(_beside(column, row))
    return cells


def _beside(column: TableColumn, row: Row) -> dict[str, Any]:
    value = column.value(row)
    return _text(value) if isinstance(value, str) else _number(column.text_of(row), value)


def _score(board: Board, row: Row, column: Column, anchor: str) -> dict[str, Any]:
    cell = row.cells.get(column.title)
    if cell is None:
        return _number("-", None)
    kind = "best" if board.is_best(row, column) else "second" if board.is_second(row, column) else ""
    tie = " ≈" if board.is_tie(row, column) else ""
    text = cell_text(cell, with_n=cell.score.n != board.n)
    return _number(text + tie, cell.score.mean) | {"kind": kind, "anchor": anchor}


def _details(board: Board) -> list[dict[str, Any]]:
    """Where each cell's link leads: its runs."""
    return [
        {"anchor": f"{board.key}-{place}-{across}", "title": f"{row.label} on {column.title}", "runs": _runs(cell)}
        for place, row in enumerate(board.rows)
        for across, column in enumerate(board.across("page"))
        if isinstance(column, Column) and (cell := row.cells.get(column.title)) is not None
    ]


def _runs(cell: Cell) -> list[dict[str, Any]]:
    scores = {run.run_id: score_text(run.score) for run in cell.scored if run.score is not None}
    return [{"run_id": run.run_id, "seed": run.seed, "result": scores.get(run.run_id, run.status)} for run in cell.runs]


def _further(table: Table) -> dict[str, Any]:
    """A table of text and numbers as a table of the page."""
    rows = [[_entry(entry, place < table.left) for place, entry in enumerate(row)] for row in table.rows]
    return {"title": table.title, "headings": list(table.headings), "groups": _one_group(rows), "notes": table.notes}


def _entry(entry: Entry, is_name: bool) -> dict[str, Any]:
    return _text(spaced(str(entry))) if is_name else _number(str(entry), entry.number)


def _plain(table: pd.DataFrame) -> dict[str, Any]:
    """A frame as a table of the page."""
    rows = [
        [_value(str(name), value) for name, value in zip(table, row, strict=True)]
        for row in table.astype(object).itertuples(index=False, name=None)
    ]
    headings = [str(name).replace("_", " ").replace("interval 95", "± (95 %)") for name in table]
    return {"headings": [(heading, "") for heading in headings], "groups": _one_group(rows)}


def _one_group(rows: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [{"title": "", "ranked": True, "rows": rows}]


def _value(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return _text(value)
    if pd.isna(value):
        return _number("-", None)
    if name.endswith("_bytes"):
        return _number(human(value, "B"), value)
    return _number(f"{value:,.0f}" if value == int(value) else f"{value:,.4g}", value)


def _text(text: str) -> dict[str, Any]:
    return {"text": text, "sort": text, "kind": "text", "anchor": None}


def _number(text: str, value: float | None) -> dict[str, Any]:
    return {"text": text, "sort": "" if value is None else repr(float(value)), "kind": "", "anchor": None}
