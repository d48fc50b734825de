"""Write the study from its records: results/study/README.md, tables, pictures, and the block in the project's README.

Every number in the text comes from the records, through the functions that `reading.md` (a Jinja2 template) calls.
Usage: python scripts/study/write.py     (reads results/study/records.tar.xz alone)
"""

from __future__ import annotations

import dataclasses
import functools
import tarfile
import tempfile
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import ranks as agreement
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from tabulate import tabulate

from harness.commands.report import naming_of
from harness.record import RecordStore, RunRecord
from harness.report import curves, layers, scatter
from harness.report.build import boards_of
from harness.report.compare import Comparison, ExampleReader, compare_cells
from harness.report.data import tidy
from harness.report.figures import save
from harness.report.frame import METRICS, to_frame
from harness.report.histories import traced
from harness.report.latex import latex
from harness.report.layers import split_name
from harness.report.leaderboard import Board, Cell, Column, Row
from harness.report.paper import reported
from harness.report.statistics import holm
from harness.report.text import human, markdown, summary_text

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "results" / "study"
MARKS = "<!-- study: written by scripts/study.sh -->", "<!-- end of the study -->"
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
IDENTIFIED = (
    "debora",
    "debora[hypergradient=closed_form]",
    "debora[hypergradient=implicit]",
    "debora[T_max=2]",
    "debora[T_max=20]",
    "debora[momentum=0.9]",
    "debora[momentum=0.9,T_max=20]",
)
CONTROLS = {  # by kind: what it is
    "same ranks": "LoRA retrained at the ranks that dEBORA found",
    "shuffled": "LoRA at those ranks, shuffled among layers of one shape",
    "uniform": "LoRA of one rank, nearest in numbers",
    "magnitude": "LoRA 8 pruned once to as many components, by magnitude",
    "random": "LoRA 8 pruned once to as many components, at random",
}


class Part:
    """One of the study's results folders: its board, and what the text asks of it."""

    def __init__(self, folder: Path, keep: Any = lambda record: True, relabel: Any = None) -> None:
        self.store = RecordStore.existing(folder)
        self.records = {record.run_id: record for record in self.store.records() if keep(record)}
        records = list(self.records.values())
        frame = to_frame(records, naming_of(records))
        if relabel:
            frame["label"] = [
                relabel(self.records[run_id]) or label
                for run_id, label in zip(frame["run_id"], frame["label"], strict=True)
            ]
        self.frame = _with_reserved(frame)
        boards = boards_of(self.store, self.frame)
        assert len(boards) == 1, f"{folder.name} has {len(boards)} settings"
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
        return human(float(f"{self.count(label, task):.3g}"))

    def ratio(self, label: str, other: str, task: str) -> str:
        """Adapter numbers of one row over those of another."""
        return f"{self.count(label, task) / self.count(other, task):.2f}"

    def ratio_with_head(self, label: str, other: str, task: str) -> str:
        """The same of all trained numbers, the head among them."""
        head = self.cell(label, task).scored[0]["head"]
        return f"{(self.count(label, task) + head) / (self.count(other, task) + head):.2f}"

    def changed(self) -> list[str]:
        """dEBORA's rows with a setting of their own."""
        return [label for label in self.rows if label.startswith("debora[")]

    def upper_share(self, label: str, task: str) -> str:
        """Share of the budget's batches that no optimizer step was made on: the upper level's."""
        runs = self.cell(label, task).scored
        return f"{1 - sum(run['updates'] for run in runs) / sum(run['batches'] for run in runs):.0%}"

    def compare(self, label: str, others: Sequence[str], task: str) -> dict[str, Comparison]:
        """One row against others on a task: the report's paired test, Holm-corrected over `others`."""
        column, read = self.columns[task], ExampleReader(self.store)
        found = [compare_cells(self.cell(label, task), self.cell(other, task), column, read) for other in others]
        adjusted = iter(holm([each.difference.p_value for each in found if each.difference]))
        return {
            other: dataclasses.replace(each, adjusted_p=next(adjusted)) if each.difference else each
            for other, each in zip(others, found, strict=True)
        }

    def difference(self, label: str, other: str, task: str) -> str:
        """+0.004 (-0.003 to +0.011): the first less the second with its 95 % interval over seeds and examples."""
        return _difference(self.compare(label, [other], task)[other])

    def verdict(self, label: str, other: str, task: str) -> str:
        """better, worse or undecided, of one comparison on its own."""
        return self.compare(label, [other], task)[other].verdict

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
            line = {"method": f"`{row.label}`", "numbers": human(float(f"{self.mean(row.label, self.count):.3g}"))}
            for task in self.tasks:
                column = self.columns[task]
                cell = row.cells.get(column.title)
                line[f"{TITLES[task]} ({column.headline})"] = _marked(self.board, row, column, cell)
            if self.board.has_search:
                line["search, batches"] = f"{row.search_batches:.0f}"
            lines.append(line)
        return _markdown(lines)


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


