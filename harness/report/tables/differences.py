"""Each row of a board less one of them, the baseline: paired differences, task by task and over tasks."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from harness.report.board.leaderboard import Board
from harness.report.board.provenance import provenance_notes
from harness.report.board.rows import Column, Row, over
from harness.report.evidence.compare import Comparison, ExampleReader, compare_cells, corrected, rows_of, verdict_of
from harness.report.statistics import Difference, holm, over_tasks
from harness.report.tables.table import Entry, Table
from harness.report.wording import DECIMALS, NOTHING, few, score_text

OVER_TASKS = "over tasks"
NO_SEEDS = "no common seeds"
SAME = "not significantly different"
SHOWN = {"undecided": SAME, "not comparable": NO_SEEDS}  # verdicts, as the table words them


@dataclass(frozen=True)
class Overall:
    """The mean of a row's differences over all tasks; None: not available."""

    difference: Difference | None
    adjusted_p: float | None  # Holm's, over the rows
    sign: int  # 1 where more is better, -1 where less is

    @property
    def verdict(self) -> str:
        """better, worse or undecided, as of `Comparison`."""
        return verdict_of(self.difference, self.adjusted_p, self.sign)


@dataclass(frozen=True)
class Against:
    """One row less the baseline."""

    row: Row
    share: float | None  # of the baseline's adapter parameters, means over the tasks that both have
    on: Mapping[str, Comparison]  # by the column's title, of those that both have runs on; Holm's over the rows
    overall: Overall | None  # None where the board has one task, or tasks of both senses


@dataclass(frozen=True)
class Differences:
    """The rows of one board less its baseline."""

    board: Board
    baseline: Row
    rows: Mapping[str, Against]  # by label, the baseline left out

    @property
    def has_overall(self) -> bool:
        return any(each.overall is not None for each in self.rows.values())


def differences(boards: Sequence[Board], baseline: str, read: ExampleReader) -> dict[str, Differences]:
    """By the board's key, the other rows of each board that has the baseline less it; p values are Holm's over a
    column. A board of the baseline alone has none.

    `baseline`: a row's label, or a method that has one row. Raises InputError where no board has it.
    """
    found = rows_of(boards, baseline, "row for the baseline")
    several = [board for board in boards if board.key in found and len(board.rows) > 1]
    return {board.key: _less(board, found[board.key], read) for board in several}


def as_shown(found: Mapping[str, Differences], boards: Iterable[Board]) -> dict[str, Differences]:
    """Of these boards' rows and columns alone, whose p values stay corrected over all rows, and whose means and shares
    stay those of all tasks."""
    narrowed = {}
    for board in boards:
        if board.key in found:
            rows = found[board.key].rows
            if rows := {row.label: rows[row.label] for row in board.rows if row.label in rows}:
                narrowed[board.key] = dataclasses.replace(found[board.key], board=board, rows=rows)
    return narrowed


def _less(board: Board, baseline: Row, read: ExampleReader) -> Differences:
    others = [row for row in board.rows if row.label != baseline.label]
    on: dict[str, dict[str, Comparison]] = defaultdict(dict)
    for column in board.columns:
        own = baseline.cells.get(column.title)
        both = [row for row in others if own is not None and column.title in row.cells]
        if own is not None:
            compared = corrected([compare_cells(row.cells[column.title], own, column, read) for row in both])
            for row, each in zip(both, compared, strict=True):
                on[row.label][column.title] = each
        read.forget()  # memory is that of one task
    overall = _overall(board.counted, [on[row.label] for row in others])
    rows = {
        row.label: Against(row, _share(board, row, baseline), on[row.label], each)
        for row, each in zip(others, overall, strict=True)
    }
    return Differences(board, baseline, rows)


