"""The columns of a leaderboard beside its scores, each declared once, for all forms of the table and for `--sort`.

A package adds one through the entry-point group `harness.columns`, whose entry is a TableColumn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from harness.report.board import text_samples
from harness.report.board.rows import Column, Row, over, peak_bytes, with_search
from harness.report.board.runs import Run
from harness.report.statistics import rank_aurac
from harness.report.wording import decimal, human, score_text

Value = float | str | None  # None: not known
Form = Literal["console", "markdown", "latex", "page", "csv", "json"]
FORMS: tuple[Form, ...] = ("console", "markdown", "latex", "page", "csv", "json")
WIDE: tuple[Form, ...] = ("markdown", "page", "csv", "json")  # where there is room
TABLES: tuple[Form, ...] = ("console", "markdown", "latex", "page")

# Names in data that are no TableColumn's: of a row's place, its scores and its runs.
RESERVED = {"setting", "setting_text", "label", "column", "metric", "is_headline", "is_best", "ties_with_best", "cells"}
RESERVED |= {"method", "provenance", "method_version", "method_parameters"}
RESERVED |= {"task", "task_version", "task_parameters"}
RESERVED |= {"data_fingerprint", "model_fingerprint", "n", "mean", "standard_deviation", "interval_95"}
RESERVED |= {"runs", "done", "unsupported", "diverged", "out_of_memory", "failed", "seeds", "run_ids"}


@dataclass(frozen=True)
class TableColumn:
    """One column: what it is called, what it holds, and where it is shown."""

    name: str  # for `--sort` and, with spaces, as a heading
    value: Callable[[Row], Value]  # of a row; a CSV has it for each task, with a row of that task alone
    words: str = ""  # what it is, for the legend
    text: Callable[[Any], str] = decimal  # of a value that is known
    rises: bool = True  # sorted by it, the smallest comes first
    of_scores: bool = False  # it is made of scores: their sense is its own, and `rises` has no say
    forms: Collection[Form] = FORMS
    shown: Callable[[Sequence[Row]], bool] = lambda rows: True  # whether a table of these rows has it
    before_scores: bool = False
    keys: dict[Form, str] = field(default_factory=dict)  # its name in CSV and JSON, where it is not `name`

    @property
    def heading(self) -> str:
        return self.name.replace("_", " ")

    def key(self, form: Form) -> str:
        """Its name in data."""
        return self.keys.get(form, self.name)

    def lower_is_better(self, tasks: Iterable[Column]) -> bool:
        """Whether the smallest comes first, where it is of these tasks."""
        return not any(column.higher_is_better for column in tasks) if self.of_scores else self.rises

    def text_of(self, row: Row) -> str:
        """Its text in a table; "-" where the value is not known."""
        value = self.value(row)
        return "-" if value is None else self.text(value)


def of_runs(name: str) -> Callable[[Row], float | None]:
    """The mean of an attribute of the row's scored runs, see `harness.report.board.runs.Run`."""
    return lambda row: over(row.scored, name)


def _any(name: str) -> Callable[[Sequence[Row]], bool]:
    """Whether a run has this attribute, and not 0."""
    return lambda rows: any(getattr(run, name) for row in rows for run in row.scored)


def _rank_aurac(axis: str) -> Callable[[Row], float | None]:
    """Of a row: the area over this axis, mean over the seeds of a task, then over the tasks; None unless all of its
    runs were cut to the same ranks, and more is better on all tasks or less on all."""

    def value(row: Row) -> float | None:
        cells = _cells(row)
        if len(_ranks(row)) != 1 or len({runs[0].higher_is_better for runs in cells}) > 1:
            return None
        (ranks,) = _ranks(row)
        if not ranks:
            return None
        means = [
            math.fsum(rank_aurac(ranks, [run.record.rank_curve[rank] for rank in ranks])[axis] for run in runs)
            / len(runs)
            for runs in cells
        ]
        return math.fsum(means) / len(means)

    return value


def _ranks(row: Row) -> set[tuple[int, ...]]:
    """The ranks that the adapters of its runs were cut to."""
    return {tuple(sorted(run.record.rank_curve)) for runs in _cells(row) for run in runs}


def _cells(row: Row) -> list[list[Run]]:
    """The scored runs of each task, on its first split: the one that adapters are cut for."""
    return [cell.scored for cell in row.cells.values() if cell.scored and not cell.runs[0].is_further]


def _same_ranks(rows: Sequence[Row]) -> bool:
    """Whether there are rank curves, all of the same ranks: areas over others cannot be compared."""
    return len({ranks for row in rows for ranks in _ranks(row) if ranks}) == 1


def _several_tasks(rows: Sequence[Row]) -> bool:
    return len({title for row in rows for title, cell in row.cells.items() if cell.runs[0].counts}) > 1


def _most_bytes(name: str, attribute: str, words: str) -> TableColumn:
    """The column of the largest of an attribute of runs, in bytes; data have it by the attribute's name."""
    return TableColumn(
        name,
        lambda row: over(row.scored, attribute, max),
        words,
        lambda size: human(size, "B"),
        forms=WIDE,
        shown=_any(attribute),
        keys={"csv": attribute, "json": attribute},
    )


