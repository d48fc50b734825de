"""From runs to leaderboards: one per setting, methods down, tasks across.

Nothing is averaged here but the seeds of one configuration on one task. A cell whose runs gave no score says so.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from harness.errors import unknown
from harness.report.board.added_columns import usable
from harness.report.board.columns import COLUMNS, FORMS, Form, TableColumn
from harness.report.board.ranking import among, common_seeds, has_all, two_best
from harness.report.board.rows import Cell, Column, Row, Section
from harness.report.board.runs import Run
from harness.report.statistics import summarize
from harness.report.wording import score_text

# Of a family, from the metrics of its members ("cola") by name; None where it has no such number or lacks a member.
FamilyAverage = Callable[[str, Mapping[str, Mapping[str, float]]], float | None]


@dataclass(frozen=True)
class Board:
    """The leaderboard of one setting."""

    key: str  # 8 hexadecimal digits
    caption: str  # the setting in words
    columns: tuple[Column, ...]  # the scores
    rows: tuple[Row, ...]  # best mean of scores first, after them the rows that lack a run's score
    best: Mapping[str, float]  # by title: the best mean, see `report.board.ranking`
    second: Mapping[str, float]  # by title: the next best that prints differently
    seeds: Mapping[str, tuple[int, ...]]  # by title: those that a row needs to be ranked; none where nothing is ranked
    table: tuple[TableColumn, ...] = COLUMNS  # beside the scores
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)  # by method, see `Method.provenance`; of those told of
    # By title: labels whose scores are not significantly different from the best.
    ties: Mapping[str, frozenset[str]] = field(default_factory=dict)
    # What is shown of it, see `report.board.selection`; best, second, seeds and ties are those of all of its rows.
    groups: Mapping[str, frozenset[str]] = field(default_factory=dict)  # labels by the heading they stand under
    picked: tuple[str, ...] = ()  # titles and names of the columns across, in this order; none: all
    hidden: int = 0  # rows left out

    @functools.cached_property
    def n(self) -> int | None:
        """Runs behind most scores: a short table names this once, and other numbers in their cells. None: no score."""
        ranked = [row for section in self.sections if section.ranked for row in section.rows]
        sizes = Counter(cell.score.n for row in ranked for cell in row.cells.values() if cell.score.n)
        return max(sizes, key=lambda n: (sizes[n], n)) if sizes else None

    @functools.cached_property
    def sections(self) -> tuple[Section, ...]:
        """The rows in the order in which every form of the table shows them: those of no group first, and in each group
        those that are not ranked below a rule."""
        group_of = {label: title for title, labels in self.groups.items() for label in labels}
        any_ranked = any(map(self.is_ranked, self.rows))
        found = []
        for title in ("", *self.groups):
            rows = [row for row in self.rows if group_of.get(row.label, "") == title]
            ranked = tuple(row for row in rows if self.is_ranked(row) or not any_ranked)
            others = tuple(row for row in rows if any_ranked and not self.is_ranked(row))
            found += [Section(title, ranked)] if ranked else []
            found += [Section("" if ranked else title, others, ranked=False)] if others else []
        return tuple(found)

    @functools.cached_property
    def among(self) -> str:
        """Which rows the best, the second and ties are among: a sentence for the table's caption; "" without scores."""
        scored = {title for row in self.rows for title, cell in row.cells.items() if cell.score.n}
        sentence = among({column.title: self.seeds[column.title] for column in self.columns if column.title in scored})
        if self.hidden and self.best:
            sentence += f" Marks are those of all {len(self.rows) + self.hidden} rows; {len(self.rows)} are shown."
        return sentence

    @functools.cached_property
    def tasks(self) -> tuple[Column, ...]:
        """The columns of the tasks' first evaluation splits."""
        return tuple(column for column in self.columns if not column.is_further)

    @functools.cached_property
    def counted(self) -> tuple[Column, ...]:
        """The columns that count in averages, mean ranks and the order of rows: one of each task."""
        return tuple(column for column in self.columns if column.counts)

    def across(self, form: Form) -> list[TableColumn | Column]:
        """The columns of this form of the table from left to right, after the rows' labels."""
        return self._across[form]

    @functools.cached_property
    def _across(self) -> dict[Form, list[TableColumn | Column]]:
        return {form: self._columns_of(form) for form in FORMS}  # once, since it asks every run of the board

    def _columns_of(self, form: Form) -> list[TableColumn | Column]:
        if self.picked:
            by_name = {column.name: column for column in self.table} | {column.title: column for column in self.columns}
            return [by_name[name] for name in self.picked if name in by_name]
        shown = [column for column in self.table if form in column.forms and column.shown(self.rows)]
        before = [column for column in shown if column.before_scores]
        return [*before, *self.columns, *(column for column in shown if not column.before_scores)]

    def is_ranked(self, row: Row, column: Column | None = None) -> bool:
        """Whether the row has every seed of this column, and so may be best in it; of any column, where none is
        given."""
        titles = self.seeds if column is None else [column.title]
        return any(has_all(row.cells.get(title), self.seeds[title]) for title in titles)

    def is_best(self, row: Row, column: Column) -> bool:
        """Whether this cell may be called best: every run of it gave a score, and its mean prints as the best does."""
        return self._has(row, column, self.best)

    def is_second(self, row: Row, column: Column) -> bool:
        """Whether this cell may be called second, in the same way."""
        return self._has(row, column, self.second)

    def is_tie(self, row: Row, column: Column) -> bool:
        """Whether this cell is not significantly different from the best one (see `report.evidence.compare`)."""
        return row.label in self.ties.get(column.title, frozenset())

    def _has(self, row: Row, column: Column, scores: Mapping[str, float]) -> bool:
        score, cell = scores.get(column.title), row.cells.get(column.title)
        if score is None or cell is None or cell.score.mean is None or cell.failures:
            return False
        return score_text(cell.score.mean) == score_text(score) and self.is_ranked(row, column)


