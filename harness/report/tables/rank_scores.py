"""Scores of trained adapters at each rank they were cut to, less a LoRA trained at that rank, and less a baseline."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pandas as pd

from harness.report.board.leaderboard import Board
from harness.report.board.rows import Cell, Column, Row
from harness.report.evidence.compare import Comparison, ExampleReader, compare_cells, corrected
from harness.report.statistics import Summary, summarize
from harness.report.tables.differences import SAME, entry_of, numbers_of, usual_seeds
from harness.report.tables.rank_curves import TRAINED, IsLora, at_rank, curves_of, ranks_on, trained_at
from harness.report.tables.table import Entry, Table
from harness.report.wording import few, score_text

NAMES = ("task", ""), ("method", "")  # headings of the first columns
Other = tuple[str, Cell]  # a row's label, and its runs with the scores that others are compared with


class Less(NamedTuple):
    """Scores at ranks less those of something else at the same ranks."""

    name: str
    of: Mapping[tuple[str, int], str]  # by the column's title and the rank: the label of the row taken away
    on: Mapping[tuple[str, str, int], Comparison]  # by title, label and rank; Holm's over the rows


class RankScores(NamedTuple):
    """The scores at ranks of a board's rows; p values are corrected over all rows of the setting."""

    board: Board  # whose rows and tasks are shown
    trained: Mapping[str, Mapping[int, Row]]  # by the column's title: see `trained_at`
    less: tuple[Less, ...]


def rank_scores(board: Board, baseline: Row | None, read: ExampleReader, is_lora: IsLora) -> RankScores | None:
    """The scores of a board at ranks, and the paired tests at each of them: against the LoRA that was trained at that
    rank, and against the baseline cut to it. None where no adapter was cut; without a test what lacks runs."""
    if not any(ranks_on(board, column) for column in board.tasks):
        return None
    trained = {column.title: trained_at(board, column, is_lora) for column in board.tasks}

    def lora(column: Column, rank: int) -> Other | None:
        row = trained[column.title].get(rank)
        return None if row is None else (row.label, row.cells[column.title])

    def base(column: Column, rank: int) -> Other | None:
        cell = baseline.cells.get(column.title) if baseline else None
        return (baseline.label, at_rank(cell, rank)) if baseline and cell else None

    found = [_less(board, TRAINED, lora, read)]
    found += [_less(board, f"{baseline.label} at the same rank", base, read)] if baseline else []
    return RankScores(board, trained, tuple(each for each in found if each.on))


def _less(board: Board, name: str, other_at: Callable[[Column, int], Other | None], read: ExampleReader) -> Less:
    of: dict[tuple[str, int], str] = {}
    on: dict[tuple[str, str, int], Comparison] = {}
    for column in board.tasks:
        for rank in ranks_on(board, column):
            label, other = other_at(column, rank) or ("", None)
            if other is None or not other.runs:
                continue
            rows = [row for row in board.rows if column.title in row.cells and row.label != label]
            cells = {row.label: at_rank(row.cells[column.title], rank) for row in rows}
            cells = {own: cell for own, cell in cells.items() if cell.runs}
            compared = corrected([compare_cells(cell, other, column, read) for cell in cells.values()])
            of[column.title, rank] = label
            on |= {(column.title, own, rank): each for own, each in zip(cells, compared, strict=True)}
        read.forget()  # memory is that of one task
    return Less(name, of, on)


def rank_differences(found: RankScores | None) -> pd.DataFrame:
    """A line for each task, row, rank and test, numbers unrounded; none where there are none. Columns: task, metric,
    method, rank, less (the row taken away), and those of `differences_frame` from seeds on."""
    lines: list[dict[str, Any]] = []
    for board, less in ((found.board, less) for less in found.less) if found else ():
        for column, label, rank in _places(board, less):
            names = {"task": column.title, "metric": column.headline, "method": label, "rank": rank}
            names["less"] = less.of[column.title, rank]
            lines.append(names | numbers_of(less.on[column.title, label, rank]))
    return pd.DataFrame(lines, dtype=object)


