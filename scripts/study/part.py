"""One of the study's results folders, and what its text asks of it: scores, numbers, differences, verdicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from safetensors.numpy import load_file
from tabulate import tabulate

from harness import installed
from harness.record.record import RunRecord
from harness.record.store import RecordStore
from harness.report.board.frame import METRICS, to_frame
from harness.report.board.leaderboard import Board, Cell, Column, Row, leaderboards
from harness.report.build import boards_of
from harness.report.evidence.compare import Comparison, ExampleReader, compare_cells, corrected
from harness.report.statistics import Difference, over_tasks
from harness.report.wording import human, summary_text

RESERVED = "glue/sst2, reserved"
TITLES = {
    "glue/sst2": "SST-2",
    RESERVED: "SST-2, 10,000 reserved",
    "glue/stsb": "STS-B",
    "glue/mrpc": "MRPC",
    "glue/mnli": "MNLI",
    "rotten_tomatoes": "rotten_tomatoes",
    "cifar10": "CIFAR-10",
}

WORDS = {3: "three", 4: "four", 5: "five"}


class Part:
    """One of the study's results folders: its board, and what the text asks of it."""

    def __init__(
        self,
        store: RecordStore,
        records: Sequence[RunRecord],
        relabel: Callable[[RunRecord], str | None] = lambda record: None,
    ) -> None:
        self.store = store
        self._read = ExampleReader(store, installed.metric_of)
        self._compared: dict[tuple[str, str, str], Comparison] = {}  # by both rows and the task
        self.records = {record.run_id: record for record in records}
        self.traces = installed.traces_of(record.spec.method for record in records)
        frame = to_frame(records, installed.naming_of(record.spec.method for record in records))
        frame["label"] = [
            relabel(self.records[run_id]) or label
            for run_id, label in zip(frame["run_id"], frame["label"], strict=True)
        ]
        self.frame = _with_reserved(frame)
        boards = boards_of(store, self.frame, metric=installed.metric_of)
        assert len(boards) == 1, f"{store.results.name} has {len(boards)} settings"
        self.board = boards[0] if self.frame is frame else _with_task_once(boards[0], self.frame)
        self.rows = {row.label: row for row in self.board.rows}
        self.columns = {_task(column.title): column for column in self.board.columns}

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order of TITLES."""
        return [task for task in TITLES if task in self.columns]

    @property
    def seeds(self) -> str:
        """three, or "three to five" where tasks differ: the numbers of seeds."""
        numbers = {cell.score.n for row in self.board.rows for cell in row.cells.values()}
        return " to ".join(dict.fromkeys(WORDS[n] for n in (min(numbers), max(numbers))))

    def cell(self, label: str, task: str) -> Cell:
        """Runs of a row on a task."""
        return self.rows[label].cells[self.columns[task].title]

    def score(self, label: str, task: str) -> str:
        """0.823 ± 0.004: mean over seeds and half the 95 % interval of t."""
        return summary_text(self.cell(label, task).score, with_n=False)

    def count(self, label: str, task: str) -> float:
        """Adapter numbers after training, mean over seeds."""
        runs = self.cell(label, task).scored
        return sum(run["parameters_final"] for run in runs) / len(runs)

    def numbers(self, label: str, task: str) -> str:
        """The same, for people."""
        return human(self.count(label, task))

    def ranks(self, label: str, task: str) -> dict[int, dict[str, int]]:
        """Final ranks by layer of each seed's run."""
        return {run["seed"]: self.records[run["run_id"]].ranks for run in self.cell(label, task).scored}

    def ratio(self, label: str, other: str, task: str) -> str:
        """Adapter numbers of one row over those of another."""
        return f"{self.count(label, task) / self.count(other, task):.2f}"

    def mean_ratio(self, label: str, other: str) -> str:
        """The same of the means over the tasks that claims rest on."""
        return f"{self.mean(label, self.count) / self.mean(other, self.count):.2f}"

    def ratio_with_head(self, label: str, other: str, task: str) -> str:
        """The same of all trained numbers, the head among them."""
        head = self.cell(label, task).scored[0]["head"]
        return f"{(self.count(label, task) + head) / (self.count(other, task) + head):.2f}"

    def changed(self) -> list[str]:
        """dEBORA's rows with a setting of their own."""
        return sorted(label for label in self.rows if label.startswith("debora["))

    def largest_class(self, task: str) -> str:
        """0.684: share of the largest class in the evaluation split, the accuracy of who always answers it."""
        run = self.cell("lora", task).scored[0]
        kept = load_file(self.store.folder(run["run_id"]) / "predictions.safetensors")
        references = kept[f"{run['split']}/references"]
        return f"{np.unique(references, return_counts=True)[1].max() / len(references):.3f}"

    def rows_of(self, task: str) -> str:
        """56,349: rows of the training split that a run draws from."""
        return f"{self.records[self.cell('lora', task).scored[0]['run_id']].rows['train']:,}"

    def others(self, label: str) -> list[str]:
        """All rows but one."""
        return [other for other in self.rows if other != label]

    def upper_share(self, label: str, task: str) -> str:
        """Share of the budget's batches that no optimizer step was made on: the upper level's."""
        runs = self.cell(label, task).scored
        return f"{1 - sum(run['updates'] for run in runs) / sum(run['batches'] for run in runs):.0%}"

    def compare(self, label: str, others: Sequence[str], task: str) -> dict[str, Comparison]:
        """One row against others on a task: the report's paired test, Holm-corrected over `others`."""
        found = [self._compare(label, other, task) for other in others]
        return dict(zip(others, corrected(found), strict=True))

    def _compare(self, label: str, other: str, task: str) -> Comparison:
        """One comparison, not corrected, made once."""
        key = label, other, task
        if key not in self._compared:
            cells = self.cell(label, task), self.cell(other, task)
            self._compared[key] = compare_cells(*cells, self.columns[task], self._read)
        return self._compared[key]

    def less(self, label: str, other: str, task: str) -> Difference | None:
        """The first's score less the second's, over seeds and examples."""
        return self._compare(label, other, task).difference

    def difference(self, label: str, other: str, task: str) -> str:
        """+0.004 (-0.003 to +0.011): the same with its 95 % interval, as text."""
        return difference_text(self.less(label, other, task))

    def overall(self, label: str, other: str, tasks: Sequence[str] | None = None) -> str:
        """The same of the mean over these tasks; None for those that claims rest on."""
        return difference_text(self._overall(label, other, tasks))

    def _overall(self, label: str, other: str, tasks: Sequence[str] | None = None) -> Difference | None:
        chosen = self.claimed if tasks is None else tasks
        return over_tasks([self.less(label, other, task) for task in chosen])

    def told_overall(self, other: str) -> str:
        """The rows whose mean difference to this one over the tasks has an interval without 0, with it."""
        found = {label: self._overall(label, other) for label in self.others(other)}
        told = [f"`{label}` {difference_text(each)}" for label, each in found.items() if each and each.excludes_zero]
        return ", ".join(told) or "none"

    def told_from_best(self, task: str) -> str:
        """The rows whose scores the paired test tells from the best mean."""
        column = self.columns[task]
        there = [row for row in self.board.rows if column.title in row.cells]
        told = [row for row in there if not self.board.is_best(row, column) and not self.board.is_tie(row, column)]
        return ", ".join(f"`{row.label}`" for row in told) or "none"

    @property
    def claimed(self) -> list[str]:
        """The tasks that claims rest on: of SST-2 the reserved phrases, not the published sentences."""
        return [task for task in self.tasks if task != "glue/sst2" or RESERVED not in self.tasks]

    def mean(self, label: str, of: Callable[[str, str], float]) -> float:
        """The mean over `claimed` of something of a row on a task."""
        return sum(of(label, task) for task in self.claimed) / len(self.claimed)

    def rates_table(self) -> str:
        """The learning rates that the search chose, with * where it is the largest or smallest tried."""
        lines = []
        for row in self.board.rows:
            line = {"method": f"`{row.label}`"}
            for task in (each for each in self.tasks if each != RESERVED):
                spec = self.records[self.cell(row.label, task).runs[0]["run_id"]].spec
                assert spec.search is not None
                chosen = spec.method_parameters["learning_rate"]
                tried = [self.records[trial].spec.method_parameters["learning_rate"] for trial in spec.search.trials]
                line[TITLES[task]] = f"{chosen:g}" + "*" * (chosen in (min(tried), max(tried)))
            lines.append(line)
        return pipes(lines)

    def expect(self, verdict: str, label: str, others: Sequence[str], task: str | None = None) -> str:
        """Nothing, where this is the verdict of each comparison, corrected over `others`; a sentence rests on it.

        `task`: None for every task that claims rest on. Raises ValueError where the records now say something else: the
        sentence has to be written anew.
        """
        for name in self.claimed if task is None else [task]:
            for other, each in self.compare(label, others, name).items():
                if each.verdict != verdict:
                    told = f"{label} is {each.verdict} against {other} on {name}"
                    raise ValueError(f"{told}, where the text says {verdict}")
        return ""

    def expect_overall(self, verdict: str, label: str, others: Sequence[str]) -> str:
        """The same of the mean over the tasks that claims rest on, each comparison on its own."""
        for other in others:
            found = self._overall(label, other)
            told = "undecided"
            if found is not None and found.excludes_zero:
                told = "better" if found.mean > 0 else "worse"
            if told != verdict:
                raise ValueError(f"{label} is {told} against {other} over the tasks, where the text says {verdict}")
        return ""

    def table(self) -> str:
        """Scores against numbers, as Markdown; the number of seeds in a heading where tasks differ in it."""
        seeds = {task: max(self.cell(label, task).score.n for label in self.rows) for task in self.tasks}
        differ = len(set(seeds.values())) > 1
        lines = []
        for row in self.board.rows:
            line = {"method": f"`{row.label}`", "numbers": human(self.mean(row.label, self.count))}
            for task in self.tasks:
                column = self.columns[task]
                heading = f"{TITLES[task]} ({column.headline}{f', {seeds[task]} seeds' if differ else ''})"
                line[heading] = _marked(self.board, row, column, seeds[task])
            if self.board.has_search:
                line["search, batches"] = f"{row.search_batches:.0f}"
            lines.append(line)
        return pipes(lines)


