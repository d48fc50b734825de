"""An advice in words, and its ranks as one adapter."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from harness.report.board.runs import Run
from harness.report.evidence.choice import Advice, Candidate
from harness.report.evidence.compare import Comparison
from harness.report.statistics import CONFIDENCE
from harness.report.wording import few, human, summary_text

LEVEL_TEXT = f"{CONFIDENCE:.0%}".replace("%", " %")


def in_words(advice: Advice) -> list[str]:
    """What to take, on what evidence, and what would make it surer: a line each, those after the first indented."""
    name = _name(advice)
    picked = advice.picked
    if picked is None:
        lines = [f"{name}: no advice. Of {len(advice.candidates)} configurations none is shown to be within the margin"]
        lines.append(f"  best mean on the holdout: {_with_size(advice.best)} ({_taken(advice)})")
    else:
        lines = [f"{name}: {_with_size(picked)}"]
        lines.append(f"  {_evidence(advice, picked)}")
        lines += [f"  {line}" for line in _evaluation(advice, picked)]
    return lines + [f"  {line}" for line in (*_surer(advice), *_of_whom_not(advice))]


def _name(advice: Advice) -> str:
    if len(advice.columns) > 1:
        return f"over {len(advice.columns)} tasks (mean of {', '.join(column.title for column in advice.columns)})"
    return f"{advice.columns[0].title} ({advice.columns[0].metric})"


def _with_size(each: Candidate) -> str:
    return f"{each.label}, {human(each.size)} adapter parameters"


def _evidence(advice: Advice, picked: Candidate) -> str:
    others = len(advice.candidates) - 1
    than = "the one other" if others == 1 else f"each of the {others} others"
    corrected = f" after Holm's correction over {others + 1} configurations" if others > 1 else ""
    p = f"{picked.adjusted_p:.2g}" if picked.adjusted_p >= 1e-4 else "below 0.0001"
    behind = "" if picked.behind is None else f", hardest against {picked.hardest} ({picked.behind.mean:+.4f})"
    return (
        f"holdout: less than {advice.margin:g} worse than {than}, whichever is best (p = {p}{corrected}; "
        f"{_taken(advice)}){behind}"
    )


def _taken(advice: Advice) -> str:
    """What the interval takes as samples."""
    found = [each for of_column in advice.pairs for each in of_column.values()]
    seeds = sorted({len(each.seeds) for each in found})
    text = f"{' to '.join(map(str, [seeds[0], seeds[-1]] if len(seeds) > 1 else seeds))} seeds"
    if any(each.num_examples is None for each in found):
        return f"{text} alone: the holdout's predictions were not kept, so nothing is said of other examples"
    examples = sorted({each.num_examples for each in found if each.num_examples is not None})
    return f"{text} and {' to '.join(f'{number:,}' for number in dict.fromkeys([examples[0], examples[-1]]))} examples"


def _evaluation(advice: Advice, picked: Candidate) -> list[str]:
    """The scores on the evaluation splits, which had no say in the choice."""
    lines = []
    for column, each in zip(advice.columns, advice.evaluation, strict=True):
        title = f" on {column.title}" if len(advice.columns) > 1 else ""
        score = summary_text(picked.row.cells[column.title].score)
        versus = "the best on the holdout" if each is None else _less(each, advice.best.label)
        lines.append(f"evaluation{title}: {score}; {versus}")
    return lines


def _less(each: Comparison, best: str) -> str:
    text = f"less {best}, the best on the holdout: {each.scores[0].mean() - each.scores[1].mean():+.4f}"
    if each.difference is None:
        return f"{text} (no interval: no spread)"
    low, high = each.difference.interval
    what = "seeds alone" if each.num_examples is None else f"seeds and {each.num_examples:,} examples"
    return f"{text} ({LEVEL_TEXT} interval {low:+.4f} to {high:+.4f}; {what})"


def _surer(advice: Advice) -> list[str]:
    """What more would show a smaller configuration."""
    hopeful = [each for each in advice.smaller if each.needed is not None]
    if not hopeful:
        return []
    each = hopeful[0]
    behind = "" if each.behind is None else f", {each.behind.mean:+.4f} against {each.hardest}"
    text = f"not shown yet: {_with_size(each)} (p = {each.adjusted_p:.2g}{behind})."
    more = each.needed
    assert more is not None
    if more.seeds is not None:
        return [f"{text} About {more.seeds} seeds would show it (--seeds {more.seeds}), if the differences stay"]
    if more.times_rows is not None:
        return [f"{text} Seeds alone will not show it: about {more.times_rows:g} times the holdout's rows would"]
    return [f"{text} Neither 100 seeds nor 100 times the holdout's rows would show it"]


def _of_whom_not(advice: Advice) -> list[str]:
    """The rows that had no chance, and why."""
    told = [(each.label, each.why_not) for each in advice.candidates if each.why_not]
    told += [(each.label, "size not known") for each in advice.candidates if each.size is None]
    by_reason: dict[str, list[str]] = defaultdict(list)
    for label, why in [*told, *advice.left_out]:
        by_reason[why].append(label)
    lines = _without_spread(advice)
    for why, labels in by_reason.items():
        lines.append(f"no candidate ({why}): {few(labels)}")
    if any("tuned" in each.row.tuning for each in advice.candidates):
        lines.append("hyperparameters were tuned on the same holdout rows, which favours the tuned ones a little")
    return lines


def _without_spread(advice: Advice) -> list[str]:
    """Pairs that nothing can be said of, so that neither of the two can be shown."""
    found = {}
    for of_column in advice.pairs:
        for labels, each in of_column.items():
            if each.difference is None:
                found[labels] = "the same difference at every seed" if len(each.seeds) > 1 else "no two common seeds"
    told = [f"{' and '.join(labels)} ({why})" for labels, why in found.items()]
    return [f"cannot be compared: {few(told)}"] if told else []


def runs_behind(advice: Advice) -> list[Run]:
    """The runs of the configuration that was picked, on all of its tasks."""
    assert advice.picked is not None
    return [run for column in advice.columns for run in advice.picked.row.cells[column.title].scored]


def peft_text(config: Mapping[str, Any]) -> str:
    """A file that `LoraConfig(**json.load(file))` reads, or PEFT itself as adapter_config.json in a folder."""
    return json.dumps({"peft_type": "LORA", **config}, indent=2) + "\n"


def sweep_text(values: Mapping[str, Any], train: Mapping[str, Any], comment: str) -> str:
    """A sweep file. Values are numbers, texts and lists of them; None is left out."""
    lines = [f"# {comment}", *_assigned(values)]
    return "\n".join([*lines, *(["", "[train]", *_assigned(train)] if train else [])]) + "\n"


def _assigned(values: Mapping[str, Any]) -> list[str]:
    return [f"{name} = {json.dumps(value)}" for name, value in values.items() if value is not None]


def choice_text(name: str, parameters: Mapping[str, Any]) -> str:
    """A configuration as a sweep takes it, with every value in full: "lora[rank_pattern={"a.query"=4}]"."""
    values = ",".join(f"{key}={json.dumps(value, separators=(',', '='))}" for key, value in parameters.items())
    return f"{name}[{values}]" if values else name


def same_ranks(ranks: Sequence[Mapping[str, int]]) -> bool:
    """Whether all runs ended with the same."""
    return all(each == ranks[0] for each in ranks)
