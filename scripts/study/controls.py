"""Run the controls of the study's main table: is it the ranks that dEBORA found, or only how few they are?

For every run of dEBORA's plain variant below RESULTS, at the same task and seed and with the learning rate that the
search found for LoRA of rank 8: LoRA at the ranks found, LoRA at those ranks shuffled among layers of one shape, LoRA
of one rank nearest in numbers, and LoRA of rank 8 pruned once to as many components, by magnitude and at random.

Usage: python scripts/study/controls.py RESULTS [options of `python -m harness run`, such as --data-root DIR]
       python scripts/study/controls.py --parents RESULTS      which run each control took ranks or size from, as JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from harness import registry
from harness.errors import InputError
from harness.method import Finished
from harness.notation import parse_choice
from harness.record.record import RunRecord
from harness.record.store import RecordStore

MAIN = Path(__file__).with_name("main.toml")
TAKES = {  # what followed from other runs: from dEBORA's, and the learning rate from the search for LoRA
    "ranks_of": ["ranks", "rank_pattern", "learning_rate"],
    "parameters_of": ["rank", "parameters", "learning_rate"],
    "size_of": ["components", "learning_rate"],
}


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


def controls_of(found: RunRecord, learning_rate: float) -> dict[str, str]:
    """The controls of one run of dEBORA, as `--methods` takes them, with the parameter that names dEBORA in a sweep."""
    assert found.parameters is not None
    rate = f"learning_rate={learning_rate}"
    ranks = f"ranks='{found.run_id}'"
    components = f"components={sum(found.ranks.values())}"
    return {
        f"lora[{ranks},{rate}]": "ranks_of",
        f"lora[{ranks},shuffle_ranks=true,{rate}]": "ranks_of",
        f"lora[parameters={found.parameters.adapter_final},{rate}]": "parameters_of",
        f"pruned_lora[{components},{rate}]": "size_of",
        f"pruned_lora[{components},selection=random,{rate}]": "size_of",
    }


def parents_of(records: list[RunRecord]) -> dict[str, dict[str, str]]:
    """run_id of a control -> {"ranks_of": run_id of dEBORA's run}. Every control is planned again from the records of
    dEBORA and LoRA, and known by its run_id alone. Raises ValueError for a run that is none and has no search."""
    known = {record.run_id: record for record in records}
    rates, found = _rates(records), {}

    def finished(run_id: str) -> Finished:
        return Finished(known[run_id].ranks, known[run_id].parameters)

    for parent in chosen(records, "debora", geometry="matrix"):
        task = registry.task_of(parent.spec)
        backbone = task.backbone(parent.spec.place.model, meta=True)
        for text, parameter in controls_of(parent, rates[parent.spec.task]).items():
            name, parameters = parse_choice(text)
            method = registry.make_method(name, parameters).resolve(backbone, finished)
            planned = {"method": name, "method_version": method.version, "search": None}
            planned["method_parameters"] = method.model_dump(mode="json")
            run_id = parent.spec.model_copy(update=planned).run_id
            if run_id in known:
                found[run_id] = {parameter: parent.run_id}
    if strangers := [record.run_id for record in records if record.spec.search is None and record.run_id not in found]:
        raise ValueError(f"{len(strangers)} runs without a search are no controls, the first of them {strangers[0]}")
    return found


def task_of(record: RunRecord, tasks: list[str]) -> str:
    """The task as main.toml has it, with its parameters."""
    return next(task for task in tasks if task.split("[")[0] == record.spec.task)


def options_of(train: dict[str, Any]) -> list[str]:
    """The [train] table of a plan as options of `run`; a switch that is on has no value."""
    options = []
    for name, value in train.items():
        options += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return options


def _rates(records: list[RunRecord]) -> dict[str, Any]:
    """The learning rate that the search found for LoRA of rank 8, by task."""
    return {r.spec.task: r.spec.method_parameters["learning_rate"] for r in chosen(records, "lora", rank=8)}


def main(results: Path, options: list[str]) -> int:
    """One command for each run of dEBORA; the largest of their exit codes."""
    plan = tomllib.loads(MAIN.read_text())
    train = options_of(plan["train"])
    records = RecordStore.existing(results).records()
    rates = _rates(records)
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
        if sys.argv[1] == "--parents":
            parents = parents_of(RecordStore.existing(Path(sys.argv[2])).records())
            print(json.dumps({"takes": TAKES, "parents": dict(sorted(parents.items()))}, indent=1))
            sys.exit(0)
        sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