def _difference(each: Comparison, sign: int = 1) -> str:
    """+0.004 (-0.003 to +0.011): a difference (times `sign`) with its 95 % interval."""
    if each.difference is None:
        return "not available"
    low, high = sorted(sign * end for end in each.difference.interval)
    told = {"better": "worse", "worse": "better"}.get(each.verdict, "") if sign < 0 else ""
    return f"{sign * each.difference.mean:+.3f} ({low:+.3f} to {high:+.3f})" + (f", {told}" if told else "")


def _markdown(lines: Sequence[dict[str, str]], left: int = 1) -> str:
    names = list(lines[0])
    rows = [[line.get(name, "-") for name in names] for line in lines]
    alignment = ["left"] * left + ["right"] * (len(names) - left)
    return tabulate(rows, names, tablefmt="github", disable_numparse=True, colalign=alignment)


def kind_of(record: RunRecord) -> str | None:
    """The kind of a control; None for a run that is none."""
    parameters = record.spec.method_parameters
    if record.spec.search is not None:
        return None
    if record.spec.method == "pruned_lora":
        return str(parameters["selection"])
    if parameters["ranks"] is None:
        return "uniform"
    return "shuffled" if parameters["shuffle_ranks"] else "same ranks"


def controls_table(controls: Part) -> str:
    """dEBORA against each control: numbers, score, and dEBORA's score less the control's with its interval."""
    lines = []
    for task in controls.claimed:
        found = controls.compare("debora", list(CONTROLS), task)
        for kind, name in {"debora": f"{TITLES[task]}: dEBORA itself", **CONTROLS}.items():
            runs = [controls.records[run["run_id"]] for run in controls.cell(kind, task).scored]
            own = [controls.records[run["run_id"]] for run in controls.cell("debora", task).scored]
            both = [agreement.agreement([a.ranks, b.ranks]).shared for a, b in zip(runs, own, strict=True)]
            wide = [sum(rank for layer, rank in run.ranks.items() if _shape(layer) != "attention") for run in runs]
            every = [sum(run.ranks.values()) for run in runs]
            line = {"against": name, "numbers": controls.numbers(kind, task)}
            line["shared with dEBORA"] = "" if kind == "debora" else f"{sum(both) / len(both):.2f}"
            line["in feed-forward layers"] = f"{sum(wide) / sum(every):.0%}"
            line["score"] = controls.score(kind, task)
            line["dEBORA's less this"] = _difference(found[kind]) if kind in found else ""
            line["dEBORA is"] = found[kind].verdict if kind in found else ""
            lines.append(line)
    return _markdown(lines, left=1)


def _shape(layer: str) -> str:
    """The shape of a layer of BERT by its name: all of attention are square; two of another shape feed forward."""
    module = split_name(layer)[1]
    return "attention" if module.startswith("attention") else module


def parts_table(parts: Part, differences: bool) -> str:
    """Every change to dEBORA, and LoRA by rank: numbers and scores, or the score less that of dEBORA's defaults."""
    changed = sorted(label for label in parts.rows if label.startswith("debora["))
    rivals = [f"lora[rank={rank}]" for rank in (1, 2, 4)] + ["lora"]
    found = {task: parts.compare("debora", [*changed, *rivals], task) for task in parts.tasks}
    lines = []
    for label in ["debora", *changed, *rivals]:
        line = {"setting": f"`{label}`"}
        for task in parts.tasks:
            name = TITLES[task]
            if differences:
                line[f"{name}: difference to `debora`"] = (
                    "" if label == "debora" else _difference(found[task][label], -1)
                )
            else:
                line |= {f"{name}: numbers": parts.numbers(label, task), f"{name}: accuracy": parts.score(label, task)}
        lines.append(line)
    return _markdown(lines)


