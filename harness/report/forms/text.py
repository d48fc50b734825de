"""Leaderboards as Markdown and for the console."""

from __future__ import annotations

import functools
import re
import shutil
import textwrap
from collections.abc import Callable, Container, Iterable
from typing import Any

from tabulate import SEPARATING_LINE, tabulate

from harness.report.board.columns import TableColumn
from harness.report.board.leaderboard import Board, words_of
from harness.report.board.rows import Column, Row
from harness.report.redact import cut, one_line
from harness.report.wording import NOTHING, TIE, cell_text, folded_label, legend, summary_text

CONSOLE_WIDTH = 110
FEWER = "(fewer seeds)"  # stands above rows that are not ranked
Texts = list[str]  # a column of a table, its heading first
Lines = list[Row | str]  # of a table: a row, or a heading across


def markdown(boards: Iterable[Board], damaged: Iterable[str] = ()) -> str:
    """Every board as a section: table, other metrics, notes, run ids. `damaged`: run folders that were left out."""
    boards = list(boards)
    sections = ["# Leaderboard", legend(words_of(boards, "markdown")), *map(escape, _damaged_note(damaged))]
    for board in boards:
        sections += [
            f"## Setting {board.key}",
            escape(f"{board.caption} {board.among}".strip()),
            table(board),
        ]
        if any(column.others for column in board.columns):
            sections += ["Other metrics:", _pipes(_other_metrics(board))]
        if board.notes:
            sections += ["Notes:", "\n".join(f"- {escape(note)}" for note in board.notes)]
        sections += ["Runs:", "\n".join(_run_lines(board))]
    return "\n\n".join(sections) + "\n"


def table(board: Board) -> str:
    """The board's table alone, as Markdown."""
    return _pipes(_main_table(board))


def console(board: Board, damaged: Iterable[str] = (), width: int = CONSOLE_WIDTH) -> str:
    """The table in as many blocks as it takes to stay within `width` signs, each begun by the rows' labels."""
    lines = _lines(board)
    first = ["method", *(line if isinstance(line, str) else folded_label(line.label) for line in lines)]
    blocks = [[first]]
    for column in board.across("console"):
        texts = _console_texts(board, lines, column)
        if len(blocks[-1]) > 1 and _width(_plain([*blocks[-1], texts], lines)) > width:
            blocks.append([first])
        blocks[-1].append(texts)
    marks = f"; * best; + second; ≈ {TIE} by a paired test" if board.best else ""
    spread = f"± is half the 95 % confidence interval (Student's t) over n = {board.n or 0} runs, or n as given{marks}."
    notes = [board.caption, *board.notes, f"{spread} {board.among}".strip(), *_damaged_note(damaged)]
    caption, *below = (textwrap.fill(note, width, subsequent_indent="  ", break_on_hyphens=False) for note in notes)
    return "\n".join([caption, "", "\n\n".join(_plain(block, lines) for block in blocks), "", *below])


def terminal_width() -> int:
    """Signs in a line: those of the terminal, 60 to CONSOLE_WIDTH; CONSOLE_WIDTH where there is none."""
    return min(CONSOLE_WIDTH, max(60, shutil.get_terminal_size((CONSOLE_WIDTH, 24)).columns))


def _lines(board: Board) -> Lines:
    """The lines of the board's table from above: rows, and the headings of its sections that have one."""
    lines: Lines = []
    for section in board.sections:
        heading = " ".join(filter(None, [section.title, "" if section.ranked else FEWER]))
        lines += [heading, *section.rows] if heading else section.rows
    return lines


def _down(lines: Lines, heading: str, text: Callable[[Row], str]) -> Texts:
    """A column beside the rows' labels: nothing beside the heading of a section."""
    return [heading, *("" if isinstance(line, str) else text(line) for line in lines)]


def _labels(lines: Lines) -> Texts:
    return ["method", *(f"*{escape(line)}*" if isinstance(line, str) else escape(line.label) for line in lines)]


def _main_table(board: Board) -> list[Texts]:
    lines = _lines(board)
    return [_labels(lines), *(_markdown_texts(board, lines, column) for column in board.across("markdown"))]


def _markdown_texts(board: Board, lines: Lines, column: TableColumn | Column) -> Texts:
    if isinstance(column, TableColumn):
        return [escape(text) for text in _down(lines, column.heading, column.text_of)]
    heading = escape(f"{column.title} ({column.metric})")
    return _down(lines, heading, lambda row: _marked(board, row, column, cell_text(row.cells.get(column.title))))


def _marked(board: Board, row: Row, column: Column, text: str) -> str:
    if board.is_tie(row, column):
        text += " ≈"
    if board.is_best(row, column):
        return f"**{text}**"
    return f"<u>{text}</u>" if board.is_second(row, column) else text


def _other_metrics(board: Board) -> list[Texts]:
    lines = _lines(board)
    columns = [_labels(lines)]
    for column in board.columns:
        for name in column.others:
            columns.append(_down(lines, escape(f"{column.title} ({name})"), functools.partial(_other, column, name)))
    return columns


def _other(column: Column, name: str, row: Row) -> str:
    """The mean of another metric of a task."""
    cell = row.cells.get(column.title)
    return summary_text(cell.others[name]) if cell else NOTHING


def _run_lines(board: Board) -> Iterable[str]:
    for row in board.rows:
        for title, cell in row.cells.items():
            runs = ", ".join(f"seed {run.seed} `{run.run_id}`" for run in cell.runs)
            yield f"- {escape(row.label)} on {escape(title)}: {runs}"


def _console_texts(board: Board, lines: Lines, column: TableColumn | Column) -> Texts:
    if isinstance(column, TableColumn):
        return _down(lines, column.heading, column.text_of)
    metric = column.metric.replace(", ", "\n")
    return _down(lines, f"{column.title}\n{metric}", functools.partial(_console_score, board, column))


def _console_score(board: Board, column: Column, row: Row) -> str:
    cell = row.cells.get(column.title)
    text = cell_text(cell, with_n=cell is not None and cell.score.n != board.n)
    mark = "*" if board.is_best(row, column) else "+" if board.is_second(row, column) else ""
    mark += "≈" if board.is_tie(row, column) else ""
    return text.replace("; ", "\n") + (f" {mark}" if mark else "")


def _pipes(columns: list[Texts]) -> str:
    return _aligned(columns, "github")


def _plain(columns: list[Texts], lines: Lines) -> str:
    """Plain columns with a rule above each section."""
    sections = {place for place, line in enumerate(lines) if isinstance(line, str) and place}
    return _aligned(columns, "simple", sections)


def _aligned(columns: list[Texts], form: str, ruled: Container[int] = ()) -> str:
    alignment = ["left"] + ["right"] * (len(columns) - 1)
    headings, *texts = zip(*columns, strict=True)
    rows: list[Any] = []
    for place, row in enumerate(texts):
        rows += [SEPARATING_LINE, row] if place in ruled else [row]
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