def _overall(columns: Sequence[Column], rows: Sequence[Mapping[str, Comparison]]) -> Sequence[Overall | None]:
    """Of each row, over all of the columns."""
    signs = {int(column.merit(1)) for column in columns}
    if len(columns) < 2 or len(signs) > 1:
        return [None] * len(rows)
    means = []
    for on in rows:
        each = [on[column.title].difference if column.title in on else None for column in columns]
        means.append(over_tasks(each))
    adjusted = iter(holm([mean.p_value for mean in means if mean is not None]))
    (sign,) = signs
    return [Overall(mean, None if mean is None else next(adjusted), sign) for mean in means]


def _share(board: Board, row: Row, baseline: Row) -> float | None:
    counts = []
    for column in board.counted:
        cells = [each.cells.get(column.title) for each in (row, baseline)]
        both = [None if cell is None else over(cell.scored, "parameters_final") for cell in cells]
        if None not in both:
            counts.append(both)
    own, whole = (math.fsum(pair[place] or 0 for pair in counts) for place in (0, 1))
    return own / whole if whole else None


def differences_frame(found: Differences | None) -> pd.DataFrame:
    """A line for each row and task, "over tasks" last, numbers unrounded; none where there are no differences.

    Columns: baseline, method, parameters_share, task, metric, seeds (number of common ones), examples (None:
    the interval is over seeds alone), difference, low, high (of the 95 % interval), p, holm_p (over the column),
    verdict (better, worse, not significantly different, not tested, no common seeds).
    """
    if found is None:
        return pd.DataFrame()
    lines: list[dict[str, Any]] = []
    for label, against in found.rows.items():
        names = {"baseline": found.baseline.label, "method": label, "parameters_share": against.share}
        for column in found.board.columns:
            if column.title in against.row.cells:
                place = {"task": column.title, "metric": column.headline}
                lines.append(names | place | numbers_of(against.on.get(column.title)))
        if against.overall is not None:
            lines.append(names | {"task": OVER_TASKS, "metric": ""} | numbers_of(against.overall))
    return pd.DataFrame(lines, dtype=object)


def differences_json(found: Iterable[Differences]) -> dict[str, Any]:
    """The same as JSON values: settings, their rows, and each cell's numbers."""
    settings = []
    for each in found:
        rows = []
        for label, against in each.rows.items():
            line: dict[str, Any] = {"label": label, "parameters_share": against.share}
            titles = [column.title for column in each.board.columns if column.title in against.row.cells]
            line["cells"] = {title: numbers_of(against.on.get(title)) for title in titles}
            line["over_tasks"] = None if against.overall is None else numbers_of(against.overall)
            rows.append(line)
        names = {"key": each.board.key, "caption": each.board.caption, "baseline": each.baseline.label}
        settings.append({**names, "rows": rows})
    return {"settings": settings}


def numbers_of(each: Comparison | Overall | None) -> dict[str, Any]:
    """What is known of one difference, as `differences_frame` has it; None: the baseline has no run on the task."""
    seeds = len(each.seeds) if isinstance(each, Comparison) else None
    found = None if each is None else each.difference
    low, high = (None, None) if found is None else found.interval
    mean = _mean(each)
    return {
        "seeds": 0 if each is None else seeds,
        "examples": each.num_examples if isinstance(each, Comparison) else None,
        "difference": mean,
        "low": low,
        "high": high,
        "p": None if found is None else found.p_value,
        "holm_p": None if each is None else each.adjusted_p,
        "verdict": _verdict(each),
    }


def _mean(each: Comparison | Overall | None) -> float | None:
    if each is not None and each.difference is not None:
        return each.difference.mean
    if not isinstance(each, Comparison) or not each.seeds:
        return None
    return float((each.scores[0] - each.scores[1]).mean())


def _verdict(each: Comparison | Overall | None) -> str:
    if each is None or (isinstance(each, Comparison) and not each.seeds):
        return NO_SEEDS
    return "not tested" if each.difference is None else SHOWN.get(each.verdict, each.verdict)


