"""Reported results beside ours: what a paper's tables say, from the committed files of `reported`."""

from __future__ import annotations

import csv
import functools
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from harness.report.board.leaderboard import Board
from harness.report.board.rows import Cell, over
from harness.report.board.runs import Run
from harness.report.forms.text import CONSOLE_WIDTH
from harness.report.statistics import Summary, summarize
from harness.report.wording import NOTHING, few, folded_label, human

FOLDER = Path(__file__).parent / "reported"
MODELS_APART = ("-", "_", " ", ".")


class Reported(NamedTuple):
    """One figure of a paper: a row of `reported/*.csv`, whose README explains the columns."""

    source: str
    benchmark: str
    model: str
    task: str
    metric: str
    row: str
    method: str
    settings: Mapping[str, Any]
    parameters: float
    score: float
    rounding: float
    note: str


@functools.cache
def reported() -> tuple[Reported, ...]:
    """All figures. Raises ValueError or KeyError for a file that does not hold together."""
    found = []
    for path in sorted(FOLDER.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as stream:
            for line in csv.DictReader(stream):
                numbers = {name: float(line[name]) for name in ("parameters", "score", "rounding")}
                found.append(Reported(**{**line, **numbers, "settings": json.loads(line["settings"])}))
    return tuple(found)


def against_paper(board: Board) -> str:
    """A table of what papers report and what this board has: parameters, scores, our score less theirs with its
    interval, and what is not the paper's about ours. Configurations without a counterpart are left out, and so are
    those that lack a seed of their column."""
    lines, remarks, sources, lacking = [], set(), set(), set()
    for figure in reported():
        for row in board.rows:
            for column in board.tasks:
                title, cell = column.title, row.cells.get(column.title)
                if cell is None or not _is_counterpart(figure, cell):
                    continue
                if not board.is_ranked(row, column):
                    lacking.add(row.label)
                    continue
                apart = ",\n".join(_apart(figure, cell.runs[0])) or NOTHING
                remarks |= {f"{title} ({figure.metric}): {figure.note}."} if figure.note else set()
                sources.add(figure.source)
                task = f"{title}\n{figure.metric}"
                lines.append([figure.row, folded_label(row.label), task, *_numbers(figure, cell), apart])
    intro = f"Reported figures against ours. {board.caption}"
    if not lines:
        return textwrap.fill(f"{intro} No configuration here has a counterpart in a paper's table.", CONSOLE_WIDTH)
    headers = ["reported as", "ours", "task\nmetric", "parameters\nreported, ours", "score\nreported, ours"]
    headers += ["difference\n95 % interval", "not the paper's"]
    notes = [
        f"Reported: {'; '.join(sorted(sources))}. A reported figure has no spread: the interval is of our mean over "
        "seeds (t), widened by the rounding of the reported one.",
        "Data, head and training settings were not checked against the paper's; 'not the paper's' names what certainly "
        "differs.",
        *sorted(remarks),
        *([f"Left out, with fewer seeds than the others of a column: {few(sorted(lacking))}."] if lacking else []),
    ]
    table = tabulate(lines, headers, disable_numparse=True, colalign=["left"] * 3 + ["right"] * 3 + ["left"])
    texts = [textwrap.fill(text, CONSOLE_WIDTH, break_on_hyphens=False) for text in (intro, *notes)]
    return "\n".join([texts[0], "", table, "", *texts[1:]])


def _is_counterpart(figure: Reported, cell: Cell) -> bool:
    run = cell.runs[0]
    if (run.method, run.task.partition(":")[0]) != (figure.method, figure.task):
        return False
    parameters = run.spec.method_parameters
    return all(parameters.get(name) == value for name, value in figure.settings.items())


def _numbers(figure: Reported, cell: Cell) -> list[str]:
    ours = _score(figure, cell)
    difference = mean = NOTHING
    if ours.mean is not None:
        mean = f"{ours.mean:.4f} (n={ours.n})"
        apart = ours.mean - figure.score
        difference = f"{apart:+.4f}\nnot available"
        if ours.half_width is not None:
            half = ours.half_width + figure.rounding
            difference = f"{apart:+.4f}\n{apart - half:+.4f} to {apart + half:+.4f}"
    counts = human(figure.parameters), human(over(cell.scored, "parameters_final"))
    return ["\n".join(counts), f"{figure.score:.4f}\n{mean}", difference]


def _score(figure: Reported, cell: Cell) -> Summary:
    """Our runs' values of the reported metric."""
    metrics = (run.record.metrics.get(figure.metric) for run in cell.scored)
    return summarize(value for value in metrics if value is not None)


def _apart(figure: Reported, run: Run) -> list[str]:
    """What is certainly not the paper's."""
    apart = []
    model = run.model or "built-in"
    if _plain(model.rsplit("/", 1)[-1]) != _plain(figure.model.rsplit("/", 1)[-1]):
        apart.append("model")
    if ":" in run.task:
        apart.append("data (your own)")
    if run.spec.limit is not None:
        apart.append(f"data (at most {run.spec.limit} rows)")
    return apart


def _plain(name: str) -> str:
    return "".join(sign for sign in name.lower() if sign not in MODELS_APART)
