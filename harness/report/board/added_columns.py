"""Columns that packages add to the leaderboard: what is taken of them, and what a table's rows let be made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from harness.report.board.columns import COLUMNS, FORMS, RESERVED, TableColumn
from harness.report.board.rows import Row


def with_added(added: Mapping[str, object]) -> tuple[tuple[TableColumn, ...], list[str]]:
    """The report's own columns with those that packages add, by the names of their entries, and a line for each of
    these that is none or has the name of another."""
    columns, told = list(COLUMNS), []
    for name, column in added.items():
        if not isinstance(column, TableColumn):
            told.append(f"column '{name}' is {column!r}, which is no harness.report.board.columns.TableColumn")
        elif taken := sorted(_keys(column) & RESERVED.union(*map(_keys, columns))):
            told.append(f"column '{name}' is left out: there is a column '{taken[0]}' already")
        else:
            columns.append(column)
    return tuple(columns), told


def _keys(column: TableColumn) -> set[str]:
    """All its names: for `--sort`, and in data."""
    return {column.name, *column.keys.values()}


def usable(columns: Iterable[TableColumn], rows: Sequence[Row]) -> tuple[tuple[TableColumn, ...], list[str]]:
    """The columns that can be made of these rows, and a line for each that cannot: a package's fault costs no table."""
    kept, told = [], []
    for column in columns:
        try:
            if column not in COLUMNS:
                if not isinstance(column.shown(rows), bool) or not set(column.forms) <= set(FORMS):
                    raise ValueError(f"its forms are {column.forms!r}, and `shown` gives {column.shown(rows)!r}")
                for row in rows:
                    _check(column, row)
        except Exception as error:
            told.append(f"The column '{column.name}' is left out ({type(error).__name__}: {error}).")
        else:
            kept.append(column)
    return tuple(kept), told


def _check(column: TableColumn, row: Row) -> None:
    for each in (row, *map(row.on, row.cells)):
        value = column.value(each)
        known = value is None or isinstance(value, (str, int)) or (type(value) is float and math.isfinite(value))
        if not known or not isinstance(column.text_of(each), str):
            raise ValueError(f"its value is {value!r}")