def differences_table(found: Differences, board: Board | None = None) -> Table:
    """The table for people, its rows in the order of `board` (None: of the one that the differences are of)."""
    order = (board or found.board).sections
    rows = [found.rows[row.label] for section in order for row in section.rows if row.label in found.rows]
    titles = [column.title for column in found.board.columns]
    usual = {title: usual_seeds(each.on[title] for each in rows if title in each.on) for title in titles}
    headings = [("method", ""), ("parameters", "share")]
    headings += [(column.title, f"{column.metric}, n = {usual[column.title]}") for column in found.board.columns]
    headings += [(OVER_TASKS, "mean")] if found.has_overall else []
    lines = []
    for against in rows:
        line = [Entry(against.row.label), _share_entry(against.share)]
        line += [_entry(against, column.title, usual[column.title]) for column in found.board.columns]
        line += [_with_interval(against.overall, "not available")] if found.has_overall else []
        lines.append(tuple(line))
    title = f"Differences to {found.baseline.label}"
    return Table(found.board.key, title, found.board.caption, tuple(headings), tuple(lines), _notes(found))


def usual_seeds(found: Iterable[Comparison]) -> int:
    """The number of common seeds behind most differences; of single ones a cell says so."""
    counts = [len(each.seeds) for each in found]
    sizes = Counter(n for n in counts if n > 1) or Counter(counts)
    return max(sizes, key=lambda n: (sizes[n], n)) if sizes else 0


def _share_entry(share: float | None) -> Entry:
    if share is None:
        return Entry()
    return Entry(f"{share:.3g}" if share < 1000 else f"{share:,.0f}", number=share)


def _entry(against: Against, title: str, n: int) -> Entry:
    if title not in against.row.cells:
        return Entry()
    return entry_of(against.on[title], n) if title in against.on else Entry(NO_SEEDS)


def entry_of(each: Comparison, n: int) -> Entry:
    """A difference in a column of which most are over `n` seeds."""
    if not each.seeds:
        return Entry(NO_SEEDS)
    made = _with_interval(each, "one seed" if len(each.seeds) == 1 else "no spread")
    return made if len(each.seeds) in (n, 1) else made._replace(spread=f"{made.spread} (n={len(each.seeds)})")


def _with_interval(each: Comparison | Overall | None, without: str) -> Entry:
    """+0.012 ± 0.008 better; a verdict only where the difference is significant."""
    mean = _mean(each)
    if each is None or mean is None:
        return Entry(without if each is not None else NOTHING)
    found = each.difference
    spread = f"({without})" if found is None else f"± {score_text(found.half_width)}"
    mark = each.verdict if each.verdict in ("better", "worse") else ""
    return Entry(f"{round(mean, DECIMALS) + 0.0:+.{DECIMALS}f}", spread, mark, mean)


def _notes(found: Differences) -> tuple[str, ...]:
    name = found.baseline.label
    family = "the column, with the rows that are not shown" if found.board.hidden else "the column"
    notes = [
        f"Each row's score less that of {name}, over the seeds that both have (n, or as given); ± is half the 95 % "
        f"interval over seeds and examples. parameters: of the adapter after training, as a share of those of {name}.",
        f"better, worse: than {name}, after Holm's correction over {family}. All other rows are {SAME} from {name}, "
        f"or could not be tested ({NO_SEEDS}, one seed, no spread).",
    ]
    if found.has_overall:
        notes.append(
            f"{OVER_TASKS}: the mean of a row's differences on all tasks of the setting. Its interval is for these "
            "tasks, not for others like them."
        )
    for column in found.board.columns:
        each = {label: against.on[column.title] for label, against in found.rows.items() if column.title in against.on}
        alone = [label for label, one in each.items() if one.difference is not None and one.num_examples is None]
        if alone:
            notes.append(f"Over seeds alone on {column.title}, for want of usable predictions: {few(alone)}.")
    return (*notes, *provenance_notes(found.board))
