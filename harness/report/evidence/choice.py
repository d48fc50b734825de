"""From a leaderboard to an advice: which configuration, on what evidence. The statistics are `advise`'s.

Everything is chosen on the holdout; the evaluation splits are read for the one chosen, to say what it is worth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from harness.record.record import HOLDOUT
from harness.report.board.leaderboard import Board
from harness.report.board.rows import Cell, Column, Row, over
from harness.report.board.runs import Run
from harness.report.evidence.advise import (
    LEVEL,
    Estimate,
    Needed,
    estimate,
    mean_estimate,
    needed,
    non_inferior,
    smallest,
)
from harness.report.evidence.compare import Comparison, ExampleReader, compare_cells
from harness.report.statistics import summarize

Pairs = dict[tuple[str, str], Comparison]  # by the labels of two configurations: the first less the second


@dataclass(frozen=True)
class Candidate:
    """A configuration with what the holdout says of it."""

    row: Row
    size: float | None  # mean adapter parameters after training
    merit: float  # mean score on the holdout, turned so that more is better; over tasks their mean
    why_not: str | None  # why it may not be recommended, whatever its score
    adjusted_p: float  # of "worse than the best by the margin or more"
    hardest: str | None  # label of the configuration that it is hardest to show non-inferior to
    behind: Estimate | None  # the difference from that one
    needed: Needed | None  # what more would show it

    @property
    def label(self) -> str:
        return self.row.label


@dataclass(frozen=True)
class Advice:
    """What to take on one task, or over several of them."""

    columns: tuple[Column, ...]
    margin: float
    candidates: tuple[Candidate, ...]  # the smallest first, those without a size last
    picked: Candidate | None
    pairs: tuple[Pairs, ...]  # on the holdout, by column
    evaluation: tuple[Comparison | None, ...]  # of the one picked less the best one, by column; None: it is the best
    left_out: tuple[tuple[str, str], ...]  # (label, why) of rows that there is too little of to compare

    @property
    def best(self) -> Candidate:
        """The one with the best mean on the holdout."""
        return max(self.candidates, key=lambda each: (each.merit, each.label))

    @property
    def smaller(self) -> list[Candidate]:
        """Candidates below the one picked, or all where none is: those that were not shown to be good enough."""
        smaller = [each for each in self.candidates if each.size is not None and each.why_not is None]
        if self.picked is None or self.picked.size is None:
            return smaller
        return [each for each in smaller if each.size is not None and each.size < self.picked.size]


def advise(board: Board, columns: Sequence[Column], margin: float, read: ExampleReader) -> Advice | None:
    """The advice for a task, or for several together (the mean of their differences); None where fewer than two
    configurations have two common seeds of holdout scores on each of them."""
    holdout = [_on_holdout(board, column) for column in columns]
    rows, left_out = _comparable(board, columns, holdout)
    if len(rows) < 2:
        return None
    pairs = [_pairs(cells, rows, column, read) for cells, column in zip(holdout, columns, strict=True)]
    read.forget()
    against = [[_difference(first, second, columns, pairs) for second in rows] for first in rows]
    adjusted = non_inferior(against, margin)
    found = []
    for row, of_row, p in zip(rows, against, adjusted, strict=True):
        cells = [cells_of_task[row.label] for cells_of_task in holdout]
        found.append(_candidate(row, cells, columns, rows, of_row, p, margin))
    found.sort(key=lambda each: (each.size is None, each.size or 0.0, -each.merit, each.label))
    place = smallest([None if each.why_not else each.size for each in found], [each.adjusted_p for each in found])
    advice = Advice(
        tuple(columns), margin, tuple(found), None if place is None else found[place], tuple(pairs), (), left_out
    )
    evaluated = tuple(_evaluated(advice, column, read) for column in columns) if advice.picked else ()
    read.forget()
    return dataclasses.replace(advice, evaluation=evaluated)


def why_not(board: Board, column: Column) -> str:
    """Why there is no advice on a task."""
    cells = [cell for row in board.rows if (cell := row.cells.get(column.title))]
    holdout = [len(cell.scored) for cell in _on_holdout(board, column).values()]
    if max((len(cell.scored) for cell in cells), default=0) < 2:
        return "one seed cannot tell a small configuration from a lucky one: run the sweep with --seeds 3 or more"
    if max(holdout, default=0) < 2:
        return "nothing is known of the holdout, on which configurations are chosen: run with --holdout-points 1"
    return "fewer than two configurations have two seeds: there is nothing to choose from"


def _on_holdout(board: Board, column: Column) -> dict[str, Cell]:
    """The column's cells with the holdout in place of the evaluation split."""
    found = {}
    for row in board.rows:
        if cell := row.cells.get(column.title):
            runs = tuple(_as_holdout(run) for run in cell.runs)
            found[row.label] = Cell(runs, summarize(run.score for run in runs if run.score is not None), {})
    return found