def paper_table(main: Part) -> str:
    """Reported and ours, score less that of LoRA of rank 8, and numbers over LoRA's: the models differ."""
    ours = {
        "full": "full",
        "hadapter": "hadapter",
        "padapter": "padapter",
        "adalora": "adalora",
        "debora": "debora",
        "debora[geometry=oblique]": "debora[geometry=oblique]",
        "debora[geometry=stiefel]": "debora[geometry=stiefel]",
    }
    names = {
        "matrix": "debora",
        "oblique": ours["debora[geometry=oblique]"],
        "stiefel": ours["debora[geometry=stiefel]"],
    }
    metrics = {"glue/sst2": "accuracy", "glue/stsb": "pearson", "glue/mrpc": "accuracy"}
    figures: dict[tuple[str, str], Any] = {}
    for figure in reported():
        if (
            figure.benchmark == "GLUE"
            and metrics.get(figure.task) == figure.metric
            and figure.source.startswith("dEBORA")
        ):
            label = names[figure.settings["geometry"]] if figure.method == "debora" else figure.method
            figures[label, figure.task] = figure
    lines = []
    for label in ours:
        line = {"method": f"`{label}`"}
        for own in main.claimed:
            task = "glue/sst2" if own == RESERVED else own
            theirs, lora = figures[label, task], figures["lora", task]
            share = theirs.parameters / lora.parameters
            line |= {
                f"{TITLES[task]}, reported": f"{theirs.score - lora.score:+.3f}",
                f"{TITLES[own]}, ours": _difference(main.compare(label, ["lora"], own)["lora"]),
            }
            line["numbers over LoRA's, reported"] = f"{share:.2f}"
        line["numbers over LoRA's, ours"] = f"{main.mean(label, main.count) / main.mean('lora', main.count):.2f}"
        lines.append(line)
    return _markdown(lines)


class Agreed(NamedTuple):
    """How far the final ranks of a row's seeds agree on a task."""

    model: str
    task: str
    label: str
    components: tuple[int, ...]
    found: agreement.Agreement


def agreements(parts: dict[str, Part]) -> list[Agreed]:
    """Of all rows whose ranks were searched for, by the model's name."""
    found = []
    for model, part in parts.items():
        for task in part.tasks:
            for label in part.rows:
                if task not in part.claimed or not label.startswith(("debora", "adalora", "magnitude")):
                    continue
                ranks = [part.records[run["run_id"]].ranks for run in part.cell(label, task).scored]
                sizes = tuple(sum(of_run.values()) for of_run in ranks)
                found.append(Agreed(model, task, label, sizes, agreement.agreement(ranks, _shape)))
    return found


def ranks_table(agreed: Iterable[Agreed]) -> str:
    """Shared components of seeds, with chance beside it."""
    return _markdown(
        [
            {
                "model, task": f"{each.model.partition(',')[0]}, {TITLES[each.task.partition(',')[0]]}",
                "method": "LoRA 8 pruned by magnitude" if each.label == "magnitude" else f"`{each.label}`",
                "components left": ", ".join(map(str, each.components)),
                "shared": f"{each.found.shared:.2f}",
                "by chance": f"{each.found.chance:.2f} ({each.found.low:.2f} to {each.found.high:.2f})",
            }
            for each in agreed
        ],
        left=2,
    )


def beyond_chance(agreed: Iterable[Agreed]) -> str:
    """3 of 28 (`debora[tau=32]` on MNLI; chance alone: 0.7): dEBORA's rows that share more than the middle 95 % of
    chance."""
    own = [each for each in agreed if each.label.startswith("debora")]
    above = [each for each in own if each.found.shared > each.found.high]
    names = ", ".join(f"`{each.label}` on {TITLES[each.task]}" for each in above)
    expected = f"chance alone: {len(own) * 0.025:.1f}"
    return f"{len(above)} of {len(own)} ({f'{names}; ' if above else ''}{expected})"


def agree(agreed: Iterable[Agreed], label: str, beyond: bool) -> str:
    """Nothing, where the row's seeds agree beyond chance on every task, or on none; a sentence rests on it."""
    for each in agreed:
        if each.label == label and (each.found.shared > each.found.high) != beyond:
            raise ValueError(f"seeds of {label} share {each.found} on {each.task}: the text says otherwise")
    return ""


