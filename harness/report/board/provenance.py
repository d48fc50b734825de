"""Where the methods of a table come from, in notes below it: the code behind a number is part of what it means."""

from __future__ import annotations

from collections import defaultdict

from harness.report.board.leaderboard import Board
from harness.report.redact import cut


def provenance_notes(board: Board) -> tuple[str, ...]:
    """A line for each provenance with the board's methods of it, in the order of the rows; none where the board is not
    told."""
    methods: dict[str, dict[str, None]] = defaultdict(dict)
    for row in board.rows:
        if (method := row.runs[0].spec.method) in board.provenance:
            methods[board.provenance[method]][method] = None
    return tuple(cut(f"Provenance of {', '.join(names)}: {words}.") for words, names in methods.items())
