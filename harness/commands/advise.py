"""`advise`: the smallest configuration that is not worse than the best by more than a margin, ready for PEFT."""

from __future__ import annotations

import math
import re
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import installed, registry, storage
from harness.commands import target
from harness.commands.boards import boards_below
from harness.errors import InputError
from harness.report.board.leaderboard import Board
from harness.report.board.rows import Column
from harness.report.evidence.choice import Advice, advise, why_not
from harness.report.evidence.compare import ExampleReader, unused
from harness.report.evidence.pattern import one_pattern
from harness.report.forms.advice import choice_text, in_words, peft_text, runs_behind, same_ranks, sweep_text
from harness.report.forms.text import CONSOLE_WIDTH
from harness.spec import RunSpec, TrainSpec

FOLDER = "advice"  # below the results folder
PEFT = "LoraConfig(**json.load(open(FILE))); the head is yours to name, by modules_to_save or task_type"


def command(
    results: Path, methods: Sequence[str] | None, tasks: Sequence[str] | None, margin: str, to: Path | None
) -> int:
    """Print an advice for each task and over tasks, and write its files: a configuration of PEFT where the adapter is a
    LoRA, and a sweep that trains it here.

    `to`: the file of the one advice asked for; None: DIR/advice/TASK.json. Raises InputError for a margin that is none,
    and where there is nothing to choose from, as with one seed.
    """
    allowed = _margin(margin)
    if to is not None and to.suffix == ".toml":
        raise InputError(f"--to '{to}' is the configuration for PEFT, in JSON: the sweep goes beside it, as .toml")
    store, boards = boards_below(results, methods, tasks)
    if not boards:
        raise InputError(f"no records in {store.runs}: run `python -m harness run ...` first")
    read, made, refused = ExampleReader(store, installed.metric_of), [], []
    for board in boards:
        for columns in _questions(board):
            advice = advise(board, columns, allowed, read)
            if advice is not None:
                made.append((board, advice))
            elif len(columns) == 1:
                refused.append(f"{columns[0].title}: {why_not(board, columns[0])}")
    if not made:
        raise InputError(refused[0])
    picked = [advice for _, advice in made if advice.picked]
    if to is not None and len(picked) > 1:
        raise InputError(f"--to '{to}' is one file, and there are {len(picked)} advices: choose one with --tasks")
    for place, (board, advice) in enumerate(made):
        if place == 0 or made[place - 1][0] is not board:
            print("\n" + _filled(board.caption))
        print("\n" + "\n".join(map(_filled, in_words(advice))))
        file = to or results / FOLDER / f"{_file_name(advice, board if len(boards) > 1 else None)}.json"
        if advice.picked:
            print("\n".join(map(_filled, _write(advice, file, results))))
        elif to is None:  # of records before these
            storage.remove(file)
            storage.remove(file.with_suffix(".toml"))
    for line in (*refused, *(unused(run_id, reason) for run_id, reason in sorted(read.damaged.items()))):
        print(line, file=sys.stderr)
    return 0


def _margin(text: str) -> float:
    """The margin. Raises InputError for anything but a finite number above 0."""
    try:
        margin = float(text)
    except ValueError:
        margin = math.nan
    if not (math.isfinite(margin) and margin > 0):
        raise InputError(f"--margin '{text}' is not allowed: give a number above 0, in the unit of the score: 0.01")
    return margin


def _questions(board: Board) -> list[tuple[Column, ...]]:
    """The tasks, one by one, and all together where several have scores of one sense."""
    alone: list[tuple[Column, ...]] = [(column,) for column in board.tasks]
    together = len(board.tasks) > 1 and len({column.higher_is_better for column in board.tasks}) == 1
    return [*alone, board.tasks] if together else alone


def _file_name(advice: Advice, board: Board | None) -> str:
    """glue_cola, over-tasks; with the setting's key where there are several."""
    name = advice.columns[0].title if len(advice.columns) == 1 else "over-tasks"
    return "-".join([re.sub(r"[^\w.-]+", "_", name).strip("_."), *([board.key] if board else [])])


