"""Boards whose rows stand in sections of a test's own."""

from __future__ import annotations

import dataclasses
import functools

from harness.report.board.leaderboard import Board
from harness.report.board.rows import Section


class Sectioned(Board):
    """A board with its last rows in a section of their own; see `with_section`."""

    last: Section

    @functools.cached_property
    def sections(self) -> tuple[Section, ...]:
        rest = tuple(row for row in self.rows if row not in self.last.rows)
        return Section("", rest), self.last


def with_section(board: Board, title: str, *labels: str, ranked: bool = True) -> Board:
    """The board with the rows of these labels in a section of this title below the others."""
    made = Sectioned(**{field.name: getattr(board, field.name) for field in dataclasses.fields(board)})
    rows = tuple(row for row in board.rows if row.label in labels)
    object.__setattr__(made, "last", Section(title, rows, ranked))
    return made