def _task(title: str) -> str:
    return title if title == RESERVED else title.partition("[")[0].partition(" (")[0]


def _with_reserved(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with SST-2's reserved sentences as a task of their own."""
    name = METRICS + "reserved_accuracy"
    if name not in frame:
        return frame
    copied = frame[frame["task"] == "glue/sst2"].assign(column=RESERVED, split="reserved")
    copied = copied.assign(**{"score": copied[name], METRICS + "accuracy": copied[name]})
    return pd.concat([frame, copied], ignore_index=True).drop(columns=name)


def _with_task_once(board: Board, frame: pd.DataFrame) -> Board:
    """The board with order, averages and costs in which SST-2 counts once, by its reserved sentences."""
    (once,) = leaderboards(frame[(frame["task"] != "glue/sst2") | (frame["column"] == RESERVED)])
    cells = {row.label: row.cells for row in board.rows}
    rows = tuple(dataclasses.replace(row, cells=cells[row.label]) for row in once.rows)
    return dataclasses.replace(board, rows=rows, notes=(*board.notes, "SST-2 counts in averages by its reserved rows."))


def _marked(board: Board, row: Row, column: Column, seeds: int) -> str:
    cell = row.cells.get(column.title)
    if cell is None:
        return "-"
    text = summary_text(cell.score, with_n=cell.score.n != seeds) + (" ≈" if board.is_tie(row, column) else "")
    return f"**{text}**" if board.is_best(row, column) else text


def difference_text(found: Difference | None, sign: int = 1) -> str:
    """+0.004 (-0.003 to +0.011): a difference (times `sign`) with its 95 % interval."""
    if found is None:
        return "not available"
    low, high = sorted(sign * end for end in found.interval)
    return f"{sign * found.mean:+.3f} ({low:+.3f} to {high:+.3f})"


def pipes(lines: Sequence[dict[str, str]], left: int = 1) -> str:
    """The lines as a Markdown table, its first `left` columns left-aligned, numbers to the right."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    rows = [[line.get(name, "-") for name in names] for line in lines]
    alignment = ["left"] * left + ["right"] * (len(names) - left)
    return tabulate(rows, names, tablefmt="github", disable_numparse=True, colalign=alignment)
