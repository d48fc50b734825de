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
    rows = [row for section in board.sections if section.ranked for row in section.rows]
    best = [row for row in rows if board.is_best(row, column)]
    if not best:
        return f"{cut(column.title)}: no row is called best."
    scores = [row.cells[column.title].score for row in best]
    head = f"{cut(column.title)}: best {_listed(best)} ({score_text(scores[0].mean or 0.0)})"
    others = sum(column.title in row.cells and row.cells[column.title].score.n > 0 for row in rows) - len(best)
    if max(score.n for score in scores) < 2:
        return f"{head}, by a single seed, which allows no test."
    ties = sum(board.is_tie(row, column) for row in rows if row not in best)
    return f"{head}; not significantly different from it: {ties} of {_count(others, 'other')}."


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + "s" * (number != 1)


def _listed(rows: Sequence[Row], most: int = 3) -> str:
    names = [row.label.replace(",", ", ") for row in rows[:most]]
    return " and ".join(names) + (f" and {len(rows) - most} more" if len(rows) > most else "")
