"""Leaderboards as LaTeX tables."""

from __future__ import annotations

from collections.abc import Iterable

from harness.report.board.leaderboard import Board, words_of
from harness.report.board.rows import Column, Row
from harness.report.forms.latex_cells import STYLES, Text, joined, number, plain, small
from harness.report.forms.latex_table import Part, Table, document
from harness.report.redact import cut
from harness.report.wording import failures_text, legend, score_text, spread_text


def latex(boards: Iterable[Board], damaged: Iterable[str] = (), style: str = STYLES[0]) -> str:
    """One table for each board, to be taken in with \\input. `damaged`: run folders that were left out; `style`: one of
    `harness.report.forms.latex_cells.STYLES`, see `number` there."""
    names = ", ".join(cut(name) for name in damaged)
    comments = [f"Left out, since their records cannot be read: {names}"] if names else []
    return document((_table(board, style) for board in boards), comments)


def _table(board: Board, style: str) -> Table:
    across = board.across("latex")
    scores = [isinstance(column, Column) for column in across]
    families = {column.title.partition("/")[0] if "/" in column.title else "" for column in board.columns}
    header = [
        _short(column, families) if isinstance(column, Column) else column.heading.capitalize() for column in across
    ]

    def texts(row: Row) -> list[Text]:
        cells = (
            _score(board, row, column, style) if isinstance(column, Column) else plain(column.text_of(row))
            for column in across
        )
        return [plain(row.label.replace(",", ", ")), *cells]

    return Table(
        label=f"leaderboard-{board.key}",
        caption=f"{board.caption} {board.among}".strip(),
        header=["Method", *header],
        parts=[Part([*map(texts, part.rows)], part.title, grey=not part.ranked) for part in board.sections],
        sides="l" + "".join("l" if score else "r" for score in scores),
        notes=[_metrics(board), _legend(board), *board.notes],
    )


def _score(board: Board, row: Row, column: Column, style: str) -> Text:
    """Mean, interval, the number of runs where it is not that of most scores, and failures."""
    cell = row.cells.get(column.title)
    if cell is None:
        return plain("-")
    texts = []
    if cell.score.mean is not None:
        interval = None if cell.score.half_width is None else spread_text(cell.score)
        best, second = board.is_best(row, column), board.is_second(row, column)
        tie = board.is_tie(row, column)
        texts.append(number(score_text(cell.score.mean), interval, style, best, second, tie))
        if cell.score.n != board.n:
            texts.append(plain(f"({cell.score.n})"))
    if cell.failures:
        texts.append(small(failures_text(cell)))
    return joined(texts)


def _short(column: Column, families: set[str]) -> str:
    """The task's name, without its family where all tasks are of one ("cola" for "glue/cola")."""
    return column.title.partition("/")[2] if len(families) == 1 and "" not in families else column.title


def _metrics(board: Board) -> str:
    """Which metric each column's score is."""
    tasks: dict[str, list[str]] = {}
    for column in board.columns:
        tasks.setdefault(column.metric, []).append(column.title)
    listed = "; ".join(f"{metric} on {', '.join(titles)}" for metric, titles in tasks.items())
    return f"Metrics: {listed}."


def _legend(board: Board) -> str:
    seeds = "1 seed" if board.n == 1 else f"{board.n or 'no'} seeds"
    over = f"{seeds}, or as many as are given in brackets"
    return legend(words_of([board], "latex"), over, nothing="\u2013", alone="no ±")
