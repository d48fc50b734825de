"""One of the study's results folders, and what its text asks of it: scores, numbers, differences, verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
from tabulate import tabulate

from harness.commands.report import naming_of
from harness.record import RecordStore, RunRecord
from harness.report.build import boards_of
from harness.report.compare import Comparison, ExampleReader, compare_cells, corrected
from harness.report.frame import METRICS, to_frame
from harness.report.leaderboard import Board, Cell, Column, Row
from harness.report.text import human, summary_text

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


class Part:
    """One of the study's results folders: its board, and what the text asks of it."""

    def __init__(
        self,
        store: RecordStore,
        records: Sequence[RunRecord],
        relabel: Callable[[RunRecord], str | None] = lambda record: None,
    ) -> None:
        self.store = store
        self.read = ExampleReader(store)
        self.records = {record.run_id: record for record in records}
        frame = to_frame(records, naming_of(records))
        frame["label"] = [
            relabel(self.records[run_id]) or label
            for run_id, label in zip(frame["run_id"], frame["label"], strict=True)
        ]
        self.frame = _with_reserved(frame)
        boards = boards_of(store, self.frame)
        assert len(boards) == 1, f"{store.results.name} has {len(boards)} settings"
        self.board = boards[0]
        self.rows = {row.label: row for row in self.board.rows}
        self.columns = {_task(column.title): column for column in self.board.columns}

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order of TITLES."""
        return [task for task in TITLES if task in self.columns]

    def cell(self, label: str, task: str) -> Cell:
        """Runs of a row on a task."""
        return self.rows[label].cells[self.columns[task].title]

    def _mean_score(self, label: str, task: str) -> float:
        return self.cell(label, task).score.mean or 0.0

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

    def ratio(self, label: str, other: str, task: str) -> str:
        """Adapter numbers of one row over those of another."""
        return f"{self.count(label, task) / self.count(other, task):.2f}"

    def ratio_with_head(self, label: str, other: str, task: str) -> str:
        """The same of all trained numbers, the head among them."""
        head = self.cell(label, task).scored[0]["head"]
        return f"{(self.count(label, task) + head) / (self.count(other, task) + head):.2f}"

    def changed(self) -> list[str]:
        """dEBORA's rows with a setting of their own."""
        return sorted(label for label in self.rows if label.startswith("debora["))

    def upper_share(self, label: str, task: str) -> str:
        """Share of the budget's batches that no optimizer step was made on: the upper level's."""
        runs = self.cell(label, task).scored
        return f"{1 - sum(run['updates'] for run in runs) / sum(run['batches'] for run in runs):.0%}"

    def compare(self, label: str, others: Sequence[str], task: str) -> dict[str, Comparison]:
        """One row against others on a task: the report's paired test, Holm-corrected over `others`."""
        cell, column = self.cell(label, task), self.columns[task]
        found = [compare_cells(cell, self.cell(other, task), column, self.read) for other in others]
        return dict(zip(others, corrected(found), strict=True))

    def difference(self, label: str, other: str, task: str) -> str:
        """+0.004 (-0.003 to +0.011): the first less the second with its 95 % interval over seeds and examples."""
        return difference_text(self.compare(label, [other], task)[other])

    def told_from_best(self, task: str) -> str:
        """The rows whose scores the paired test tells from the best mean, which has none of the marks."""
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

    def rates(self, task: str) -> str:
        """`lora` 0.001, `full` 5e-05, ...: learning rates that the search chose, "largest tried" where it is."""
        told = []
        for row in self.board.rows:
            spec = self.records[self.cell(row.label, task).runs[0]["run_id"]].spec
            assert spec.search is not None
            chosen = spec.method_parameters["learning_rate"]
            tried = [self.records[trial].spec.method_parameters["learning_rate"] for trial in spec.search.trials]
            told.append(f"`{row.label}` {chosen:g}" + (" (the largest tried)" if chosen == max(tried) else ""))
        return ", ".join(told)

    def expect(self, verdict: str, label: str, others: Sequence[str], task: str) -> str:
        """Nothing, where this is the verdict of each comparison, corrected over `others`; a sentence rests on it.

        Raises ValueError where the records now say something else: the sentence has to be written anew.
        """
        for other, each in self.compare(label, others, task).items():
            if each.verdict != verdict:
                raise ValueError(f"{label} is {each.verdict} against {other} on {task}, where the text says {verdict}")
        return ""

    def table(self) -> str:
        """Scores against numbers, best mean of the claimed tasks first, as Markdown."""
        lines = []
        for row in sorted(self.board.rows, key=lambda row: -self.mean(row.label, self._mean_score)):
            line = {"method": f"`{row.label}`", "numbers": human(self.mean(row.label, self.count))}
            for task in self.tasks:
                column = self.columns[task]
                cell = row.cells.get(column.title)
                line[f"{TITLES[task]} ({column.headline})"] = _marked(self.board, row, column, cell)
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
    copied = frame[frame[name].notna()].assign(column=RESERVED, split="reserved")
    copied = copied.assign(**{"score": copied[name], METRICS + "accuracy": copied[name]})
    return pd.concat([frame, copied], ignore_index=True).drop(columns=name)


def _marked(board: Board, row: Row, column: Column, cell: Cell | None) -> str:
    if cell is None:
        return "-"
    text = summary_text(cell.score, with_n=cell.score.n != board.n) + (" ≈" if board.is_tie(row, column) else "")
    return f"**{text}**" if board.is_best(row, column) else text


def difference_text(each: Comparison, sign: int = 1) -> str:
    """+0.004 (-0.003 to +0.011): a difference (times `sign`) with its 95 % interval."""
    if each.difference is None:
        return "not available"
    low, high = sorted(sign * end for end in each.difference.interval)
    return f"{sign * each.difference.mean:+.3f} ({low:+.3f} to {high:+.3f})"


def pipes(lines: Sequence[dict[str, str]], left: int = 1) -> str:
    """The lines as a Markdown table, its first `left` columns left-aligned, numbers to the right."""
    names = list(lines[0])
    rows = [[line.get(name, "-") for name in names] for line in lines]
    alignment = ["left"] * left + ["right"] * (len(names) - left)
    return tabulate(rows, names, tablefmt="github", disable_numparse=True, colalign=alignment)