def _write(advice: Advice, file: Path, results: Path) -> list[str]:
    """Write the files of an advice; what they are, a line each."""
    runs = runs_behind(advice)
    spec, ranks = runs[0].spec, [run.record.ranks for run in runs]
    form = installed.peft_form(spec.method, spec.method_parameters, one_pattern(ranks)) if all(ranks) else None
    sweep, lines = file.with_suffix(".toml"), []
    if form is not None:
        with target.made(file, replaces=True) as draft:
            draft.write_text(peft_text(form.config), encoding="utf-8")
        lines.append(f"  for PEFT: {file} ({PEFT})")
    elif file.is_file():  # of records before these
        storage.remove(file)
    name, parameters = (form.method, form.parameters) if form else (spec.method, spec.method_parameters)
    own = sorted(
        {
            key
            for run in runs
            for key, value in run.spec.method_parameters.items()
            if key in parameters and spec.method_parameters[key] != value
        }
    )
    parameters = {key: value for key, value in parameters.items() if key not in own or key == "rank_pattern"}
    with target.made(sweep, replaces=True) as draft:
        draft.write_text(_sweep(name, parameters, [run.spec for run in runs], advice), encoding="utf-8")
    if own:
        lines.append(f"  {', '.join(own)} differ between its runs, and are left at their defaults in {sweep}")
    if form is None:
        return [*lines, f"  no LoRA: its own configuration is {sweep}"]
    if form.method == spec.method and same_ranks(ranks):
        return [*lines, f"  as it was measured; the same as a sweep: {sweep}"]
    return [*lines, f"  {_unconfirmed(ranks)}: {_train(sweep, results, spec)} (--dry-run shows its parameters)"]


def _unconfirmed(ranks: Sequence[Mapping[str, int]]) -> str:
    rule = "" if same_ranks(ranks) else f" (each layer's median over {len(ranks)} runs, scaled to the mean total)"
    return f"to be confirmed: a LoRA of these ranks{rule} was not trained here. Train it"


def _train(sweep: Path, results: Path, spec: RunSpec) -> str:
    root = ["--data-root", spec.place.data_root] if spec.place.data_root else []
    where = ["--config", str(sweep), "--results", str(results)]
    return shlex.join(["python", "-m", "harness", "run", *where, *root])


def _sweep(name: str, parameters: Mapping[str, Any], specs: Sequence[RunSpec], advice: Advice) -> str:
    """The sweep of one configuration at the settings and seeds of these runs."""
    spec = specs[0]
    values = {
        "methods": [choice_text(name, installed.shown_parameters(name, parameters))],
        "tasks": list(dict.fromkeys(map(_task, specs))),
        "seeds": sorted({each.seed for each in specs}),
        "model": spec.place.model,
        "limit": spec.limit,
        "evaluation_limit": spec.evaluation_limit,
        "threads": spec.threads,
    }
    train = spec.train.model_dump(mode="json")
    train = {key: value for key, value in train.items() if value != TrainSpec.model_fields[key].default}
    return sweep_text(values, train, f"Advised at margin {advice.margin:g}")


def _task(spec: RunSpec) -> str:
    """The task as a sweep names it."""
    parameters = spec.task_parameters
    try:
        usual = registry.task_parameters(registry.make_task(spec.task, {}, spec.place.path))
        parameters = {name: value for name, value in parameters.items() if usual.get(name) != value}
    except InputError:  # it has parameters that must be given
        pass
    family = spec.task.partition(":")[0]
    name = f'{family}:"{spec.place.path}"' if spec.place.path else spec.task
    return choice_text(name, {name: value for name, value in parameters.items() if value is not None})


def _filled(line: str) -> str:
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.fill(
        line.lstrip(),
        CONSOLE_WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  " * bool(indent),
        break_on_hyphens=False,
        break_long_words=False,
    )