def _places(board: Board, less: Less) -> Iterator[tuple[Column, str, int]]:
    """Those that the board shows."""
    for column in board.tasks:
        for row in board.rows:
            ranks = sorted(rank for title, label, rank in less.on if (title, label) == (column.title, row.label))
            yield from ((column, row.label, rank) for rank in ranks)


def rank_tables(found: RankScores | None) -> list[Table]:
    """The tables for people: the scores, and what they are less something else; none where no row shown was cut."""
    ranks = sorted({rank for column in found.board.tasks for rank in ranks_on(found.board, column)}) if found else []
    if found is None or not ranks:
        return []
    shown = (_differences(found.board, less, ranks) for less in found.less)
    return [_scores(found, ranks), *(table for table in shown if table.rows)]


def _scores(found: RankScores, ranks: list[int]) -> Table:
    board, nothing = found.board, summarize(())
    lines: list[tuple[str, str, list[Summary]]] = []
    for column in board.tasks:
        cut = {each.label for each in curves_of(board) if each.column == column}
        for row in (row for row in board.rows if row.label in cut):
            cell = row.cells[column.title]
            lines.append((column.title, row.label, [*(at_rank(cell, rank).score for rank in ranks), cell.score]))
        trained = found.trained[column.title]
        scores = [trained[rank].cells[column.title].score if rank in trained else nothing for rank in ranks]
        if any(score.n for score in scores):
            lines.append((column.title, TRAINED, [*scores, nothing]))
    sizes = Counter(score.n for *_, scores in lines for score in scores if score.n)
    n = max(sizes, key=lambda size: (sizes[size], size))
    rows = [(Entry(title), Entry(label), *(_entry(score, n) for score in scores)) for title, label, scores in lines]
    notes = [
        "Each trained adapter cut to at most this rank in each layer, by its method's own measure (docs/reports.md), "
        "and not trained again; whole: as it was trained. ± is half the 95 % interval of Student's t over "
        f"n = {n} runs, or n as given; without ±: one run.",
    ]
    if any(label == TRAINED for _, label, _ in lines):
        notes.append(f"{TRAINED}: scores of LoRAs of that rank, whole; of several the best stands there.")
    headings = (*NAMES, *((f"rank {rank}", "") for rank in ranks), ("whole", ""))
    return Table(board.key, "Scores at ranks", board.caption, headings, tuple(rows), tuple(notes), left=2)


def _entry(score: Summary, n: int) -> Entry:
    if score.mean is None:
        return Entry()
    spread = [] if score.half_width is None else [f"± {score_text(score.half_width)}"]
    spread += [] if score.n in (n, 1) else [f"(n={score.n})"]
    return Entry(score_text(score.mean), " ".join(spread), number=score.mean)


def _differences(board: Board, less: Less, ranks: list[int]) -> Table:
    on: dict[tuple[str, str], dict[int, Comparison]] = defaultdict(dict)
    for column, label, rank in _places(board, less):
        on[column.title, label][rank] = less.on[column.title, label, rank]
    n = usual_seeds(each for of_row in on.values() for each in of_row.values())
    rows = [
        (Entry(title), Entry(label), *(entry_of(of_row[rank], n) if rank in of_row else Entry() for rank in ranks))
        for (title, label), of_row in on.items()
    ]
    notes = [
        f"Each score at a rank less that of {less.name}, over the seeds that both have (n = {n}, or as given); ± is "
        "half the 95 % interval over seeds and examples.",
        "better, worse: after Holm's correction over the rows of a task at a rank, those not shown included. All "
        f"others are {SAME}, or could not be tested.",
    ]
    alone = [label for (_, label), of_row in on.items() if any(_on_seeds(each) for each in of_row.values())]
    if alone:
        notes.append(f"Over seeds alone, for want of usable predictions: {few(list(dict.fromkeys(alone)))}.")
    headings = (*NAMES, *((f"rank {rank}", "") for rank in ranks))
    title = f"Scores at ranks less those of {less.name}"
    return Table(board.key, title, board.caption, headings, tuple(rows), tuple(notes), left=2)


def _on_seeds(each: Comparison) -> bool:
    return each.difference is not None and each.num_examples is None
