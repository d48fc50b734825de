"""Write the study from its records: results/study/README.md, tables, pictures, and the block in the project's README.

Every number in the text comes from the records, through the functions that `reading.md` (a Jinja2 template) calls.
Usage: python scripts/study/write.py     (reads results/study/records.tar.xz alone)
"""

from __future__ import annotations

import dataclasses
import functools
import re
import tarfile
import tempfile
import tomllib
from collections import Counter
from pathlib import Path

import controls as control_runs
import tables
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from part import RESERVED, TITLES, Part

from harness.record.record import RunRecord
from harness.record.store import RecordStore
from harness.report.board.leaderboard import Board
from harness.report.forms.data import csv_text, tidy
from harness.report.forms.latex import latex
from harness.report.forms.text import markdown
from harness.report.pictures import curves, layers, scatter
from harness.report.pictures.figures import save
from harness.report.pictures.histories import traced
from harness.trace import Trace

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "results" / "study"
MARKS = "<!-- study: written by scripts/study.sh -->", "<!-- end of the study -->"
OF_SEARCH = ("rank", "gap", "active_components")  # of dEBORA's history
LEAST_SEEDS = 3  # a task is in the tables from so many on
IDENTIFIED = (
    "debora",
    "debora[hypergradient=closed_form]",
    "debora[hypergradient=implicit]",
    "debora[T_max=2]",
    "debora[T_max=20]",
    "debora[momentum=0.9]",
    "debora[momentum=0.9,T_max=20]",
)


def main() -> None:
    """Write everything."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(STUDY / "records.tar.xz") as archive:
            archive.extractall(folder, filter="data")
        _write(Path(folder))


def _write(folder: Path) -> None:
    store = RecordStore.existing(folder / "main")
    records = store.records()
    tuned = Part(store, _tuned(records))
    controls = Part(store, _of_controls(records, tuned), tables.kind_of)
    parts, convolutions = (_all_of(RecordStore.existing(folder / name)) for name in ("parts", "convolutions"))
    agreed = [
        *tables.agreements_of(
            "MiniLM", tuned, [label for label in tuned.rows if label.startswith(("debora", "adalora"))]
        ),
        *tables.agreements_of("MiniLM", controls, ["magnitude"]),
        *tables.agreements_of("BERT-tiny", parts, [label for label in parts.rows if label.startswith("debora")]),
    ]
    written = STUDY / "tables"
    written.mkdir(exist_ok=True)
    for name, part in {"main": tuned, "controls": controls, "parts": parts, "convolutions": convolutions}.items():
        (written / f"{name}.md").write_text(markdown([part.board]))
        (written / f"{name}.tex").write_text(latex([part.board]))
        (written / f"{name}.csv").write_text(csv_text(tidy([part.board])))
    (written / "ranks.md").write_text(tables.ranks_table(agreed) + "\n")
    (written / "parts_differences.md").write_text(tables.parts_table(parts, differences=True) + "\n")
    _pictures(tuned, parts, convolutions)
    shown = [each for each in agreed if each.model != "BERT-tiny" or each.row.label in IDENTIFIED]
    _texts(
        {
            "main": tuned,
            "controls": controls,
            "parts": parts,
            "convolutions": convolutions,
            "kinds": list(tables.CONTROLS),
            "controls_table": tables.controls_table(controls),
            "differences_table": tables.differences_table,
            "parts_table": tables.parts_table(parts, differences=False),
            "paper_table": tables.paper_table(tuned),
            "within_a_point": tables.within_a_point(tuned),
            "above_lora": tables.above_lora(tuned, "glue/stsb"),
            "ranks_table": tables.ranks_table(shown),
            "beyond_chance": tables.beyond_chance(agreed),
            "agree": functools.partial(tables.agree, agreed),
        }
    )


def _texts(known: dict[str, object]) -> None:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, from our own records
    )
    environment.filters["title_of"] = TITLES.__getitem__
    (STUDY / "README.md").write_text(environment.get_template("reading.md").render(known))
    block = environment.get_template("front.md").render(known)
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    readme.write_text(f"{before}{MARKS[0]}\n{block.strip()}\n{MARKS[1]}{after}")


def _pictures(main: Part, parts: Part, convolutions: Part) -> None:
    folder = STUDY / "pictures"
    folder.mkdir(exist_ok=True)
    sweep = {label for label in parts.rows if re.match(r"debora$|debora\[(tau|T_max)=|lora", label)}
    tasks = tuple(main.columns[task] for task in main.tasks if task != RESERVED)
    search = dataclasses.replace(
        _only(main.board, {label for label in main.rows if label.startswith("debora")}), columns=tasks
    )
    both = dataclasses.replace(_only(main.board, {"debora", "adalora"}), columns=tasks)
    claimed = dataclasses.replace(main.board, columns=tuple(main.columns[task] for task in main.claimed))
    figures = {
        "main": scatter.draw(claimed),
        "sweeps": scatter.draw(_only(parts.board, sweep)),
        "convolutions": scatter.draw(convolutions.board),
        "active_set": curves.over_time(search, traced(search, main.store, traces=_of_search(main))),
        "ranks": layers.rank_heat_map(both, main.records),
    }
    for name, figure in figures.items():
        assert figure is not None, name
        save(figure, folder / f"{name}.png")


def _of_search(main: Part) -> dict[str, tuple[Trace, ...]]:
    """What the methods declare of how the search went."""
    return {name: tuple(each for each in traces if each.name in OF_SEARCH) for name, traces in main.traces.items()}


def _only(board: Board, labels: set[str]) -> Board:
    return dataclasses.replace(board, rows=tuple(row for row in board.rows if row.label in labels))


def _all_of(store: RecordStore) -> Part:
    return Part(store, store.records())


def _tuned(records: list[RunRecord]) -> list[RunRecord]:
    """The main table's runs and their trials, on the tasks and seeds on which every row has ended."""
    number = len(tomllib.loads(control_runs.MAIN.read_text())["methods"])
    return _whole([each for each in records if each.spec.search], number)


def _of_controls(records: list[RunRecord], tuned: Part) -> list[RunRecord]:
    """The controls, what they control and all trials, on the main table's tasks and seeds on which every control has
    ended."""
    found = [each for each in control_runs.chosen(records, "debora", geometry="matrix") if each.run_id in tuned.records]
    own = {(each.spec.task, each.spec.seed) for each in found}
    controls = [each for each in records if tables.kind_of(each) and (each.spec.task, each.spec.seed) in own]
    trials = [each for each in records if each.spec.is_trial]
    return _whole([*found, *controls, *trials], 1 + len(tables.CONTROLS))


def _whole(records: list[RunRecord], number: int) -> list[RunRecord]:
    """Records of the tasks and seeds that have `number` runs, and of these tasks' trials; a task needs three such
    seeds. The study goes over several sittings."""
    ended = Counter((each.spec.task, each.spec.seed) for each in records if not each.spec.is_trial)
    seeds = Counter(task for (task, _), count in ended.items() if count >= number)
    return [
        each
        for each in records
        if seeds[each.spec.task] >= LEAST_SEEDS
        and (each.spec.is_trial or ended[each.spec.task, each.spec.seed] >= number)
    ]


if __name__ == "__main__":
    main()
