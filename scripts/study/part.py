"""One of the study's results folders, and what its text asks of it: everything comes from the report's own tables."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from tabulate import tabulate

from harness import installed
from harness.record.record import PREDICTIONS, RunRecord
from harness.record.store import RecordStore
from harness.report.board.leaderboard import Board
from harness.report.board.parents import grouped
from harness.report.board.rows import Cell, Column, over
from harness.report.board.runs import every_split, runs_of
from harness.report.board.selection import matching, selected
from harness.report.build import boards_of
from harness.report.evidence.compare import ExampleReader, row_of
from harness.report.forms import plain, text
from harness.report.statistics import Difference, over_tasks
from harness.report.tables.differences import Against, Differences, differences, differences_table
from harness.report.tables.rank_agreement import agreement_table, agreements, shared
from harness.report.tables.trials import trials_frame
from harness.report.wording import human
from harness.spec import Selection

COUNTED = {"glue/sst2": "reserved"}  # the split that claims rest on, where it is not the first
WORDS = {3: "three", 4: "four", 5: "five"}


class Part:
    """A sweep of the study: its board as the [report] table of its plan shows it, and what the text asks of it."""

    def __init__(self, folder: Path, width: int | None = None) -> None:
        """`folder`: of the results, named as the plan. `width`: of a BERT's layers, whose shapes old records lack."""
        self.store = RecordStore.existing(folder)
        plan = tomllib.loads(Path(__file__).with_name(f"{folder.name}.toml").read_text())
        records = self.store.records()
        naming = installed.naming_of(record.spec.method for record in records)
        records = grouped(self.store, [_with_shapes(record, width) for record in records], naming)
        runs = every_split(runs_of(records, naming), COUNTED)
        self.selection = Selection.model_validate(plan["report"])
        provenance = installed.provenance_of(record.spec.method for record in records)
        (self.board,) = boards_of(
            self.store, runs, metric=installed.metric_of, selection=self.selection, provenance=provenance
        )
        self.records = {record.run_id: record for record in records}
        self.trials = trials_frame(records, naming)
        self.traces = installed.traces_of(record.spec.method for record in records)
        self.agreed = list(agreements(self.board)) if width else []

    def only(self, *rows: str, columns: Sequence[str] = ()) -> Board:
        """The board with these rows and columns alone, as `report` names them."""
        narrower = self.selection.model_copy(update={"rows": rows, "columns": tuple(columns)})
        return selected([self.board], narrower)[0]

    @functools.cache  # noqa: B019  (a few parts, which live as long as the program)
    def against(self, baseline: str) -> Differences:
        """The report's differences of all rows to one."""
        read = ExampleReader(self.store, installed.metric_of)
        return differences([self.board], baseline, read)[self.board.key]

    # Tables.

    def table(self) -> str:
        """The leaderboard."""
        return text.table(self.board)

    def differences(self, baseline: str) -> str:
        """The table of all rows less one."""
        return plain.table(differences_table(self.against(baseline)))

    def ranks(self, *rows: str) -> str:
        """The table of how far seeds agree on their ranks."""
        labels = matching(rows, [each.label for each in self.agreed])
        return plain.table(agreement_table(self.board, [each for each in self.agreed if each.label in labels]))

    def rates(self) -> str:
        """The learning rates that the search chose, with * where it is the largest or smallest tried."""
        lines: dict[str, dict[str, str]] = {}
        for (label, task), trials in self.trials.groupby(["label", "column"]):
            tried = trials["value"].astype(float)
            chosen = tried[trials["chosen"]].iloc[0]
            mark = "*" * (chosen in (tried.min(), tried.max()))
            lines.setdefault(str(label), {"method": f"`{label}`"})[str(task)] = f"{chosen:g}{mark}"
        return tabulate(lines.values(), "keys", tablefmt="github", disable_numparse=True)

    # What fills a sentence.

    @property
    def seeds(self) -> str:
        """three, or "three to five" where tasks differ: the numbers of seeds."""
        numbers = {cell.score.n for row in self.board.rows for cell in row.cells.values()}
        return " to ".join(dict.fromkeys(WORDS[n] for n in (min(numbers), max(numbers))))

    def less(self, label: str, other: str, *tasks: str) -> str:
        """+0.004 (-0.003 to +0.011): the first's score less the second's, mean over these tasks (none: over all that
        claims rest on), with its 95 % interval."""
        found = self.difference(label, other, *tasks)
        low, high = found.interval
        return f"{found.mean:+.3f} ({low:+.3f} to {high:+.3f})"

    def difference(self, label: str, other: str, *tasks: str) -> Difference:
        """The same as numbers."""
        on = self._row(label, other).on
        titles = tasks or [column.title for column in self.board.counted]
        found = [on[title].difference for title in titles]
        mean = found[0] if len(found) == 1 else over_tasks(found)
        assert mean is not None
        return mean

    def share(self, label: str, other: str, task: str | None = None, with_head: bool = False) -> str:
        """0.24: adapter parameters of one row over those of another, means over tasks; of one task also with the
        head."""
        if task is None:
            return f"{self._row(label, other).share:.2f}"
        head = (self.cell(label, task).scored[0].head or 0) if with_head else 0
        return f"{(self._count(label, task) + head) / (self._count(other, task) + head):.2f}"

    def parameters(self, label: str, task: str) -> str:
        """9.62k: of the adapter after training, mean over seeds."""
        return human(self._count(label, task))

    def significant(self, baseline: str) -> str:
        """The rows that differ from this one over the tasks, after Holm's correction, with their differences."""
        found = self.against(baseline).rows.items()
        told = [label for label, row in found if row.overall and row.overall.verdict in ("better", "worse")]
        return ", ".join(f"`{label}` {self.less(label, baseline)}" for label in told) or "none"

    def behind(self, column: Column) -> str:
        """The rows whose scores the paired test tells from the best mean."""
        board = self.board
        told = [row.label for row in board.rows if not board.is_best(row, column) and not board.is_tie(row, column)]
        return ", ".join(f"`{label}`" for label in told) or "none"

    def beyond_chance(self, rows: str) -> str:
        """3 of 28 (`debora[tau=32]` on glue/mnli): rows and tasks whose seeds share more than the middle 95 % of
        chance."""
        own = [each for each in self.agreed if matching([rows], [each.label])]
        names = ", ".join(f"`{each.label}` on {each.column.title}" for each in own if each.found.is_beyond_chance)
        return f"{sum(each.found.is_beyond_chance for each in own)} of {len(own)}" + (f" ({names})" if names else "")

    def shared(self, label: str, other: str) -> str:
        """0.77: components that runs of two rows have in common, layer by layer, mean over seeds and tasks."""
        runs = [self._ranks(each) for each in (label, other)]
        return f"{np.mean([shared([ranks, runs[1][key]]) for key, ranks in runs[0].items()]):.2f}"

    def feed_forward(self, label: str) -> str:
        """32%: share of the components in feed-forward layers, mean over runs."""
        every = self._ranks(label).values()
        wide = [sum(rank for layer, rank in ranks.items() if "attention" not in layer) for ranks in every]
        return f"{np.mean([part / sum(ranks.values()) for part, ranks in zip(wide, every, strict=True)]):.0%}"

    def largest_class(self, task: str) -> str:
        """0.684: share of the largest class in the evaluation split, the accuracy of who always answers it."""
        run = self.cell("lora", task).scored[0]
        references = load_file(self.store.folder(run.run_id) / PREDICTIONS)[f"{run.split}/references"]
        return f"{np.unique(references, return_counts=True)[1].max() / len(references):.3f}"

    def training_rows(self, task: str) -> str:
        """56,349: rows of the training split that a run draws from."""
        return f"{self.cell('lora', task).scored[0].record.rows['train']:,}"

    def upper_share(self, label: str, task: str) -> str:
        """Share of the budget's batches that no optimizer step was made on: the upper level's."""
        runs = self.cell(label, task).scored
        return f"{1 - sum(run.record.updates for run in runs) / sum(run.batches for run in runs):.0%}"

    # What a sentence rests on: "" where it holds, else the sentence has to be written anew.

    def expect(self, verdict: str, baseline: str, rows: Sequence[str], *tasks: str) -> str:
        """Each of these rows (none: all) is better, worse or undecided against the baseline, after the correction over
        its table; on these tasks, or (none) on all that claims rest on and over them. Raises ValueError."""
        for label in rows or self.against(baseline).rows:
            row = self._row(label, baseline)
            found = {title: row.on[title].verdict for title in tasks or [each.title for each in self.board.counted]}
            if not tasks and row.overall is not None:
                found["all tasks"] = row.overall.verdict
            for place, told in found.items():
                if told != verdict:
                    raise ValueError(f"{label} is {told} against {baseline} on {place}; the text says {verdict}")
        return ""

    def expect_overall(self, verdict: str, baseline: str, rows: Sequence[str]) -> str:
        """The same over the tasks alone. Raises ValueError."""
        found = {label: self._row(label, baseline).overall for label in rows}
        if wrong := [label for label, each in found.items() if each is None or each.verdict != verdict]:
            raise ValueError(f"{wrong} are not {verdict} against {baseline} over the tasks, as the text says")
        return ""

    def expect_ranks(self, label: str, beyond: bool) -> str:
        """The row's seeds agree beyond chance on every task, or on none. Raises ValueError."""
        for each in self.agreed:
            if each.label == label and each.found.is_beyond_chance != beyond:
                raise ValueError(f"seeds of {label} share {each.found} on {each.column.title}; the text says otherwise")
        return ""

    def changed(self, method: str) -> list[str]:
        """The rows of a method with a setting of their own."""
        return matching([f"{method}[*"], [row.label for row in self.board.rows])

    def cell(self, label: str, task: str) -> Cell:
        """Runs of a row on a task."""
        return row_of(self.board, label).cells[task]

    def _row(self, label: str, baseline: str) -> Against:
        return self.against(baseline).rows[row_of(self.board, label).label]

    def _count(self, label: str, task: str) -> float:
        return over(self.cell(label, task).scored, "parameters_final") or 0.0

    def _ranks(self, label: str) -> dict[tuple[str, int], dict[str, int]]:
        """Final ranks by layer of each run, by task and seed."""
        titles = [column.title for column in self.board.counted]
        return {(task, run.seed): run.record.ranks for task in titles for run in self.cell(label, task).scored}


def _with_shapes(record: RunRecord, width: int | None) -> RunRecord:
    """The record with the shapes of a BERT's linear layers: all of attention are square, two feed forward."""
    if width is None or record.shapes:
        return record
    shapes = {}
    for layer in record.ranks:
        module = layer.partition("layer.")[2].partition(".")[2]
        wide = {"intermediate.dense": (4 * width, width), "output.dense": (width, 4 * width)}
        shapes[layer] = wide.get(module, (width, width))
    return record.model_copy(update={"shapes": shapes})
