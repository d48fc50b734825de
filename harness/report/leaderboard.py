"""From the frame to leaderboards: one per setting, methods down, tasks across.

Nothing is averaged here but the seeds of one configuration on one task. A cell whose runs gave no score says so.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from harness.report.frame import METRICS
from harness.report.statistics import Summary, summarize

DECIMALS = 3  # of a score, in tables; scores that are equal when printed are equally good
NO_SCORE = "done without a score"

Run = dict[str, Any]  # one row of the frame


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
        return [run for run in self.runs if _present(run["score"])]

    @property
    def failures(self) -> list[tuple[str, int]]:
        """(status in words, runs), for the runs without a score."""
        return sorted(Counter(_status(run) for run in self.runs if not _present(run["score"])).items())


@dataclass(frozen=True)
class Row:
    """One configuration of a method. Numbers are over its scored runs; None where no run has them."""

    label: str
    cells: Mapping[str, Cell]  # by the column's title
    average: float | None  # mean of the cells' scores; None unless every run on every column gave one, all of one sense
    parameters: float | None  # adapter numbers in effect after training, mean
    rank: float | None  # live rank, mean over layers and runs
    batches: float | None  # mean
    seconds: float | None  # of training, mean
    peak_bytes: float | None  # largest


@dataclass(frozen=True)
class Board:
    """The leaderboard of one setting."""

    key: str  # 8 hexadecimal digits
    caption: str  # the setting in words
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]  # best mean of scores first, after them the rows that lack a run's score
    best: Mapping[str, float]  # by title: the best mean of a cell without failures, where two or more have a score
    notes: tuple[str, ...]

    @functools.cached_property
    def n(self) -> int | None:
        """Runs behind most scores: a short table names this once, and other numbers in their cells. None: no score."""
        sizes = Counter(cell.score.n for row in self.rows for cell in row.cells.values() if cell.score.n)
        return max(sizes, key=lambda n: (sizes[n], n)) if sizes else None

    @functools.cached_property
    def has_ranks(self) -> bool:
        """Whether any row has a live rank."""
        return any(row.rank is not None for row in self.rows)

    def is_best(self, row: Row, column: Column) -> bool:
        """Whether this cell may be called best: every run of it gave a score, and its mean prints as the best does."""
        best, cell = self.best.get(column.title), row.cells.get(column.title)
        if best is None or cell is None or cell.score.mean is None or cell.failures:
            return False
        return score_text(cell.score.mean) == score_text(best)


def score_text(score: float) -> str:
    """A score as tables print it."""
    return f"{round(score, DECIMALS) + 0.0:.{DECIMALS}f}"  # + 0.0: no "-0.000"


def over(runs: list[Run], name: str, of: Callable[[list[float]], float] | None = None) -> float | None:
    """The mean of a column of the frame over `runs`, or what `of` makes of it; None where no run has a value."""
    values = [float(run[name]) for run in runs if _present(run[name])]
    if not values:
        return None
    return of(values) if of else math.fsum(values) / len(values)


def leaderboards(frame: pd.DataFrame) -> list[Board]:
    """A board for each setting in `frame` (see `to_frame`), that with the most runs first."""
    settings: dict[str, list[Run]] = defaultdict(list)
    for run in frame.to_dict("records"):
        settings[run["setting"]].append({str(name): value for name, value in run.items()})
    return [_board(runs) for _, runs in sorted(settings.items(), key=lambda item: (-len(item[1]), item[0]))]


def _board(runs: list[Run]) -> Board:
    columns = _columns(runs)
    cells: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=lambda run: run["seed"]):
        cells[run["label"]][run["column"]].append(run)
    rows = [_row(label, by_title, columns) for label, by_title in cells.items()]
    rows.sort(key=lambda row: _order(row, columns))
    best = {column.title: mean for column in columns if (mean := _best(rows, column)) is not None}
    notes = [*_failure_notes(rows), *_seed_notes(rows, columns), *_device_notes(runs)]
    return Board(runs[0]["setting"], _caption(runs), columns, tuple(rows), best, tuple(notes))


def _best(rows: Iterable[Row], column: Column) -> float | None:
    scored = [cell for row in rows if (cell := row.cells.get(column.title)) is not None and cell.score.n]
    whole = [cell.score.mean for cell in scored if cell.score.mean is not None and not cell.failures]
    return max(whole, key=column.merit) if whole and len(scored) > 1 else None


def _columns(runs: list[Run]) -> tuple[Column, ...]:
    metrics: dict[str, dict[str, None]] = defaultdict(dict)
    headlines: dict[str, tuple[str, bool]] = {}
    reported = [name for name in runs[0] if name.startswith(METRICS)]
    for run in runs:
        headlines[run["column"]] = run["headline"], run["higher_is_better"]
        metrics[run["column"]] |= {name: None for name in reported if _present(run[name])}
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
        batches=over(scored, "batches"),
        seconds=over(scored, "seconds_training"),
        peak_bytes=over(scored, "peak_bytes", max),
    )


def _cell(runs: list[Run], column: Column) -> Cell:
    scored = [run for run in runs if _present(run["score"])]
    others = {
        name: summarize(run[METRICS + name] for run in scored if _present(run[METRICS + name]))
        for name in column.others
    }
    return Cell(tuple(runs), summarize(run["score"] for run in scored), others)


def _order(row: Row, columns: Iterable[Column]) -> tuple[int, float, str]:
    merits = {column.title: column.merit for column in columns}
    known = [merits[title](cell.score.mean) for title, cell in row.cells.items() if cell.score.mean is not None]
    num_whole = sum(not cell.failures for cell in row.cells.values())
    return -num_whole, -math.fsum(known) / max(1, len(known)), row.label


def _caption(runs: list[Run]) -> str:
    names = sorted({run["model"] for run in runs if _present(run["model"])})
    fingerprint = runs[0]["model_fingerprint"]
    model = f"{' or '.join(names)} (fingerprint {fingerprint})" if names else fingerprint
    return f"Model {model}; {runs[0]['setting_text']}."


def _failure_notes(rows: Iterable[Row]) -> list[str]:
    """One line for each reason why runs of a cell gave no score."""
    notes = []
    for row in rows:
        for title, cell in row.cells.items():
            seeds: dict[tuple[str, str], list[int]] = defaultdict(list)
            for run in cell.runs:
                if not _present(run["score"]):
                    reason = _one_line(run["error"]) if _present(run["error"]) else "no reason recorded"
                    seeds[_status(run), reason].append(run["seed"])
            for (status, reason), which in seeds.items():
                notes.append(f"{row.label} on {title}: {status} (seed {_listed(which)}): {reason}")
    return notes


def _one_line(text: str) -> str:
    return "".join(sign if sign.isprintable() else "?" for sign in " ".join(text.split()))


def _seed_notes(rows: Iterable[Row], columns: Iterable[Column]) -> list[str]:
    """A line for each column whose means are over different seeds, and so are not means of paired runs."""
    notes = []
    for column in columns:
        labels: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            if column.title in row.cells and row.cells[column.title].score.n:
                labels[_listed(run["seed"] for run in row.cells[column.title].scored)].append(row.label)
        if len(labels) > 1:
            groups = "; ".join(f"{seeds}: {_few(names)}" for seeds, names in sorted(labels.items()))
            notes.append(f"Scores on {column.title} are over different seeds: {groups}.")
    return notes


def _device_notes(runs: Iterable[Run]) -> list[str]:
    devices = sorted({run["device"] for run in runs})
    if len(devices) == 1:
        return []
    return [f"Runs were made on different devices ({', '.join(devices)}): do not compare their seconds and memory."]


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(str(seed) for seed in seeds)


def _few(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _status(run: Run) -> str:
    return NO_SCORE if run["status"] == "done" else run["status"].replace("_", " ")


def _present(value: object) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))