def leaderboards(
    runs: Iterable[Run], average: FamilyAverage | None = None, table: Sequence[TableColumn] = COLUMNS
) -> list[Board]:
    """A board for each setting of the runs (see `runs_of`), that with the most runs first.

    `average`: a family's one number where it has its own (see `Task.average`); elsewhere it is the mean of the scores.
    `table`: the columns beside the scores.
    """
    settings: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        settings[run.setting].append(run)
    ordered = sorted(settings.items(), key=lambda item: (-len(item[1]), item[0]))
    return [_board(of_setting, average, table) for _, of_setting in ordered]


def sorted_by(boards: Sequence[Board], name: str) -> list[Board]:
    """The boards with their rows by a column, the best or smallest first, rows without a value last: a task, "method",
    or the name of one of the columns beside the scores. Raises InputError where no board has such a column."""
    beside = {column.name: column for board in boards for column in board.table}
    scores = {column.title: column for board in boards for column in board.columns}
    if name not in ("method", *beside, *scores):
        raise unknown("column", name, ["method", *beside, *scores])

    def key(board: Board, row: Row) -> tuple[bool, float, str, str]:
        if name == "method":
            return False, 0.0, "", row.label
        if name in beside:
            value = beside[name].value(row)
            sign = 1 if beside[name].lower_is_better(board.counted) else -1
        else:
            cell = row.cells.get(name)
            value, sign = cell.score.mean if cell else None, -int(scores[name].merit(1))
        if value is None or isinstance(value, str):
            return value is None, 0.0, value or "", row.label
        return False, sign * value, "", row.label

    return [arranged(board, sorted(board.rows, key=functools.partial(key, board))) for board in boards]


def arranged(board: Board, rows: Iterable[Row]) -> Board:
    """The board with these rows, in the order of its sections."""
    found = dataclasses.replace(board, rows=tuple(rows))
    return dataclasses.replace(found, rows=tuple(row for section in found.sections for row in section.rows))


def words_of(boards: Iterable[Board], form: Form) -> dict[str, str]:
    """What the columns beside the scores are in this form of the boards' tables, by their headings."""
    shown = (column for board in boards for column in board.across(form) if isinstance(column, TableColumn))
    return {column.heading: column.words for column in shown if column.words}


