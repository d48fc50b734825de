"""What a leaderboard is made of: tasks across, configurations of methods down, runs in the cells."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from harness.report.board.runs import Run
from harness.report.statistics import Summary

NO_SCORE = "done without a score"


@dataclass(frozen=True)
class Column:
    """The scores on one task: one data set, one evaluation split, one metric."""

    title: str
    headline: str  # the metric that the score is
    others: tuple[str, ...]  # the other metrics of the split, in the order the task reports them
    higher_is_better: bool = True  # of the score
    is_further: bool = False  # whether the split is a further one of a task that has a column before this
    counts: bool = True  # in averages, mean ranks and the order of rows

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

    @functools.cached_property
    def scored(self) -> list[Run]:
        """The runs that have a score."""
        return [run for run in self.runs if run.score is not None]

    @functools.cached_property
    def seeds(self) -> frozenset[int]:
        """The seeds of these."""
        return frozenset(run.seed for run in self.scored)

    @property
    def failures(self) -> list[tuple[str, int]]:
        """(status in words, runs), for the runs without a score."""
        return sorted(Counter(status_text(run) for run in self.runs if run.score is None).items())


@dataclass(frozen=True)
class Row:
    """One configuration of a method. What else is known of it, `harness.report.board.columns` reads from its runs."""

    label: str
    cells: Mapping[str, Cell]  # by the column's title
    average: float | None  # mean of the scores that count; None unless every run on all tasks gave one, of one sense

    @functools.cached_property
    def runs(self) -> list[Run]:
        """All of its runs, once each."""
        return list({run.run_id: run for cell in self.cells.values() for run in cell.runs}.values())

    @functools.cached_property
    def scored(self) -> list[Run]:
        """Those that have a score, once each."""
        return list({run.run_id: run for cell in self.cells.values() for run in cell.scored}.values())

    @functools.cached_property
    def tuning(self) -> str:
        """ "tuned K", "default" or "as given"; several, where runs differ."""
        return ", ".join(sorted({run.tuning for run in self.runs}))

    def on(self, title: str) -> Row:
        """The row as it would be with this task alone."""
        return dataclasses.replace(self, cells={title: self.cells[title]}, average=None)


@dataclass(frozen=True)
class Section:
    """Rows of a table that stand together."""

    title: str  # a heading above them; "" for none
    rows: tuple[Row, ...]
    ranked: bool = True  # whether they compete for the best; else they stand below a rule, in grey


def over(runs: Iterable[Run], name: str, of: Callable[[list[float]], float] | None = None) -> float | None:
    """The mean of an attribute over `runs`, or what `of` makes of it; None where no run has a value."""
    values = [float(value) for run in runs if (value := getattr(run, name)) is not None]
    if not values:
        return None
    return of(values) if of else math.fsum(values) / len(values)


def with_search(runs: Iterable[Run], name: str) -> float | None:
    """The mean over `runs` of batches or seconds_training, the search included; None where that is not known."""
    search = "search_batches" if name == "batches" else "search_seconds"
    costs = [(getattr(run, name), getattr(run, search)) for run in runs]
    if not costs or any(searched is None for _, searched in costs):
        return None
    return math.fsum(own + searched for own, searched in costs) / len(costs)


def peak_bytes(runs: Iterable[Run]) -> float | None:
    """The largest peak memory of the runs and of their searches; None where none is known."""
    peaks = [each or 0 for run in runs for each in (run.peak_bytes, run.search_peak_bytes)]
    return max(peaks, default=0) or None


def whole(number: float | None) -> float | int | None:
    """A number without a fraction as an integer."""
    return int(number) if number is not None and float(number).is_integer() else number


def status_text(run: Run) -> str:
    """Why a run has no score, in words."""
    return NO_SCORE if run.status == "done" else run.status.replace("_", " ")