def _pictures(main: Part, parts: Part, convolutions: Part) -> None:
    folder = STUDY / "pictures"
    folder.mkdir(exist_ok=True)
    sweep = parts.frame[parts.frame["label"].str.match(r"debora$|debora\[(tau|T_max)=|lora")]
    tasks = tuple(main.columns[task] for task in main.tasks if task != RESERVED)
    search = dataclasses.replace(
        _only(main.board, {label for label in main.rows if label.startswith("debora")}), columns=tasks
    )
    both = dataclasses.replace(_only(main.board, {"debora", "adalora"}), columns=tasks)
    figures = {
        "main": scatter.draw(main.frame, main.board),
        "sweeps": scatter.draw(sweep, _only(parts.board, set(sweep["label"]))),
        "convolutions": scatter.draw(convolutions.frame, convolutions.board),
        "active_set": curves.over_time(search, traced(search, main.store)),
        "ranks": layers.rank_heat_map(both, main.records),
    }
    for name, figure in figures.items():
        assert figure is not None, name
        save(figure, folder / f"{name}.png")


def _only(board: Board, labels: set[str]) -> Board:
    return dataclasses.replace(board, rows=tuple(row for row in board.rows if row.label in labels))


def main() -> None:
    """Write everything."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(STUDY / "records.tar.xz") as archive:
            archive.extractall(folder, filter="data")
        _write(Path(folder))


def _write(folder: Path) -> None:
    whole = _whole_tasks(RecordStore.existing(folder / "main").records())
    tuned = Part(folder / "main", lambda record: record.spec.task in whole and record.spec.search is not None)
    controlled = _controlled_tasks(RecordStore.existing(folder / "main").records()) & whole
    controls = Part(folder / "main", lambda record: record.spec.task in controlled and _is_of_controls(record), kind_of)
    parts, convolutions = Part(folder / "parts"), Part(folder / "convolutions")
    tables = STUDY / "tables"
    tables.mkdir(exist_ok=True)
    for name, part in {"main": tuned, "controls": controls, "parts": parts, "convolutions": convolutions}.items():
        (tables / f"{name}.md").write_text(markdown([part.board]))
        (tables / f"{name}.tex").write_text(latex([part.board]))
        (tables / f"{name}.csv").write_text(tidy([part.board]).to_csv(index=False, lineterminator="\n"))
    agreed = agreements({"MiniLM": tuned, "MiniLM, controls": controls, "BERT-tiny": parts})
    agreed = [each for each in agreed if each.model != "MiniLM, controls" or each.label == "magnitude"]
    (tables / "ranks.md").write_text(ranks_table(agreed) + "\n")
    (tables / "parts_differences.md").write_text(parts_table(parts, differences=True) + "\n")
    _pictures(tuned, parts, convolutions)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, from our own records
    )
    environment.filters["title_of"] = TITLES.__getitem__
    known = {
        "main": tuned,
        "controls": controls,
        "parts": parts,
        "convolutions": convolutions,
        "controls_table": controls_table(controls),
        "parts_table": parts_table(parts, differences=False),
        "paper_table": paper_table(tuned),
        "ranks_table": ranks_table(each for each in agreed if each.model != "BERT-tiny" or each.label in IDENTIFIED),
        "beyond_chance": beyond_chance(agreed),
        "agree": functools.partial(agree, agreed),
    }
    (STUDY / "README.md").write_text(environment.get_template("reading.md").render(known))
    block = environment.get_template("front.md").render(known)
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    readme.write_text(f"{before}{MARKS[0]}\n{block.strip()}\n{MARKS[1]}{after}")


def _whole_tasks(records: Iterable[RunRecord]) -> set[str]:
    """The main table's tasks on which every row has ended on every seed: the study goes over several sittings."""
    plan = tomllib.loads(Path(__file__).with_name("main.toml").read_text())
    return _with_all((r for r in records if r.spec.search), len(plan["methods"]) * len(plan["seeds"]))


def _controlled_tasks(records: Iterable[RunRecord]) -> set[str]:
    """The tasks on which every control has ended on every seed."""
    seeds = len(tomllib.loads(Path(__file__).with_name("main.toml").read_text())["seeds"])
    return _with_all((r for r in records if kind_of(r)), len(CONTROLS) * seeds)


def _with_all(records: Iterable[RunRecord], number: int) -> set[str]:
    runs = Counter(record.spec.task for record in records if not record.spec.is_trial)
    return {task for task, count in runs.items() if count >= number}


def _is_of_controls(record: RunRecord) -> bool:
    spec = record.spec
    if spec.search is None:
        return True
    plain = spec.method == "debora" and spec.method_parameters["geometry"] == "matrix"
    return plain or spec.is_trial


if __name__ == "__main__":
    main()
