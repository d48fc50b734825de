"""The study's own tables: controls, parts, the paper's figures beside ours, agreement of ranks."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import NamedTuple

from part import RESERVED, TITLES, Part, difference_text, pipes

from harness.record.record import RunRecord
from harness.report.pictures.layers import split_name
from harness.report.tables.paper import Reported, reported
from harness.report.tables.rank_agreement import Agreed, agreements, shared
from harness.report.wording import human

CONTROLS = {  # by kind: what it is
    "same ranks": "LoRA retrained at the ranks that dEBORA found",
    "shuffled": "LoRA at those ranks, shuffled among layers of one shape",
    "uniform": "LoRA of one rank, nearest in parameters",
    "magnitude": "LoRA 8 pruned once to as many components, by magnitude",
    "random": "LoRA 8 pruned once to as many components, at random",
}


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


def differences_table(part: Part, pairs: Iterable[tuple[str, str]]) -> str:
    """The first's score less the second's on each task and over all of them, with the share of parameters."""
    lines = []
    for label, other in pairs:
        line = {"difference": f"`{label}` less `{other}`", "parameters": part.mean_ratio(label, other)}
        lines.append(line | _by_task(part, label, other))
    return pipes(lines)


def _by_task(part: Part, label: str, other: str) -> dict[str, str]:
    texts = {TITLES[task]: part.difference(label, other, task) for task in part.claimed}
    return texts if len(texts) == 1 else texts | {"mean over tasks": part.overall(label, other)}


def controls_table(controls: Part) -> str:
    """dEBORA against each control: what its ranks are like, and dEBORA's score less the control's."""
    lines = []
    for kind, name in {"debora": "(dEBORA itself)", **CONTROLS}.items():
        alike, wide = [], []
        for task in controls.claimed:
            own = controls.ranks("debora", task)
            for seed, ranks in controls.ranks(kind, task).items():
                alike.append(shared([ranks, own[seed]]))
                of_shape = [rank for layer, rank in ranks.items() if shape_of(layer) != "attention"]
                wide.append(sum(of_shape) / sum(ranks.values()))
        line = {"control": name, "parameters": human(controls.mean(kind, controls.count))}
        line["shared"] = f"{sum(alike) / len(alike):.2f}"
        line["in feed-forward"] = f"{sum(wide) / len(wide):.0%}"
        if kind != "debora":
            line |= _by_task(controls, "debora", kind)
        lines.append(line)
    return pipes(lines)


def shape_of(layer: str) -> str:
    """The shape of a layer of BERT by its name: all of attention are square; two of another shape feed forward."""
    module = split_name(layer)[1]
    return "attention" if module.startswith("attention") else module


def parts_table(parts: Part, differences: bool) -> str:
    """Every change to dEBORA, and LoRA by rank: parameters and scores, or the score less that of dEBORA's defaults."""
    others = [*parts.changed(), *(f"lora[rank={rank}]" for rank in (1, 2, 4)), "lora"]
    found = {task: parts.compare("debora", others, task) if differences else {} for task in parts.tasks}
    lines = []
    for label in ["debora", *others]:
        line = {"setting": f"`{label}`"}
        for task in parts.tasks:
            name = TITLES[task]
            if differences:
                each = found[task].get(label)
                line[f"{name}: difference to `debora`"] = "" if each is None else difference_text(each.difference, -1)
            else:
                line |= {
                    f"{name}: parameters": parts.numbers(label, task),
                    f"{name}: accuracy": parts.score(label, task),
                }
        lines.append(line)
    return pipes(lines)


PAPERS_ROWS = (
    "full",
    "hadapter",
    "padapter",
    "adalora",
    "debora",
    "debora[geometry=oblique]",
    "debora[geometry=stiefel]",
)


def paper_table(main: Part) -> str:
    """Reported and ours: score less that of LoRA of rank 8, and parameters over LoRA's. The models differ."""
    figures, lines = _figures(), []
    for label in PAPERS_ROWS:
        line = {"method": f"`{label}`"}
        for task in main.claimed:
            theirs, ours = _less_lora(main, label, task)
            line[f"{TITLES[_published(task)]}, reported / ours"] = f"{theirs:+.3f} / {ours:+.3f}"
        both = [(figures[label, _published(task)], figures["lora", _published(task)]) for task in main.claimed]
        share = sum(figure.parameters / lora.parameters for figure, lora in both) / len(both)
        line["parameters over LoRA 8's, reported / ours"] = f"{share:.2f} / {main.mean_ratio(label, 'lora')}"
        lines.append(line)
    return pipes(lines)