COLUMNS = (
    TableColumn("parameters_initial", of_runs("parameters_initial"), forms=["csv"]),
    TableColumn("parameters_peak", of_runs("parameters_peak"), forms=["csv"]),
    TableColumn(
        "parameters",
        of_runs("parameters_final"),
        "of the adapter after training, without the head",
        human,
        before_scores=True,
        keys={"csv": "parameters_final"},
    ),
    TableColumn("head", of_runs("head"), forms=["csv"]),
    TableColumn(
        "stored_bytes",
        of_runs("stored_bytes"),
        "to keep of a run beside the shared backbone",
        lambda stored: human(stored, "B"),
        forms=["page", "csv"],
    ),
    TableColumn(
        "rank",
        of_runs("rank"),
        "of the adapted layers after training",
        shown=lambda rows: any(run.rank is not None for row in rows for run in row.scored),
        before_scores=True,
    ),
    TableColumn(
        "average",
        lambda row: row.average,
        "over tasks, where no score is missing",
        score_text,
        of_scores=True,
        forms=[*TABLES, "json"],
        shown=_several_tasks,
    ),
    TableColumn(
        "rank_aurac_linear",
        _rank_aurac("linear"),
        "mean score of the trained adapter cut to the ranks of --rank-curve, a trapezoid mean over the rank",
        score_text,
        of_scores=True,
        shown=_same_ranks,
    ),
    TableColumn(
        "rank_aurac_log2",
        _rank_aurac("log2"),
        "the same over the rank's logarithm, in which octaves weigh alike",
        score_text,
        of_scores=True,
        shown=_same_ranks,
    ),
    TableColumn(
        "forgetting",
        text_samples.forgetting,
        "rise of the mean loss per token, in nats, on the text sample that the table of forgetting names",
        score_text,
        shown=text_samples.same_windows,
    ),
    TableColumn(
        "settings",
        lambda row: row.tuning,
        "hyperparameters at their defaults, as given, or tuned: the best of K trials on the holdout",
        str,
        forms=[*TABLES, "json"],
    ),
    TableColumn(
        "search_batches",
        of_runs("search_batches"),
        "of the hyperparameter search",
        forms=WIDE,
        shown=_any("search_batches"),
    ),
    TableColumn(
        "search_seconds",
        of_runs("search_seconds"),
        "of its training",
        forms=WIDE,
        shown=_any("search_batches"),
    ),
    TableColumn(
        "batches",
        lambda row: with_search(row.scored, "batches"),
        "through forward and backward, with the search",
        forms=WIDE,
    ),
    TableColumn(
        "seconds",
        lambda row: with_search(row.scored, "seconds_training"),
        "of training, with the search",
        keys={"csv": "seconds_training"},
    ),
    TableColumn(
        "tokens_a_second",
        of_runs("tokens_a_second"),
        "of training, padding apart",
        lambda rate: f"{rate:,.0f}",
        rises=False,
        forms=WIDE,
        shown=_any("tokens_a_second"),
    ),
    TableColumn(
        "ms_a_generated_token",
        lambda row: None if (found := over(row.scored, "seconds_a_generated_token")) is None else 1000 * found,
        "milliseconds, greedy, of a row in a batch, with the reading of the prompt",
        lambda found: f"{found:.3g}",
        forms=WIDE,
        shown=_any("seconds_a_generated_token"),
    ),
    TableColumn(
        "generation_to_backbone",
        of_runs("generation_to_backbone"),
        "the same over the untouched backbone's",
        lambda ratio: f"{ratio:.2f}",
        forms=WIDE,
        shown=_any("generation_to_backbone"),
    ),
    TableColumn(
        "memory",
        lambda row: peak_bytes(row.scored),
        "the largest peak, with the search",
        lambda peak: human(peak, "B"),
        forms=WIDE,
        keys={"csv": "peak_bytes", "json": "peak_bytes"},
    ),
    _most_bytes("training_memory", "training_peak_bytes", "the largest peak of training alone"),
    _most_bytes(
        "reserved_memory", "training_reserved_bytes", "what torch's allocator held of the GPU in training, at most"
    ),
    _most_bytes(
        "optimizer_state", "optimizer_bytes", "what the optimizer keeps between updates, at most; a part of the memory"
    ),
    TableColumn(
        "backbone_bytes",  # the same for nearly all rows of a setting: no column for readers
        lambda row: over(row.scored, "backbone_bytes", max),
        "of the backbone's parameters as they are held; a part of the memory",
        forms=["csv", "json"],
        shown=_any("backbone_bytes"),
    ),
    TableColumn(
        "file_size",
        of_runs("file_bytes"),
        "of the kept adapter and head",
        lambda size: human(size, "B"),
        forms=WIDE,
        shown=_any("file_bytes"),
        keys={"csv": "file_bytes", "json": "file_bytes"},
    ),
)
