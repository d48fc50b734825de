"""Run the controls of the study's main table: is it the ranks that dEBORA found, or only how few they are?

For every run of dEBORA's plain variant below RESULTS, at the same task and seed and with the learning rate that the
search found for LoRA of rank 8: LoRA at the ranks found, LoRA at those ranks shuffled among layers of one shape, LoRA
of one rank nearest in numbers, and LoRA of rank 8 pruned once to as many components, by magnitude and at random.

Usage: python scripts/study/controls.py RESULTS [options of `python -m harness run`, such as --data-root DIR]
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from harness.errors import InputError
from harness.record.record import RunRecord
from harness.record.store import RecordStore

MAIN = Path(__file__).with_name("main.toml")


def chosen(records: list[RunRecord], method: str, **parameters: object) -> list[RunRecord]:
    """The finished runs of the main table of this method whose hyperparameters hold these values."""
    return [
        record
        for record in records
        if record.spec.method == method
        and record.status == "done"
        and record.spec.search is not None
        and record.spec.search.role == "chosen"
        and parameters.items() <= record.spec.method_parameters.items()
    ]


def controls_of(found: RunRecord, learning_rate: float) -> list[str]:
    """The controls of one run of dEBORA, as `--methods` takes them."""
    assert found.parameters is not None
    rate = f"learning_rate={learning_rate}"
    ranks = f"ranks='{found.run_id}'"
    components = f"components={sum(found.ranks.values())}"
    return [
        f"lora[{ranks},{rate}]",
        f"lora[{ranks},shuffle_ranks=true,{rate}]",
        f"lora[parameters={found.parameters.adapter_final},{rate}]",
        f"pruned_lora[{components},{rate}]",
        f"pruned_lora[{components},selection=random,{rate}]",
    ]


def task_of(record: RunRecord, tasks: list[str]) -> str:
    """The task as main.toml has it, with its parameters."""
    return next(task for task in tasks if task.split("[")[0] == record.spec.task)


def options_of(train: dict[str, Any]) -> list[str]:
    """The [train] table of a plan as options of `run`; a switch that is on has no value."""
    options = []
    for name, value in train.items():
        options += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return options


def main(results: Path, options: list[str]) -> int:
    """One command for each run of dEBORA; the largest of their exit codes."""
    plan = tomllib.loads(MAIN.read_text())
    train = options_of(plan["train"])
    records = RecordStore.existing(results).records()
    rates = {r.spec.task: r.spec.method_parameters["learning_rate"] for r in chosen(records, "lora", rank=8)}
    code = 0
    for found in chosen(records, "debora", geometry="matrix"):
        if found.spec.task not in rates:
            continue
        command = [
            *[sys.executable, "-m", "harness", "run", "--results", str(results), "--model", plan["model"]],
            *["--methods", ",".join(controls_of(found, rates[found.spec.task]))],
            *["--tasks", task_of(found, plan["tasks"]), "--seeds", f"{found.spec.seed},"],
            *train,
            *options,
        ]
        print(" ".join(command), flush=True)
        code = max(code, subprocess.run(command, check=False).returncode)
    return code


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
