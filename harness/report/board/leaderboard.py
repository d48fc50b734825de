"""From the frame to leaderboards: one per setting, methods down, tasks across.

Nothing is averaged here but the seeds of one configuration on one task. A cell whose runs gave no score says so.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pandas as pd

from harness.errors import unknown
from harness.report.board.frame import METRICS
from harness.report.statistics import Summary, summarize

DECIMALS = 3  # of a score, in tables; scores that are equal when printed are equally good
NO_SCORE = "done without a score"

Run = dict[str, Any]  # one row of the frame
# Of a family, from the metrics of its members ("cola") by name; None where it has no such number or lacks a member.
FamilyAverage = Callable[[str, Mapping[str, Mapping[str, float]]], float | None]


@dataclass(frozen=True)
class Column:
    """One task on one data set."""

    title: str
    headline: str  # the metric that the score is
    others: tuple[str, ...]  # the other metrics, in the order the task reports them
    higher_is_better: bool = True  # of the score

    @property
    def metric(self) -> str:
        """The headline as a table's heading has it."""
        return self.headline if self.higher_is_better else f"{self.headline}, lower is better"

    def merit(self, score: float) -> float:
        """The score, turned so that more is better."""
        return score if self.higher_is_better else -score


@dataclass(frozen=True)
class Cell:
    """The runs of one configuration on one task, by seed."""

    runs: tuple[Run, ...]
    score: Summary  # over the runs that have one
    others: Mapping[str, Summary]

    @property
    def scored(self) -> list[Run]:
        return [run for run in self.runs if is_present(run["score"])]

    @property
    def failures(self) -> list[tuple[str, int]]:
        """(status in words, runs), for the runs without a score."""
        return sorted(Counter(status_text(run) for run in self.runs if not is_present(run["score"])).items())


@dataclass(frozen=True)
class Row:
    """One configuration of a method. Numbers are over its scored runs; None where no run has them."""

    label: str
    cells: Mapping[str, Cell]  # by the column's title
    average: float | None  # mean of the cells' scores; None unless every run on every column gave one, all of one sense
    parameters: float | None  # adapter numbers in effect after training, mean
    rank: float | None  # live rank, mean over layers and runs
    batches: float | None  # mean; None where what the search took is not known
    seconds: float | None  # of training, mean
    peak_bytes: float | None  # largest, the search's too
    tuning: str  # "tuned K", "default" or "as given"; several, where runs differ
    search_batches: float | None  # part of `batches`: of the hyperparameter search, mean
    search_seconds: float | None  # part of `seconds`


@dataclass(frozen=True)
class Board:
    """The leaderboard of one setting."""

    key: str  # 8 hexadecimal digits
    caption: str  # the setting in words
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]  # best mean of scores first, after them the rows that lack a run's score
    best: Mapping[str, float]  # by title: the best mean of a cell without failures, where two or more have a score
    second: Mapping[str, float]  # by title: the next best that prints differently
    notes: tuple[str, ...]
    ties: Mapping[str, frozenset[str]] = field(default_factory=dict)  # by title: labels no test tells from the best

    @functools.cached_property
    def n(self) -> int | None:
        """Runs behind most scores: a short table names this once, and other numbers in their cells. None: no score."""
        sizes = Counter(cell.score.n for row in self.rows for cell in row.cells.values() if cell.score.n)
        return max(sizes, key=lambda n: (sizes[n], n)) if sizes else None

    @functools.cached_property
    def has_ranks(self) -> bool:
        """Whether any row has a live rank."""
        return any(row.rank is not None for row in self.rows)

    @functools.cached_property
    def has_search(self) -> bool:
        """Whether any row's hyperparameters were searched for."""
        return any(row.search_batches for row in self.rows)

    def is_best(self, row: Row, column: Column) -> bool:
        """Whether this cell may be called best: every run of it gave a score, and its mean prints as the best does."""
        return self._has(row, column, self.best)

    def is_second(self, row: Row, column: Column) -> bool:
        """Whether this cell may be called second, in the same way."""
        return self._has(row, column, self.second)

    def is_tie(self, row: Row, column: Column) -> bool:
        """Whether the paired test could not tell this cell from the best one (see `report.evidence.compare`)."""
        return row.label in self.ties.get(column.title, frozenset())

    def _has(self, row: Row, column: Column, scores: Mapping[str, float]) -> bool:
        score, cell = scores.get(column.title), row.cells.get(column.title)
        if score is None or cell is None or cell.score.mean is None or cell.failures:
            return False
        return score_text(cell.score.mean) == score_text(score)


