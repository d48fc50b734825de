"""Two configurations, task by task: paired differences and what they allow to say."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.errors import unknown
from harness.metric import Metric
from harness.record.record import PREDICTIONS
from harness.record.store import RecordStore
from harness.report.board.leaderboard import Board
from harness.report.board.rows import Cell, Column, Row
from harness.report.board.runs import Run
from harness.report.evidence.examples import FindMetric, common, example_scores
from harness.report.pictures.histories import one_line
from harness.report.statistics import (
    CONFIDENCE,
    POWER,
    Difference,
    crossed,
    holm,
    interquartile_mean,
    mcnemar,
    over_tasks,
    paired,
    probability_of_improvement,
)
from harness.report.wording import score_text

LEAST_TASKS = 3  # for an interquartile mean over tasks


class ExampleReader:
    """Per-example scores of runs of a store, each file read once. `metric`: finds what a run's score is by its task.
    `damaged`: what is wrong, by run_id, with the predictions that could not be used."""

    def __init__(self, store: RecordStore, metric: FindMetric = common) -> None:
        self._store, self._metric = store, metric
        self.damaged: dict[str, str] = {}
        self._known: dict[tuple[str, str, int | None], np.ndarray | None] = {}  # by run_id, split and cut

    def __call__(self, run: Run, column: Column) -> np.ndarray | None:
        """See `example_scores`; None also where no predictions were kept, or they are damaged."""
        metric = self._metric(run.task, column.headline)
        if metric is None or metric.parts is None or run.split is None:
            return None
        key = run.run_id, run.split, run.cut
        if key not in self._known:
            self._known[key] = self._read(run, run.split, metric)
        return self._known[key]

    def tells_right_from_wrong(self, run: Run, column: Column) -> bool:
        """Whether a score is a share of examples that are right or wrong."""
        metric = self._metric(run.task, column.headline)
        return metric is not None and metric.right_or_wrong

    def _read(self, run: Run, split: str, metric: Metric) -> np.ndarray | None:
        assert run.score is not None
        try:
            path = self._store.verified(run.run_id, PREDICTIONS, run.record)
            return example_scores(path, split, metric, run.score, run.record.rows.get(split), run.cut)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self.damaged[run.run_id] = one_line(error)
            return None

    def forget(self) -> None:
        """Let go of what was read."""
        self._known.clear()


@dataclass(frozen=True)
class Comparison:
    """Two configurations on one task, over the seeds that both have a score of."""

    column: Column
    task: str  # by its name alone, where the column's title may say more
    seeds: tuple[int, ...]
    scores: tuple[np.ndarray, np.ndarray]  # (seeds,) of the first and of the second
    difference: Difference | None  # first less second, in the score's unit; None: not available
    num_examples: int | None  # None: the examples are not in the difference's interval
    mcnemar: tuple[float, ...]  # p within each seed; only of a share of right answers
    largest: float = 0.0  # difference on an example, mean over seeds, without its sign
    adjusted_p: float | None = None  # Holm's, over the tasks compared

    @property
    def verdict(self) -> str:
        """better, worse, undecided or not comparable: of the first against the second. "better" and "worse" need a 95 %
        interval without 0, and Holm's correction where there are several tasks."""
        return verdict_of(self.difference, self.adjusted_p, self.column.merit(1)) if self.seeds else "not comparable"


def verdict_of(found: Difference | None, adjusted_p: float | None, sign: float) -> str:
    """better, worse or undecided, of a difference whose p value is corrected; `sign`: -1 where less is better."""
    if found is None or adjusted_p is None or adjusted_p >= 1 - CONFIDENCE or not found.excludes_zero:
        return "undecided"
    return "better" if sign * found.mean > 0 else "worse"


def rows_of(boards: Sequence[Board], name: str, kind: str = "row") -> dict[str, Row]:
    """By the board's key, the row with this label, the only one with it before a "(tuned 4)", or the only one of this
    method. Raises InputError where no board has it; `kind`: what it is called there."""
    name = name.replace(", ", ",")  # as the console folds labels
    found, several = {}, set()
    for board in boards:
        labelled = [row for row in board.rows if row.label == name]
        begun = [row for row in board.rows if row.label.partition(" (")[0] == name]
        of_method = [row for row in board.rows if name in {run.method for run in row.runs}]
        if only := next((rows[0] for rows in (labelled, begun, of_method) if len(rows) == 1), None):
            found[board.key] = only
        several |= {row.label for row in begun or of_method}
    if not found:
        labels = several or {row.label for board in boards for row in board.rows}
        raise unknown(f"{kind} (several are of this method)" if several else kind, name, labels)
    return found