def _board(runs: list[Run], average: FamilyAverage | None, table: Sequence[TableColumn]) -> Board:
    columns = _columns(runs)
    cells: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=lambda run: run.seed):
        cells[run.label][run.column].append(run)
    rows = [_row(label, by_title, columns) for label, by_title in cells.items()]
    notes = []
    if average is not None:
        counted = [_with_family_average(row, columns, average) for row in rows]
        if counted != rows:
            notes.append("average: as the family of these tasks counts it, from more than the scores shown")
        rows = counted
    seeds = {
        column.title: common_seeds(row.cells[column.title] for row in rows if column.title in row.cells)
        for column in columns
    }
    rows.sort(key=lambda row: _order(row, columns))
    best, second = two_best(rows, columns, seeds)
    kept, told = usable(table, rows)
    board = Board(runs[0].setting, _caption(runs), columns, (), best, second, seeds, kept, (*notes, *told))
    return arranged(board, rows)


def _with_family_average(row: Row, columns: Sequence[Column], average: FamilyAverage) -> Row:
    """The row with the average as their family counts it, where all tasks are of one."""
    if row.average is None:
        return row
    metrics: dict[str, dict[str, float]] = {}
    counted = [column for column in columns if column.counts]
    for column in counted:
        cell = row.cells[column.title]
        means = {name: summary.mean for name, summary in {column.headline: cell.score, **cell.others}.items()}
        metrics[cell.runs[0].task] = {name: mean for name, mean in means.items() if mean is not None}
    families = {task.partition("/")[0] for task in metrics}
    if len(families) > 1 or len(metrics) < len(counted):
        return row
    own = average(families.pop(), {task.partition("/")[2]: of_task for task, of_task in metrics.items()})
    return row if own is None else dataclasses.replace(row, average=own)


def _columns(runs: list[Run]) -> tuple[Column, ...]:
    metrics: dict[str, dict[str, None]] = defaultdict(dict)
    first: dict[str, Run] = {}
    for run in runs:
        first.setdefault(run.column, run)
        metrics[run.column] |= dict.fromkeys(run.metrics)
    columns = []
    for title, run in sorted(first.items()):
        others = tuple(name for name in metrics[title] if name != run.metric)
        columns.append(Column(title, run.metric, others, run.higher_is_better, run.is_further, run.counts))
    return tuple(columns)


def _row(label: str, runs: Mapping[str, list[Run]], columns: Sequence[Column]) -> Row:
    cells = {column.title: _cell(runs[column.title], column) for column in columns if column.title in runs}
    counted = [column for column in columns if column.counts]
    whole = [cells[column.title] for column in counted if column.title in cells]
    means = [cell.score.mean for cell in whole if cell.score.mean is not None and not cell.failures]
    one_sense = len({column.higher_is_better for column in counted}) == 1
    return Row(label, cells, math.fsum(means) / len(means) if len(means) == len(counted) and one_sense else None)


def _cell(runs: list[Run], column: Column) -> Cell:
    others = {name: summarize(run.metrics[name] for run in runs if name in run.metrics) for name in column.others}
    return Cell(tuple(runs), summarize(run.score for run in runs if run.score is not None), others)


def _order(row: Row, columns: Iterable[Column]) -> tuple[int, float, str]:
    cells = [(column, row.cells[column.title]) for column in columns if column.counts and column.title in row.cells]
    known = [column.merit(cell.score.mean) for column, cell in cells if cell.score.mean is not None]
    num_whole = sum(not cell.failures for _, cell in cells)
    return -num_whole, -math.fsum(known) / max(1, len(known)), row.label


def _caption(runs: list[Run]) -> str:
    names = sorted({run.model for run in runs if run.model is not None})
    fingerprint = runs[0].spec.model_fingerprint
    model = f"{' or '.join(names)} (fingerprint {fingerprint})" if names else fingerprint
    return f"Model {model}; {runs[0].setting_text}."
