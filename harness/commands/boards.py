"""The leaderboards of a results folder, as every command that reads them has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness import installed
from harness.record.chosen import chosen
from harness.record.garbage import uncollected
from harness.record.store import RecordStore
from harness.report.board.leaderboard import Board, leaderboards
from harness.report.board.parents import grouped
from harness.report.board.runs import runs_of


def boards_below(
    results: Path, methods: Sequence[str] | None = None, tasks: Sequence[str] | None = None
) -> tuple[RecordStore, list[Board]]:
    """The store, and a board for each setting of its runs of these methods and tasks (None: all); [] without runs.

    Raises InputError for names without records, and for a `parents.json` that is none.
    """
    store, found = chosen(results, methods, tasks)
    naming = installed.naming_of(record.spec.method for record in found.records)
    with uncollected():
        return store, leaderboards(runs_of(grouped(store, found.records, naming), naming))
