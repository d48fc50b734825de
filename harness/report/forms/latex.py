r"""Leaderboards as LaTeX tables that need \usepackage{booktabs} and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from harness.report.board.leaderboard import Board, words_of
from harness.report.board.rows import Column, Row
from harness.report.forms.latex_signs import escape
from harness.report.names import StandIns, lines_of
from harness.report.redact import cut, one_line
from harness.report.wording import legend, score_text, spread_text

NOTHING = "--"
LINE_WIDTH = 345.0  # points: the narrowest of the usual classes (article); a wider table becomes several blocks
SIGN, SMALL_SIGN, GAP = 4.6, 3.9, 6.0  # points: a sign of \footnotesize and of \scriptsize, the space between columns
LABEL_SIGNS = 24
TITLE_SIGNS = 32


def latex(boards: Iterable[Board], damaged: Iterable[str] = ()) -> str:
    """One table environment per board, to be taken in with \\input. `damaged`: run folders that were left out."""
    names = ", ".join(cut(name) for name in damaged)
    lines = [r"% Needs \usepackage{booktabs}."]
    if names:
        lines.append(f"% Left out, since their records cannot be read: {one_line(names)}")
    return "\n\n".join(["\n".join(lines), *(_table(board) for board in boards)]) + "\n"


class _Text(NamedTuple):
    """What stands in a cell: LaTeX, and about how wide it is in points."""

    latex: str
    width: float


def _table(board: Board) -> str:
    """The table, with numbers for what LaTeX may not know: the letters are in comments above it, the code points in
    notes below."""
    stand_ins = StandIns(r"[^\x00-\x7f]")
    lines = [
        r"\begin{table}[tbp]",
        r"\centering",
        rf"\caption{{{escape(board.caption)} {_metrics(board)} {escape(board.among)} {escape(_legend(board))}}}",
        rf"\label{{tab:leaderboard-{board.key}}}",
        rf"\medskip\footnotesize\setlength{{\tabcolsep}}{{{GAP / 2:g}pt}}",
        "\n\\par\\medskip\n".join(_tabular(block) for block in _blocks(_columns(board))),
    ]
    lines = [stand_ins.put(line, "{{[}}{}{{]}}") for line in lines]
    notes = [stand_ins.put(escape(note), "{{[}}{}{{]}}") for note in board.notes]
    notes += [escape(line) for line in stand_ins.key]
    if notes:
        text = r" \\ ".join(notes)
        lines.append(rf"\par\smallskip\begin{{minipage}}{{\linewidth}}\scriptsize\raggedright {text}\end{{minipage}}")
    comments = [f"% [{number}] is {one_line(run)}" for number, run in enumerate(stand_ins.runs, start=1)]
    return "\n".join([*comments, *lines, r"\end{table}"])


def _tabular(columns: list[list[_Text]]) -> str:
    header, *rows = [" & ".join(text.latex for text in texts) + r" \\" for texts in zip(*columns, strict=True)]
    start = rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}"
    return "\n".join([start, r"\toprule", header, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"])


def _blocks(columns: list[list[_Text]]) -> list[list[list[_Text]]]:
    """The columns in as many groups as it takes to stay within the line, each begun by the first column."""
    first, *others = columns
    widths = [max(text.width for text in column) + GAP for column in columns]
    blocks, used = [[first]], widths[0]
    for column, width in zip(others, widths[1:], strict=True):
        if used + width > LINE_WIDTH and len(blocks[-1]) > 1:
            blocks.append([first])
            used = widths[0]
        blocks[-1].append(column)
        used += width
    return blocks


def _legend(board: Board) -> str:
    over = f"{board.n or 'no'} seeds, or as many as are given in brackets"
    return legend(words_of([board], "latex"), over, nothing="\u2013")


def _columns(board: Board) -> list[list[_Text]]:
    """The whole table by columns, each begun by its header."""
    columns = [[_plain("Method"), *(_label(row.label) for row in board.rows)]]
    for column in board.across("latex"):
        if isinstance(column, Column):
            columns.append([_title(column, board.columns), *(_score(board, row, column) for row in board.rows)])
        else:
            columns.append([_plain(column.heading.capitalize()), *(_plain(column.text_of(row)) for row in board.rows)])
    return columns


def _score(board: Board, row: Row, column: Column) -> _Text:
    """Mean, spread (below the mean where there are several tasks) and failures."""
    cell = row.cells.get(column.title)
    if cell is None:
        return _plain("-")
    lines = []
    if cell.score.mean is not None:
        spread = f"±{spread_text(cell.score)}"
        spread += "" if cell.score.n == board.n else f" ({cell.score.n})"
        mean = _number(score_text(cell.score.mean), board, row, column)
        small = _small(spread)
        one_line = _Text(f"{mean.latex} {small.latex}", mean.width + small.width + SIGN)
        lines = [one_line] if len(board.columns) == 1 else [mean, small]
    for status, count in cell.failures:
        lines += [_small(f"{count} of {len(cell.runs)}"), _small(status)]
    return _stacked(lines, "r")


def _number(text: str, board: Board, row: Row, column: Column) -> _Text:
    width = len(text) * SIGN
    latex = f"${text}$"
    if board.is_best(row, column):
        latex, width = rf"\textbf{{\boldmath {latex}}}", width * 1.15
    elif board.is_second(row, column):
        latex = rf"\underline{{{latex}}}"
    return _Text(latex + r"$^{\approx}$", width + SIGN) if board.is_tie(row, column) else _Text(latex, width)


def _title(column: Column, columns: Iterable[Column]) -> _Text:
    """The task's name, without its family where all tasks are of one ("cola" for "glue/cola")."""
    families = {other.title.partition("/")[0] if "/" in other.title else "" for other in columns}
    short = column.title.partition("/")[2] if len(families) == 1 and "" not in families else column.title
    return _stacked([_plain(line) for line in lines_of(short, TITLE_SIGNS)], "r")


def _metrics(board: Board) -> str:
    """Which metric each column's score is."""
    tasks: dict[str, list[str]] = {}
    for column in board.columns:
        tasks.setdefault(column.metric, []).append(column.title)
    listed = "; ".join(f"{escape(metric)} on {', '.join(map(_breakable, titles))}" for metric, titles in tasks.items())
    return f"Metrics: {listed}."


def _breakable(name: str) -> str:
    """A name in running text."""
    return r"\allowbreak{}".join(map(escape, re.findall(rf".{{1,{TITLE_SIGNS}}}", name)))


def _label(label: str) -> _Text:
    """A method's label, its brackets in smaller type on lines of their own."""
    name, bracket, rest = label.partition("[")
    if not bracket:
        return _plain(label)
    return _stacked([_plain(name), *(_small(line) for line in _wrapped(bracket + rest, LABEL_SIGNS))], "l")


def _plain(text: str) -> _Text:
    return _Text(NOTHING if text == "-" else escape(text), len(text) * SIGN)


def _small(text: str) -> _Text:
    return _Text(rf"{{\scriptsize {escape(text)}}}", len(text) * SMALL_SIGN)


def _stacked(lines: list[_Text], side: str) -> _Text:
    if len(lines) == 1:
        return lines[0]
    stack = r" \\ ".join(line.latex for line in lines)
    latex = rf"\begin{{tabular}}[t]{{@{{}}{side}@{{}}}}{stack}\end{{tabular}}"
    return _Text(latex, max(line.width for line in lines))


def _wrapped(text: str, width: int) -> list[str]:
    """The text in lines of about `width` signs, broken after commas."""
    lines = [""]
    for part in re.split(r"(?<=,)", text):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return lines
