"""What is shown of leaderboards: rows and columns by their names, and groups of rows under a heading.

A selection narrows tables and moves their rows. It changes no figure: the best, the second and ties stay those of all
rows, and averages those of all tasks.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from harness.errors import InputError, unknown
from harness.notation import parse_choice
from harness.report.board.columns import TableColumn
from harness.report.board.leaderboard import Board, arranged
from harness.report.board.rows import Column, Row
from harness.spec import EVERYTHING, Selection

SUFFIX = re.compile(r"( \([^()]*\)| #[0-9a-f]{6})+$")  # what tells labels apart beside their parameters: " (tuned 4)"
Tell = Callable[[str], None]


def selected(boards: Sequence[Board], selection: Selection, tell: Tell | None = None) -> list[Board]:
    """The boards as the selection shows them; those that have none of its rows or of its scores are left out.

    `tell`: gets a line about each name that matches nothing; None: that is an error. Raises InputError for it, and
    where nothing is left to show.
    """
    if not boards or selection == EVERYTHING:
        return list(boards)
    labels = [row.label for board in boards for row in board.rows]
    for error in (*missed_rows(selection, labels), *_missed_columns(selection, boards)):
        if tell is None:
            raise error
        tell(f"shown without it: {error}")
    found = [_columns(_rows(board, selection), selection.columns) for board in boards]
    shown = [board for board in found if board.rows and board.columns]
    if not shown:
        raise InputError("nothing is left to show: give --columns with a task, and rows that have runs")
    return shown


def missed_rows(selection: Selection, labels: Iterable[str]) -> list[InputError]:
    """An error for each pattern of the rows and groups that matches none of these labels."""
    labels = list(dict.fromkeys(labels))
    names = {name for label in labels for name in parameters_of(label)}
    errors = [
        unknown("row to show", pattern, labels) for pattern in selection.rows if not any(matching([pattern], labels))
    ]
    for patterns in selection.group.values():
        for pattern in split_group(patterns):
            if not any(_in_group(pattern, label) for label in labels):
                errors.append(unknown("row or parameter to group by", pattern, [*labels, *names]))
    return errors


def matching(patterns: Iterable[str], labels: Sequence[str]) -> list[str]:
    """The labels that match a pattern, in the order of the patterns; those of one pattern in their own."""
    return list(dict.fromkeys(label for pattern in patterns for label in labels if matches(pattern, label)))


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern is the name, * for any signs and ? for any one; of a row's label what tells it apart beside its
    parameters may be left out: "lora" is "lora (tuned 4)"."""
    words = pattern.replace(", ", ",")  # as the console folds labels
    regular = re.compile("".join({"*": ".*", "?": "."}.get(sign, re.escape(sign)) for sign in words), re.DOTALL)
    return any(regular.fullmatch(each) for each in (name, SUFFIX.sub("", name)))


def parameters_of(label: str) -> Mapping[str, Any]:
    """The parameters that a label names."""
    try:
        return parse_choice(SUFFIX.sub("", label))[1]
    except InputError:  # of a table, whose size stands in place of its entries
        return {}


def split_group(patterns: str) -> list[str]:
    """The patterns of a group: "ranks_of|size_of"."""
    return [part.strip() for part in patterns.split("|") if part.strip()]


def names_of(column: TableColumn | Column) -> tuple[str, ...]:
    """What a column may be called: "glue/mnli, validation_mismatched" is "glue/mnli:mismatched", too."""
    if isinstance(column, TableColumn):
        return column.name, column.heading
    if not column.is_further:
        return (column.title,)
    task, _, split = column.title.rpartition(", ")
    return column.title, f"{task}:{split}", f"{task}:{split.partition('_')[2] or split}"


def _in_group(pattern: str, label: str) -> bool:
    return pattern in parameters_of(label) or matches(pattern, label)


def _rows(board: Board, selection: Selection) -> Board:
    """The board with the rows that are asked for, in groups."""
    labels = {row.label: row for row in board.rows}
    kept: list[Row] = list(board.rows)
    if selection.rows:
        kept = [labels[label] for label in matching(selection.rows, list(labels))]
    groups: dict[str, frozenset[str]] = {}
    free = {row.label for row in kept}
    for title, patterns in selection.group.items():
        of_group = {label for label in free if any(_in_group(each, label) for each in split_group(patterns))}
        free -= of_group
        groups |= {title: frozenset(of_group)} if of_group else {}
    hidden = len(board.rows) - len(kept)
    return arranged(dataclasses.replace(board, groups=groups, hidden=hidden), kept)


def _columns(board: Board, names: Sequence[str]) -> Board:
    """The board with the columns that are asked for."""
    if not names:
        return board
    picked: dict[str, TableColumn | Column] = {}
    for name in names:
        picked |= {names_of(column)[0]: column for column in _every(board) if _is_called(column, name)}
    scores = tuple(column for column in picked.values() if isinstance(column, Column))
    hidden = [column.title for column in board.counted if column not in scores]
    notes = board.notes
    if "average" in picked and hidden:
        notes = (*notes, f"average: over all tasks of the setting, those not shown too: {', '.join(hidden)}")
    return dataclasses.replace(board, columns=scores, picked=tuple(picked), notes=notes)


def _every(board: Board) -> list[TableColumn | Column]:
    return [*board.table, *board.columns]


def _is_called(column: TableColumn | Column, name: str) -> bool:
    """Further splits are columns only by names of their own."""
    first, *others = names_of(column)
    is_further = isinstance(column, Column) and column.is_further
    return name in (first, *others) or (not is_further and matches(name, first))


def _missed_columns(selection: Selection, boards: Sequence[Board]) -> list[InputError]:
    columns = [column for board in boards for column in _every(board)]
    known = dict.fromkeys(names_of(column)[-1 if isinstance(column, Column) else 0] for column in columns)
    return [
        unknown("column to show", name, known)
        for name in selection.columns
        if not any(_is_called(column, name) for column in columns)
    ]