def row_of(board: Board, name: str) -> Row:
    """The same of one board."""
    return rows_of([board], name)[board.key]


def compare(board: Board, pairs: Sequence[tuple[Row, Row]], read: ExampleReader) -> list[list[Comparison]]:
    """Of each pair, the comparisons on every task that both rows have runs on, with Holm's correction over all."""
    found: list[tuple[int, Comparison]] = []
    for column in board.columns:
        for place, rows in enumerate(pairs):
            if all(column.title in row.cells for row in rows):
                first, second = (row.cells[column.title] for row in rows)
                found.append((place, compare_cells(first, second, column, read)))
        read.forget()  # memory is that of one task
    every = corrected([each for _, each in found])
    return [[each for (own, _), each in zip(found, every, strict=True) if own == place] for place in range(len(pairs))]


def corrected(found: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons with Holm's correction over those of them that have a difference."""
    adjusted = iter(holm([each.difference.p_value for each in found if each.difference is not None]))
    return [
        dataclasses.replace(each, adjusted_p=next(adjusted)) if each.difference is not None else each for each in found
    ]


def compare_cells(first: Cell, second: Cell, column: Column, read: ExampleReader) -> Comparison:
    """One comparison, not corrected: from examples and seeds where predictions were kept, else from seeds alone."""
    by_seed = [{run.seed: run for run in cell.scored} for cell in (first, second)]
    seeds = tuple(sorted(by_seed[0].keys() & by_seed[1].keys()))
    runs = [[of_seed[seed] for seed in seeds] for of_seed in by_seed]
    scores = [np.array([run.score for run in of_row], dtype=float) for of_row in runs]
    differences = _by_example(runs[0], runs[1], column, read)
    binary = differences is not None and read.tells_right_from_wrong(runs[0][0], column)
    return Comparison(
        column,
        first.runs[0].task,
        seeds,
        (scores[0], scores[1]),
        difference=paired(scores[0] - scores[1]) if differences is None else crossed(differences),
        num_examples=None if differences is None else differences.shape[1],
        mcnemar=tuple(_mcnemar(row) for row in differences) if binary and differences is not None else (),
        largest=0.0 if differences is None else float(np.abs(differences.mean(axis=0)).max(initial=0.0)),
    )


def with_ties(board: Board, read: ExampleReader) -> Board:
    """The board with the cells marked that are not significantly different from its best by the paired test,
    Holm-corrected over a task, of the rows that have every seed of it; and with notes of those that could not be tested
    and of predictions that could not be used."""
    ties, notes, before = {}, list(board.notes), set(read.damaged)
    for column in board.columns:
        best = [row for row in board.rows if board.is_best(row, column)]
        if best:  # several print alike: the best mean, whatever order the rows are in
            first = max(best, key=lambda row: (column.merit(row.cells[column.title].score.mean or 0.0), row.label))
            ties[column.title], untested = _tied(board, first, column, read)
            if untested:
                notes.append(
                    f"Not tested against the best on {column.title} (no two common seeds, or no spread): "
                    f"{', '.join(untested)}."
                )
        read.forget()  # memory is that of one task
    notes += [unused(run_id, read.damaged[run_id]) for run_id in sorted(read.damaged.keys() - before)]
    return dataclasses.replace(board, ties=ties, notes=tuple(notes))


def unused(run_id: str, reason: str) -> str:
    """What to tell of a run with damaged predictions."""
    return f"The predictions of run {run_id} cannot be used ({reason}): its cell is tested on seeds alone."


def _tied(board: Board, best: Row, column: Column, read: ExampleReader) -> tuple[frozenset[str], list[str]]:
    """(labels not significantly different from the best, labels with a score that no test was possible on)."""
    others = [row for row in board.rows if row is not best and board.is_ranked(row, column)]
    found = [compare_cells(best.cells[column.title], row.cells[column.title], column, read) for row in others]
    by_label = dict(zip((row.label for row in others), corrected(found), strict=True))
    tied = frozenset(
        label for label, each in by_label.items() if each.adjusted_p is not None and each.adjusted_p >= 1 - CONFIDENCE
    )
    return tied, [row.label for row in others if not by_label[row.label].difference and row.cells[column.title].scored]


def _by_example(first: Sequence[Run], second: Sequence[Run], column: Column, read: ExampleReader) -> np.ndarray | None:
    """(seeds, examples) differences; None where a run's examples cannot be had."""
    rows = []
    for pair in zip(first, second, strict=True):
        a, b = (read(run, column) for run in pair)
        if a is None or b is None or a.shape != b.shape:
            return None
        rows.append(a - b)
    return np.stack(rows) if rows and len({len(row) for row in rows}) == 1 else None


def _mcnemar(differences: np.ndarray) -> float:
    return mcnemar(int((differences > 0.5).sum()), int((differences < -0.5).sum()))


def in_words(first: str, second: str, comparisons: Sequence[Comparison]) -> list[str]:
    """The verdicts with the numbers behind them, a line each; over several tasks, what holds for all of them."""
    lines = []
    for each in comparisons:
        lines += [f"{each.column.title} ({each.column.metric}): {_verdict(each, first, second)}", *_numbers(each)]
    whole = [each for each in comparisons if each.seeds]
    if len(whole) > 1:
        lines += ["", *_over_tasks(whole, first, second)]
    return lines


def _verdict(each: Comparison, first: str, second: str) -> str:
    found = each.difference
    if not each.seeds:
        return f"not comparable: no seed on which both {first} and {second} have a score"
    if each.verdict in ("better", "worse"):
        return f"{first} is {each.verdict} than {second}"
    if len(each.seeds) == 1:
        return "undecided: one seed says nothing about other seeds"
    if found is None:
        return "undecided: no spread between the runs to judge by"
    if not found.excludes_zero:
        return "undecided: the interval includes 0"
    return "undecided: the interval excludes 0, but not after Holm's correction for several tests"


def _numbers(each: Comparison) -> list[str]:
    if not each.seeds:
        return []
    first, second = (float(scores.mean()) for scores in each.scores)
    seeds = f"{len(each.seeds)} seed{'s' * (len(each.seeds) > 1)} ({', '.join(map(str, each.seeds))})"
    lines = [f"  means {score_text(first)} and {score_text(second)} over {seeds}, difference {first - second:+.4f}"]
    found = each.difference
    if found is None:
        lines.append("  95 % interval: not available")
    else:
        what = "seeds alone" if each.num_examples is None else f"seeds and {each.num_examples:,} examples"
        low, high = found.interval
        lines.append(
            f"  95 % interval {low:+.4f} to {high:+.4f} ({what}; t, {found.degrees:.1f} degrees of freedom), "
            f"p = {found.p_value:.3g}, after Holm {each.adjusted_p:.3g}"
        )
        lines.append(f"  these data would have found a difference of {found.detectable:.4f} (power {POWER:g})")
    if each.mcnemar:
        tests = ", ".join(f"seed {seed}: {p:.3g}" for seed, p in zip(each.seeds, each.mcnemar, strict=True))
        lines.append(f"  McNemar's p within a seed, about its two models only: {tests}")
    return lines


def _over_tasks(comparisons: Sequence[Comparison], first: str, second: str) -> list[str]:
    turned = [[each.column.merit(1) * each.scores[place] for each in comparisons] for place in (0, 1)]
    chance = probability_of_improvement(*turned)
    lines = [f"over {len(comparisons)} tasks: probability that a run of {first} beats one of {second}: {chance:.2f}"]
    if len({each.column.higher_is_better for each in comparisons}) > 1:
        return lines
    if len({each.task for each in comparisons}) == len(comparisons):  # not the same examples twice
        lines.append(f"  mean difference over these tasks: {_mean_difference(comparisons)}")
    if len(comparisons) >= LEAST_TASKS:
        for name, place in ((first, 0), (second, 1)):
            mean, low, high = interquartile_mean([each.scores[place] for each in comparisons])
            spread = "not available" if low is None else f"{low:.4f} to {high:.4f}"
            lines.append(f"  interquartile mean of {name}: {mean:.4f} (95 % interval: {spread})")
    return lines


def _mean_difference(comparisons: Sequence[Comparison]) -> str:
    found = over_tasks([each.difference for each in comparisons])
    if found is None:
        return "not available"
    low, high = found.interval
    spread = f"95 % interval: {low:+.4f} to {high:+.4f}; t, {found.degrees:.1f} degrees of freedom"
    return f"{found.mean:+.4f} ({spread}), p = {found.p_value:.3g}"
