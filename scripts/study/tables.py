"""The study's own tables: controls, parts, the paper's figures beside ours, agreement of ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from part import RESERVED, TITLES, Part, difference_text, pipes
from ranks import Agreement, agreement, shared

from harness.record import RunRecord
from harness.report.layers import split_name
from harness.report.paper import reported

CONTROLS = {  # by kind: what it is
    "same ranks": "LoRA retrained at the ranks that dEBORA found",
    "shuffled": "LoRA at those ranks, shuffled among layers of one shape",
    "uniform": "LoRA of one rank, nearest in numbers",
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


def controls_table(controls: Part) -> str:
    """dEBORA against each control: numbers, score, and dEBORA's score less the control's with its interval."""
    lines = []
    for task in controls.claimed:
        found = controls.compare("debora", list(CONTROLS), task)
        for kind, name in {"debora": f"{TITLES[task]}: dEBORA itself", **CONTROLS}.items():
            runs = [controls.records[run["run_id"]] for run in controls.cell(kind, task).scored]
            own = [controls.records[run["run_id"]] for run in controls.cell("debora", task).scored]
            both = [shared([a.ranks, b.ranks]) for a, b in zip(runs, own, strict=True)]
            wide = [sum(rank for layer, rank in run.ranks.items() if shape_of(layer) != "attention") for run in runs]
            every = [sum(run.ranks.values()) for run in runs]
            line = {"against": name, "numbers": controls.numbers(kind, task)}
            line["shared with dEBORA"] = "" if kind == "debora" else f"{sum(both) / len(both):.2f}"
            line["in feed-forward layers"] = f"{sum(wide) / sum(every):.0%}"
            line["score"] = controls.score(kind, task)
            line["dEBORA's less this"] = difference_text(found[kind]) if kind in found else ""
            line["dEBORA is"] = found[kind].verdict if kind in found else ""
            lines.append(line)
    return pipes(lines)


def shape_of(layer: str) -> str:
    """The shape of a layer of BERT by its name: all of attention are square; two of another shape feed forward."""
    module = split_name(layer)[1]
    return "attention" if module.startswith("attention") else module


def parts_table(parts: Part, differences: bool) -> str:
    """Every change to dEBORA, and LoRA by rank: numbers and scores, or the score less that of dEBORA's defaults."""
    others = [*parts.changed(), *(f"lora[rank={rank}]" for rank in (1, 2, 4)), "lora"]
    found = {task: parts.compare("debora", others, task) if differences else {} for task in parts.tasks}
    lines = []
    for label in ["debora", *others]:
        line = {"setting": f"`{label}`"}
        for task in parts.tasks:
            name = TITLES[task]
            if differences:
                each = found[task].get(label)
                line[f"{name}: difference to `debora`"] = "" if each is None else difference_text(each, -1)
            else:
                line |= {f"{name}: numbers": parts.numbers(label, task), f"{name}: accuracy": parts.score(label, task)}
        lines.append(line)
    return pipes(lines)


def paper_table(main: Part) -> str:
    """Reported and ours, score less that of LoRA of rank 8, and numbers over LoRA's: the models differ."""
    labels = ["full", "hadapter", "padapter", "adalora", "debora"]
    labels += [f"debora[geometry={geometry}]" for geometry in ("oblique", "stiefel")]
    metrics = {"glue/sst2": "accuracy", "glue/stsb": "pearson", "glue/mrpc": "accuracy"}
    figures = {}
    for figure in reported():
        of_table = figure.benchmark == "GLUE" and figure.source.startswith("dEBORA")
        if of_table and metrics.get(figure.task) == figure.metric:
            geometry = figure.settings.get("geometry", "matrix")
            label = figure.method if geometry == "matrix" else f"{figure.method}[geometry={geometry}]"
            figures[label, figure.task] = figure
    lines = []
    for label in labels:
        line = {"method": f"`{label}`"}
        for own in main.claimed:
            task = "glue/sst2" if own == RESERVED else own
            theirs, lora = figures[label, task], figures["lora", task]
            share = theirs.parameters / lora.parameters
            line |= {
                f"{TITLES[task]}, reported": f"{theirs.score - lora.score:+.3f}",
                f"{TITLES[own]}, ours": difference_text(main.compare(label, ["lora"], own)["lora"]),
            }
            line["numbers over LoRA's, reported"] = f"{share:.2f}"
        line["numbers over LoRA's, ours"] = f"{main.mean(label, main.count) / main.mean('lora', main.count):.2f}"
        lines.append(line)
    return pipes(lines)


class Agreed(NamedTuple):
    """How far the final ranks of a row's seeds agree on a task."""

    model: str
    task: str
    label: str
    components: tuple[int, ...]
    found: Agreement


def agreements(model: str, part: Part, labels: Iterable[str]) -> list[Agreed]:
    """Of these rows on the tasks that claims rest on."""
    found = []
    for task, label in itertools.product(part.claimed, labels):
        ranks = [part.records[run["run_id"]].ranks for run in part.cell(label, task).scored]
        sizes = tuple(sum(of_run.values()) for of_run in ranks)
        found.append(Agreed(model, task, label, sizes, agreement(ranks, shape_of)))
    return found


def ranks_table(agreed: Iterable[Agreed]) -> str:
    """Shared components of seeds, with chance beside it."""
    return pipes(
        [
            {
                "model, task": f"{each.model}, {TITLES[each.task.partition(',')[0]]}",
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
