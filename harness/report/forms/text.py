"""Leaderboards as Markdown and for the console."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

import pandas as pd
from tabulate import tabulate

from harness.report.board.leaderboard import Board, Column, Row, score_text
from harness.report.redact import cut, one_line
from harness.report.wording import NOTHING, cell_text, decimal, folded_label, human, summary_text

CONSOLE_WIDTH = 110
LEGEND = (
    "Scores: mean ± half-width of the 95 % interval (Student's t) over the n runs (seeds) that gave one; n/a: no "
    "interval from one run; -: not run. Bold: the best mean of those cells in which every run gave a score; "
    "underlined: the second; ≈: a paired test over seeds and examples, Holm-corrected over the column, does not "
    "tell it from the best. parameters: adapter numbers in effect after training, without the head. settings: tuned "
    "K: the best of K trials on the holdout; default; as given. parameters, rank (live, over the adapted layers), "
    "batches (forward and backward) and seconds (of training) are means over the row's scored runs, memory is their "
    "peak; all three include the search for hyperparameters, whose part is under search. Rows are ordered by the mean "
    "of their scores, those that lack a run's score last. average: of a row that lacks none."
)


def markdown(boards: Iterable[Board], damaged: Iterable[str] = ()) -> str:
    """Every board as a section: table, other metrics, notes, run ids. `damaged`: run folders that were left out."""
    sections = ["# Leaderboard", LEGEND, *map(escape, _damaged_note(damaged))]
    for board in boards:
        sections += [f"## Setting {board.key}", escape(board.caption), _pipes(_main_table(board))]
        if any(column.others for column in board.columns):
            sections += ["Other metrics:", _pipes(_other_metrics(board))]
        if board.notes:
            sections += ["Notes:", "\n".join(f"- {escape(note)}" for note in board.notes)]
        sections += ["Runs:", "\n".join(_run_lines(board))]
    return "\n\n".join(sections) + "\n"


def console(board: Board, damaged: Iterable[str] = (), width: int = CONSOLE_WIDTH) -> str:
    """Method, parameters, rank, scores and seconds, in as many blocks as it takes to stay within `width` signs."""
    frame = pd.DataFrame([_console_row(board, row) for row in board.rows])
    blocks, names = [], ["method"]
    for name in [str(name) for name in frame if name != "method"]:
        if len(names) > 1 and _width(_plain(frame[[*names, name]])) > width:
            blocks.append(names)
            names = ["method"]
        names.append(name)
    tables = [_plain(frame[names]) for names in [*blocks, names]]
    spread = (
        f"± is half the 95 % interval (Student's t) over n = {board.n or 0} runs, or n as given; * best; + second; "
    )
    spread += "≈ a paired test does not tell it from the best."
    notes = [board.caption, *board.notes, spread, *_damaged_note(damaged)]
    lines = [textwrap.fill(note, width, subsequent_indent="  ", break_on_hyphens=False) for note in notes]
    return "\n".join([lines[0], "", "\n\n".join(tables), "", *lines[1:]])


def _main_table(board: Board) -> pd.DataFrame:
    rows = []
    for row in board.rows:
        texts = {"method": escape(row.label), "parameters": human(row.parameters)}
        if board.has_ranks:
            texts["rank"] = decimal(row.rank)
        for column in board.columns:
            text = cell_text(row.cells.get(column.title))
            name = escape(f"{column.title} ({column.metric})")
            texts[name] = _marked(board, row, column, text)
        if len(board.columns) > 1:
            texts["average"] = NOTHING if row.average is None else score_text(row.average)
        texts |= {"settings": row.tuning, "batches": decimal(row.batches), "seconds": decimal(row.seconds)}
        texts["memory"] = human(row.peak_bytes, "B")
        if board.has_search:
            searched = f"{decimal(row.search_batches)} batches, {decimal(row.search_seconds)} s"
            texts["search"] = searched if row.search_batches else NOTHING
        rows.append(texts)
    return pd.DataFrame(rows)


def _marked(board: Board, row: Row, column: Column, text: str) -> str:
    if board.is_tie(row, column):
        text += " ≈"
    if board.is_best(row, column):
        return f"**{text}**"
    return f"<u>{text}</u>" if board.is_second(row, column) else text


def _other_metrics(board: Board) -> pd.DataFrame:
    rows = []
    for row in board.rows:
        texts = {"method": escape(row.label)}
        for column in board.columns:
            cell = row.cells.get(column.title)
            for name in column.others:
                texts[escape(f"{column.title} ({name})")] = summary_text(cell.others[name]) if cell else NOTHING
        rows.append(texts)
    return pd.DataFrame(rows)


def _run_lines(board: Board) -> Iterable[str]:
    for row in board.rows:
        for title, cell in row.cells.items():
            runs = ", ".join(f"seed {run['seed']} `{run['run_id']}`" for run in cell.runs)
            yield f"- {escape(row.label)} on {escape(title)}: {runs}"


def _console_row(board: Board, row: Row) -> dict[str, str]:
    texts = {"method": folded_label(row.label), "parameters": human(row.parameters)}
    if board.has_ranks:
        texts["rank"] = decimal(row.rank)
    for column in board.columns:
        cell = row.cells.get(column.title)
        text = cell_text(cell, with_n=cell is not None and cell.score.n != board.n)
        mark = "*" if board.is_best(row, column) else "+" if board.is_second(row, column) else ""
        mark += "≈" if board.is_tie(row, column) else ""
        metric = column.metric.replace(", ", "\n")
        texts[f"{column.title}\n{metric}"] = text.replace("; ", "\n") + (f" {mark}" if mark else "")
    if len(board.columns) > 1:
        texts["average"] = NOTHING if row.average is None else score_text(row.average)
    return texts | {"settings": row.tuning, "seconds": decimal(row.seconds)}


def _pipes(table: pd.DataFrame) -> str:
    return _aligned(table, "github")


def _plain(table: pd.DataFrame) -> str:
    return _aligned(table, "simple")


def _aligned(table: pd.DataFrame, form: str) -> str:
    alignment = ["left"] + ["right"] * (table.shape[1] - 1)
    rows = table.to_numpy().tolist()
    return tabulate(rows, list(table.columns), tablefmt=form, disable_numparse=True, colalign=alignment)


def _width(text: str) -> int:
    return max(len(line) for line in text.splitlines())


def _damaged_note(damaged: Iterable[str]) -> list[str]:
    names = [one_line(cut(name)) for name in damaged]
    return [f"Left out, since their records cannot be read: {', '.join(names)}."] if names else []


def escape(text: str) -> str:
    """Signs that Markdown would take for its own, an underscore within a word left alone."""
    text = re.sub(r"([\\|*`<>]|(?<=\])[(:])", r"\\\1", one_line(text))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)
