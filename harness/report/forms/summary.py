"""What a leaderboard shows, in sentences made of its records: how much was run, over how many seeds, who is best."""

from __future__ import annotations

from collections.abc import Sequence

from harness.report.board.leaderboard import Board
from harness.report.board.rows import Column, Row
from harness.report.redact import cut
from harness.report.wording import score_text


def what_it_shows(board: Board) -> list[str]:
    """The sentences: the extent, its seeds, and one for each task."""
    return [_extent(board), _seeds(board), *(_best(board, column) for column in board.columns)]


def _extent(board: Board) -> str:
    runs = {run.run_id: run for row in board.rows for run in row.runs}
    methods = {run.method for run in runs.values()}
    lost = sum(run.record.score is None for run in runs.values())
    return (
        f"{_count(len(board.rows), 'configuration')} of {_count(len(methods), 'method')} on "
        f"{_count(len(board.tasks), 'task')}: {_count(len(runs), 'run')}"
        + (f", {lost} of them without a score." if lost else ", each with a score.")
    )


def _seeds(board: Board) -> str:
    """How many seeds are behind the scores; the ranked sections first, where the bests are."""
    parts = []
    for ranked, whose in ((True, ""), (False, " below the rule")):
        rows = [row for section in board.sections if section.ranked is ranked for row in section.rows]
        sizes = sorted({cell.score.n for row in rows for cell in row.cells.values() if cell.score.n})
        if sizes:
            number = _count(sizes[0], "seed") if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} seeds"
            parts.append(f"{number} behind each score{whose}")
    return ("; ".join(parts) or "No score") + "."


def _best(board: Board, column: Column) -> str:
    """The best of a task and how many do not differ significantly from it, among the rows that may be best there."""
    rows = [row for row in board.rows if board.is_ranked(row, column)]
    best = [row for row in rows if board.is_best(row, column)]
    if column.title in board.best and not best:
        return f"{cut(column.title)}: the best ({score_text(board.best[column.title])}) is a row that is not shown."
    if not best:
        return f"{cut(column.title)}: no row is called best."
    score = score_text(best[0].cells[column.title].score.mean or 0.0)
    ties = sum(board.is_tie(row, column) for row in rows if row not in best)
    others = _count(len(rows) - len(best), "other")
    return (
        f"{cut(column.title)}: best {_listed(best)} ({score}); not significantly different from it: {ties} of {others}."
    )


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + "s" * (number != 1)


def _listed(rows: Sequence[Row], most: int = 3) -> str:
    names = [row.label.replace(",", ", ") for row in rows[:most]]
    return " and ".join(names) + (f" and {len(rows) - most} more" if len(rows) > most else "")