def within_a_point(main: Part) -> tuple[int, int, int]:
    """How many scores of that table are less than a point from LoRA's: reported, ours, and of how many."""
    both = [_less_lora(main, label, task) for label in PAPERS_ROWS for task in main.claimed]
    return sum(abs(theirs) < 0.01 for theirs, _ in both), sum(abs(ours) < 0.01 for _, ours in both), len(both)


def above_lora(main: Part, task: str) -> int:
    """How many of that table's rows have a better mean than LoRA of rank 8 here."""
    return sum(_less_lora(main, label, task)[1] > 0 for label in PAPERS_ROWS)


def _less_lora(main: Part, label: str, task: str) -> tuple[float, float]:
    """(reported, ours)"""
    figures, ours = _figures(), main.less(label, "lora", task)
    assert ours is not None
    return figures[label, _published(task)].score - figures["lora", _published(task)].score, ours.mean


def _published(task: str) -> str:
    return "glue/sst2" if task == RESERVED else task


@functools.cache
def _figures() -> dict[tuple[str, str], Reported]:
    """dEBORA's table of GLUE, by our row and task."""
    metrics = {"glue/sst2": "accuracy", "glue/stsb": "pearson", "glue/mrpc": "accuracy"}
    figures = {}
    for figure in reported():
        of_table = figure.benchmark == "GLUE" and figure.source.startswith("dEBORA")
        if of_table and metrics.get(figure.task) == figure.metric:
            geometry = figure.settings.get("geometry", "matrix")
            label = figure.method if geometry == "matrix" else f"{figure.method}[geometry={geometry}]"
            figures[label, figure.task] = figure
    return figures


class Agreement(NamedTuple):
    """How far the final ranks of a row's seeds agree on a task."""

    model: str
    task: str
    row: Agreed


def agreements_of(model: str, part: Part, labels: Iterable[str]) -> list[Agreement]:
    """Of these rows on the tasks that claims rest on, with the layers' shapes that `shape_of` knows."""
    rows = {(each.column.title, each.label): each for each in agreements(part.board, shape_of)}
    tasks = [(task, part.columns[task].title) for task in part.claimed]
    return [Agreement(model, task, rows[title, label]) for (task, title), label in itertools.product(tasks, labels)]


def ranks_table(agreed: Iterable[Agreement]) -> str:
    """Shared components of seeds, with chance beside it."""
    return pipes(
        [
            {
                "model, task": f"{model}, {TITLES[task.partition(',')[0]]}",
                "method": "LoRA 8 pruned by magnitude" if row.label == "magnitude" else f"`{row.label}`",
                "components left": ", ".join(map(str, row.components)),
                "shared": f"{row.found.shared:.2f}",
                "by chance": f"{row.found.chance:.2f} ({row.found.low:.2f} to {row.found.high:.2f})",
            }
            for model, task, row in agreed
        ],
        left=2,
    )


def beyond_chance(agreed: Iterable[Agreement]) -> str:
    """3 of 28 (`debora[tau=32]` on MNLI; chance alone: 0.7): dEBORA's rows that share more than the middle 95 % of
    chance."""
    own = [(each.task, each.row) for each in agreed if each.row.label.startswith("debora")]
    above = [(task, row) for task, row in own if row.found.is_beyond_chance]
    names = ", ".join(f"`{row.label}` on {TITLES[task]}" for task, row in above)
    expected = f"chance alone: {len(own) * 0.025:.1f}"
    return f"{len(above)} of {len(own)} ({f'{names}; ' if above else ''}{expected})"


def agree(agreed: Iterable[Agreement], label: str, beyond: bool) -> str:
    """Nothing, where the row's seeds agree beyond chance on every task, or on none; a sentence rests on it."""
    for each in agreed:
        if each.row.label == label and each.row.found.is_beyond_chance != beyond:
            raise ValueError(f"seeds of {label} share {each.row.found} on {each.task}: the text says otherwise")
    return ""