def score_text(score: float) -> str:
    """A score as tables print it."""
    return f"{round(score, DECIMALS) + 0.0:.{DECIMALS}f}"  # + 0.0: no "-0.000"


def over(runs: list[Run], name: str, of: Callable[[list[float]], float] | None = None) -> float | None:
    """The mean of a column of the frame over `runs`, or what `of` makes of it; None where no run has a value."""
    values = [float(run[name]) for run in runs if is_present(run[name])]
    if not values:
        return None
    return of(values) if of else math.fsum(values) / len(values)


def with_search(runs: list[Run], name: str) -> float | None:
    """The mean over `runs` of batches or seconds_training, the search included; None where that is not known."""
    search = "search_batches" if name == "batches" else "search_seconds"
    costs = [run[name] + run[search] for run in runs if is_present(run[search])]
    return math.fsum(costs) / len(costs) if costs and len(costs) == len(runs) else None


def peak_bytes(runs: list[Run]) -> float | None:
    """The largest peak memory of the runs and of their searches; None where none is known."""
    peaks = [over(runs, name, max) or 0 for name in ("peak_bytes", "search_peak_bytes")]
    return max(peaks) or None


def whole(number: float | None) -> float | int | None:
    """A number without a fraction as an integer."""
    return int(number) if number is not None and float(number).is_integer() else number


def leaderboards(frame: pd.DataFrame, average: FamilyAverage | None = None) -> list[Board]:
    """A board for each setting in `frame` (see `to_frame`), that with the most runs first.

    `average`: a family's one number where it has its own (see `Task.average`); elsewhere it is the mean of the scores.
    """
    settings: dict[str, list[Run]] = defaultdict(list)
    for run in cast(list[Run], frame.to_dict("records")):
        settings[run["setting"]].append(run)
    return [_board(runs, average) for _, runs in sorted(settings.items(), key=lambda item: (-len(item[1]), item[0]))]


def sorted_by(boards: Sequence[Board], name: str) -> list[Board]:
    """The boards with their rows by a column, the best or smallest first, rows without a value last: a task, or
    parameters, rank, average, batches, seconds, memory, method. Raises InputError where no board has such a column."""
    numbers = {"memory": "peak_bytes"} | {key: key for key in ("parameters", "rank", "average", "batches", "seconds")}
    titles = {column.title: column for board in boards for column in board.columns}
    if name not in (*numbers, "method", *titles):
        raise unknown("column", name, [*numbers, "method", *titles])

    def key(row: Row) -> tuple[bool, float, str]:
        if name == "method":
            return False, 0.0, row.label
        cell = row.cells.get(name)
        value = getattr(row, numbers[name]) if name in numbers else cell.score.mean if cell else None
        rises = name in numbers and name != "average"
        number = 0.0 if value is None else value if rises else -value if name in numbers else -titles[name].merit(value)
        return value is None, number, row.label

    return [dataclasses.replace(board, rows=tuple(sorted(board.rows, key=key))) for board in boards]


def _board(runs: list[Run], average: FamilyAverage | None) -> Board:
    from harness.report.board.notes import notes_on  # it knows rows and columns, which are made here

    columns = _columns(runs)
    cells: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=lambda run: run["seed"]):
        cells[run["label"]][run["column"]].append(run)
    rows = [_row(label, by_title, columns) for label, by_title in cells.items()]
    notes = notes_on(runs, rows, columns)
    if average is not None:
        counted = [_with_family_average(row, columns, average) for row in rows]
        if counted != rows:
            notes.append("average: as the family of these tasks counts it, from more than the scores shown")
        rows = counted
    rows.sort(key=lambda row: _order(row, columns))
    best, second = _two_best(rows, columns)
    return Board(runs[0]["setting"], _caption(runs), columns, tuple(rows), best, second, tuple(notes))