def _as_holdout(run: Run) -> Run:
    score = None if run.score is None else run.record.holdout.get(run.metric)
    return dataclasses.replace(run, split=HOLDOUT, score=score)


def _comparable(
    board: Board, columns: Sequence[Column], holdout: Sequence[dict[str, Cell]]
) -> tuple[list[Row], tuple[tuple[str, str], ...]]:
    """(rows with two scored seeds or more on every column, (label, why not) of the others that are on some)."""
    rows, left_out = [], []
    for row in board.rows:
        cells = [cells_of_task.get(row.label) for cells_of_task in holdout]
        if not any(cells):
            continue
        lacking = [column.title for column, cell in zip(columns, cells, strict=True) if cell is None]
        fewest = min(len(cell.scored) for cell in cells if cell)
        if lacking:
            left_out.append((row.label, "not on every task"))
        elif fewest < 2:
            scored = any(run.score is not None for cell in row.cells.values() for run in cell.runs)
            left_out.append((row.label, _too_few(fewest, scored)))
        else:
            rows.append(row)
    return rows, tuple(left_out)


def _too_few(seeds: int, has_score: bool) -> str:
    if seeds == 1:
        return "one seed"
    return "no score on the holdout" if has_score else "no run with a score"


def _pairs(cells: dict[str, Cell], rows: Sequence[Row], column: Column, read: ExampleReader) -> Pairs:
    return {
        (first.label, second.label): compare_cells(cells[first.label], cells[second.label], column, read)
        for place, first in enumerate(rows)
        for second in rows[place + 1 :]
    }


def _difference(first: Row, second: Row, columns: Sequence[Column], pairs: Sequence[Pairs]) -> Estimate | None:
    """`first` less `second` in merit, over the columns."""
    if first is second:
        return None
    found = []
    for column, of_column in zip(columns, pairs, strict=True):
        turned = (first.label, second.label) not in of_column
        each = of_column[(second.label, first.label) if turned else (first.label, second.label)]
        sign = column.merit(-1.0 if turned else 1.0)
        by_seed = each.scores[0] - each.scores[1]
        found.append(estimate(by_seed, each.difference, each.num_examples, each.largest, sign))
    return mean_estimate(found)


def _candidate(
    row: Row,
    cells: Sequence[Cell],
    columns: Sequence[Column],
    rows: Sequence[Row],
    against: Sequence[Estimate | None],
    p: float,
    margin: float,
) -> Candidate:
    known = [
        (each.p_above(-margin), -each.mean, other.label, each)
        for other, each in zip(rows, against, strict=True)
        if each is not None
    ]
    hardest = max(known, key=lambda each: each[:3], default=None)
    merits = [column.merit(cell.score.mean or 0.0) for column, cell in zip(columns, cells, strict=True)]
    failures = sum(len(cell.runs) - len(cell.scored) for cell in cells)
    runs = [run for cell in cells for run in cell.scored]
    seeds = min(len(cell.scored) for cell in cells)
    more = needed([each for *_, each in known], margin, seeds, len(rows)) if p > LEVEL else None
    return Candidate(
        row,
        over(runs, "parameters_final"),
        sum(merits) / len(merits),
        f"{failures} of its runs gave no score" if failures else None,
        p,
        hardest[2] if hardest else None,
        hardest[3] if hardest else None,
        more if len(known) == len(rows) - 1 and len(columns) == 1 else None,
    )


def _evaluated(advice: Advice, column: Column, read: ExampleReader) -> Comparison | None:
    """The one picked less the holdout's best on the evaluation split."""
    assert advice.picked is not None
    if advice.picked is advice.best:
        return None
    first, second = (each.row.cells[column.title] for each in (advice.picked, advice.best))
    return compare_cells(first, second, column, read)
