"""Leaderboards as Markdown and for the console."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

from tabulate import tabulate

from harness.report.board.columns import TableColumn
from harness.report.board.leaderboard import Board, words_of
from harness.report.board.rows import Column, Row
from harness.report.redact import cut, one_line
from harness.report.wording import NOTHING, TIE, cell_text, folded_label, legend, summary_text

CONSOLE_WIDTH = 110
Texts = list[str]  # a column of a table, its heading first


def markdown(boards: Iterable[Board], damaged: Iterable[str] = ()) -> str:
    """Every board as a section: table, other metrics, notes, run ids. `damaged`: run folders that were left out."""
    boards = list(boards)
    sections = ["# Leaderboard", legend(words_of(boards, "markdown")), *map(escape, _damaged_note(damaged))]
    for board in boards:
        sections += [f"## Setting {board.key}", escape(board.caption), _pipes(_main_table(board))]
        if any(column.others for column in board.columns):
            sections += ["Other metrics:", _pipes(_other_metrics(board))]
        if board.notes:
            sections += ["Notes:", "\n".join(f"- {escape(note)}" for note in board.notes)]
        sections += ["Runs:", "\n".join(_run_lines(board))]
    return "\n\n".join(sections) + "\n"


def console(board: Board, damaged: Iterable[str] = (), width: int = CONSOLE_WIDTH) -> str:
    """The table in as many blocks as it takes to stay within `width` signs, each begun by the rows' labels."""
    first = ["method", *(folded_label(row.label) for row in board.rows)]
    blocks = [[first]]
    for column in board.across("console"):
        texts = _console_scores(board, column) if isinstance(column, Column) else _beside(board, column)
        if len(blocks[-1]) > 1 and _width(_plain([*blocks[-1], texts])) > width:
            blocks.append([first])
        blocks[-1].append(texts)
    spread = (
        f"± is half the 95 % confidence interval (Student's t) over n = {board.n or 0} runs, or n as given; * best; "
        f"+ second; ≈ {TIE} by a paired test."
    )
    notes = [board.caption, *board.notes, spread, *_damaged_note(damaged)]
    lines = [textwrap.fill(note, width, subsequent_indent="  ", break_on_hyphens=False) for note in notes]
    return "\n".join([lines[0], "", "\n\n".join(map(_plain, blocks)), "", *lines[1:]])


def _beside(board: Board, column: TableColumn) -> Texts:
    """A column beside the scores."""
    return [column.heading, *(column.text_of(row) for row in board.rows)]


def _main_table(board: Board) -> list[Texts]:
    columns = [["method", *(escape(row.label) for row in board.rows)]]
    for column in board.across("markdown"):
        if isinstance(column, Column):
            cells = (_marked(board, row, column, cell_text(row.cells.get(column.title))) for row in board.rows)
            columns.append([escape(f"{column.title} ({column.metric})"), *cells])
        else:
            columns.append([escape(text) for text in _beside(board, column)])
    return columns


def _marked(board: Board, row: Row, column: Column, text: str) -> str:
    if board.is_tie(row, column):
        text += " ≈"
    if board.is_best(row, column):
        return f"**{text}**"
    return f"<u>{text}</u>" if board.is_second(row, column) else text


def _other_metrics(board: Board) -> list[Texts]:
    columns = [["method", *(escape(row.label) for row in board.rows)]]
    for column in board.columns:
        cells = [row.cells.get(column.title) for row in board.rows]
        for name in column.others:
            texts = (summary_text(cell.others[name]) if cell else NOTHING for cell in cells)
            columns.append([escape(f"{column.title} ({name})"), *texts])
    return columns


def _run_lines(board: Board) -> Iterable[str]:
    for row in board.rows:
        for title, cell in row.cells.items():
            runs = ", ".join(f"seed {run.seed} `{run.run_id}`" for run in cell.runs)
            yield f"- {escape(row.label)} on {escape(title)}: {runs}"


def _console_scores(board: Board, column: Column) -> Texts:
    metric = column.metric.replace(", ", "\n")
    texts = [f"{column.title}\n{metric}"]
    for row in board.rows:
        cell = row.cells.get(column.title)
        text = cell_text(cell, with_n=cell is not None and cell.score.n != board.n)
        mark = "*" if board.is_best(row, column) else "+" if board.is_second(row, column) else ""
        mark += "≈" if board.is_tie(row, column) else ""
        texts.append(text.replace("; ", "\n") + (f" {mark}" if mark else ""))
    return texts


def _pipes(columns: list[Texts]) -> str:
    return _aligned(columns, "github")


def _plain(columns: list[Texts]) -> str:
    return _aligned(columns, "simple")


def _aligned(columns: list[Texts], form: str) -> str:
    alignment = ["left"] + ["right"] * (len(columns) - 1)
    headings, *rows = zip(*columns, strict=True)
    return tabulate(rows, headings, tablefmt=form, disable_numparse=True, colalign=alignment)


def _width(text: str) -> int:
    return max(len(line) for line in text.splitlines())


def _damaged_note(damaged: Iterable[str]) -> list[str]:
    names = [one_line(cut(name)) for name in damaged]
    return [f"Left out, since their records cannot be read: {', '.join(names)}."] if names else []


def escape(text: str) -> str:
    """Signs that Markdown would take for its own, an underscore within a word left alone."""
    text = re.sub(r"([\\|*`<>]|(?<=\])[(:])", r"\\\1", one_line(text))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)