def _with_family_average(row: Row, columns: Sequence[Column], average: FamilyAverage) -> Row:
    """The row with the average as their family counts it, where all tasks are of one."""
    if row.average is None:
        return row
    metrics: dict[str, dict[str, float]] = {}
    for column in columns:
        cell = row.cells[column.title]
        means = {name: summary.mean for name, summary in {column.headline: cell.score, **cell.others}.items()}
        metrics[cell.runs[0]["task"]] = {name: mean for name, mean in means.items() if mean is not None}
    families = {task.partition("/")[0] for task in metrics}
    if len(families) > 1 or len(metrics) < len(columns):
        return row
    own = average(families.pop(), {task.partition("/")[2]: of_task for task, of_task in metrics.items()})
    return row if own is None else dataclasses.replace(row, average=own)


def _two_best(rows: Iterable[Row], columns: Iterable[Column]) -> tuple[dict[str, float], dict[str, float]]:
    """Best and second best mean by title, where two or more rows have a score."""
    best: dict[str, float] = {}
    second: dict[str, float] = {}
    for column in columns:
        scored = [cell for row in rows if (cell := row.cells.get(column.title)) is not None and cell.score.n]
        means = [cell.score.mean for cell in scored if cell.score.mean is not None and not cell.failures]
        means.sort(key=column.merit, reverse=True)
        if means and len(scored) > 1:
            best[column.title] = means[0]
            others = [mean for mean in means if score_text(mean) != score_text(means[0])]
            second.update({column.title: others[0]} if others else {})
    return best, second


def _columns(runs: list[Run]) -> tuple[Column, ...]:
    metrics: dict[str, dict[str, None]] = defaultdict(dict)
    headlines: dict[str, tuple[str, bool]] = {}
    reported = [name for name in runs[0] if name.startswith(METRICS)]
    for run in runs:
        headlines[run["column"]] = run["headline"], run["higher_is_better"]
        metrics[run["column"]] |= {name: None for name in reported if is_present(run[name])}
    columns = []
    for title, (headline, higher_is_better) in sorted(headlines.items()):
        names = (name.removeprefix(METRICS) for name in metrics[title])
        others = tuple(name for name in names if name != headline)
        columns.append(Column(title, headline, others, higher_is_better))
    return tuple(columns)


def _row(label: str, runs: Mapping[str, list[Run]], columns: Sequence[Column]) -> Row:
    cells = {column.title: _cell(runs[column.title], column) for column in columns if column.title in runs}
    means = [cell.score.mean for cell in cells.values() if cell.score.mean is not None and not cell.failures]
    scored = [run for cell in cells.values() for run in cell.scored]
    one_sense = len({column.higher_is_better for column in columns}) == 1
    return Row(
        label,
        cells,
        average=math.fsum(means) / len(means) if len(means) == len(columns) and one_sense else None,
        parameters=over(scored, "parameters_final"),
        rank=over(scored, "rank"),
        batches=with_search(scored, "batches"),
        seconds=with_search(scored, "seconds_training"),
        peak_bytes=peak_bytes(scored),
        tuning=", ".join(sorted({run["tuning"] for of_task in runs.values() for run in of_task})),
        search_batches=over(scored, "search_batches"),
        search_seconds=over(scored, "search_seconds"),
    )


def _cell(runs: list[Run], column: Column) -> Cell:
    scored = [run for run in runs if is_present(run["score"])]
    others = {
        name: summarize(run[METRICS + name] for run in scored if is_present(run[METRICS + name]))
        for name in column.others
    }
    return Cell(tuple(runs), summarize(run["score"] for run in scored), others)


def _order(row: Row, columns: Iterable[Column]) -> tuple[int, float, str]:
    merits = {column.title: column.merit for column in columns}
    known = [merits[title](cell.score.mean) for title, cell in row.cells.items() if cell.score.mean is not None]
    num_whole = sum(not cell.failures for cell in row.cells.values())
    return -num_whole, -math.fsum(known) / max(1, len(known)), row.label


def _caption(runs: list[Run]) -> str:
    names = sorted({run["model"] for run in runs if is_present(run["model"])})
    fingerprint = runs[0]["model_fingerprint"]
    model = f"{' or '.join(names)} (fingerprint {fingerprint})" if names else fingerprint
    return f"Model {model}; {runs[0]['setting_text']}."


def status_text(run: Run) -> str:
    """Why a run has no score, in words."""
    return NO_SCORE if run["status"] == "done" else run["status"].replace("_", " ")


def is_present(value: object) -> bool:
    """Whether a frame's value is there: neither None nor NaN."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))
