"""`run`: plan, check, train what is missing, report."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import registry
from harness.errors import InputError
from harness.execute import machine
from harness.notation import parse_value, split_list
from harness.parameters import checked_path
from harness.plan import sweep_file
from harness.plan.plan import LARGEST_SEED, MOST_SEEDS, Sweep, cells_of
from harness.spec import Execution, Place, RunSpec, TrainSpec

if TYPE_CHECKING:
    from rich.console import Console

    from harness.record.store import RecordStore, Skim

DATA_ROOT = "HARNESS_DATA_ROOT"


def command(options: argparse.Namespace) -> int:
    """Carry out `run`. Returns 0, or 1 where a run failed, diverged or ran out of memory."""
    sweep, place, execution = sweep_of(options), place_of(options), execution_of(options)
    try:
        cells_of(sweep)  # names and values are checked before anything heavy is imported
        machine.check(execution, sweep.threads)
        return _dry_run(sweep, place, options.results) if options.dry_run else _run(sweep, place, execution, options)
    except InputError as error:
        raise (sweep_file.located(error, options.config) if options.config else None) or error from None


def _check_kept(store: RecordStore, finished: Mapping[str, Skim], place: Place, console: Console) -> None:
    """A finished run is not run again for the sake of what it has not kept: say so."""
    wanted: dict[str, tuple[object, Callable[[str], object]]] = {
        "adapter": (place.save_adapter, lambda run_id: (store.folder(run_id) / "adapter").exists()),
        "predictions for the test set": (place.predict_test, store.test_splits),
        "such rank curve": (place.rank_curve, lambda run_id: finished[run_id].rank_curve == place.rank_curve),
    }
    for what, (asked, kept) in wanted.items():
        lacking = sum(not kept(run_id) for run_id in finished) if asked else 0
        if lacking:
            console.print(f"{lacking} of the finished runs have kept no {what}; delete their folders to run them again")


def sweep_of(options: argparse.Namespace) -> Sweep:
    """The comparison: options over the --config file over the --preset. Raises InputError."""
    values: dict[str, Any] = {}
    for path in [None if options.preset is None else sweep_file.preset(options.preset), options.config]:
        if path is not None:
            _overlay(values, sweep_file.read(path))
    given = {name: getattr(options, name) for name in ("methods", "tasks", "model")}
    given |= {name: _parsed(getattr(options, name)) for name in ("limit", "threads", "tune")}
    if options.seeds is not None:
        given["seeds"] = _seeds(options.seeds)
    if options.grid:
        given["grid"] = _grid(options.grid)
    given = {name: value for name, value in given.items() if value is not None}
    train = {name: _parsed(getattr(options, name)) for name in TrainSpec.model_fields}
    train = {name: value for name, value in train.items() if value is not None}
    Sweep.of(given, "--")
    TrainSpec.of(train, "--")
    _overlay(values, given | {"train": train})
    return Sweep.of(values, "sweep")


def place_of(options: argparse.Namespace) -> Place:
    """Where and how: options over the environment. Raises InputError."""
    given = {name: getattr(options, name) for name in Place.model_fields if name not in ("model", "path")}
    given["checkpoint_every"] = _parsed(given["checkpoint_every"])
    if given["rank_curve"] is not None:
        given["rank_curve"] = [parse_value(rank) for rank in split_list(given["rank_curve"])]
        if not given["rank_curve"]:
            raise InputError("--rank-curve '' is not allowed: give ranks, such as 1,2,4,8")
    given["data_root"] = _data_root(given["data_root"])
    return Place.of({name: value for name, value in given.items() if value is not None}, "--")


def _data_root(given: str | None) -> str | None:
    """The option, or else the environment's. Raises InputError for what is no folder."""
    name, path = ("--data-root", given) if given is not None else (DATA_ROOT, os.environ.get(DATA_ROOT) or None)
    if path is None:
        return None
    try:
        if not Path(checked_path(path)).expanduser().is_dir():
            raise ValueError(f"'{path}' is not a folder")
    except (ValueError, OSError) as error:
        raise InputError(f"{name}: the data root {error}") from None
    return path


def execution_of(options: argparse.Namespace) -> Execution:
    """How the runs are carried out. Raises InputError."""
    given = {name: getattr(options, name) for name in Execution.model_fields}
    given |= {name: _parsed(given[name]) for name in ("gpus_per_run", "max_retries", "run_timeout")}
    return Execution.of({name: value for name, value in given.items() if value is not None}, "--")


def _parsed(text: str | None) -> Any:
    """An option's value with its type: 4, 0.5, or the word itself."""
    return None if text is None else parse_value(text)


def _overlay(values: dict[str, Any], new: dict[str, Any]) -> None:
    """`new` over `values`; [train] key by key, where a budget in batches replaces one in epochs and the reverse."""
    train = {**values.get("train", {})}
    for name, other in (("batches", "epochs"), ("epochs", "batches")):
        if name in new.get("train", {}):
            train.pop(other, None)
    values |= new
    values["train"] = {**train, **new.get("train", {})}


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    numbers = [part for part in parts if part]
    if not numbers or not all(part.isascii() and part.isdigit() for part in numbers):
        raise InputError(f"--seeds '{text}' is not allowed: give a count (3) or a list of whole numbers (0,1,2)")
    if len(parts) > 1:
        if large := [part for part in numbers if len(part.lstrip("0")) > len(str(LARGEST_SEED))]:
            raise InputError(f"--seeds '{large[0]}' is not allowed: a seed is below 2^63")
        return [int(part) for part in numbers]
    if len(numbers[0]) > len(str(MOST_SEEDS)) or not 1 <= int(numbers[0]) <= MOST_SEEDS:
        raise InputError(f"--seeds '{text}' is not allowed: a count is 1 to {MOST_SEEDS:,}")
    return list(range(int(numbers[0])))


def _grid(texts: list[str]) -> dict[str, list[Any]]:
    """Axes by "method.parameter"; one that is given twice has all of its values."""
    axes: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals:
            raise InputError(f"--grid '{text}' cannot be read; write method.parameter=value,value")
        axes.setdefault(key.strip(), []).extend(parse_value(value) for value in split_list(values))
    return axes


def _run(sweep: Sweep, place: Place, execution: Execution, options: argparse.Namespace) -> int:
    from rich.console import Console

    from harness.commands.report import MOST_SHOWN, brief, show_sweep
    from harness.execute import session, view
    from harness.plan import preflight, tuning
    from harness.record.cells import write as write_cells
    from harness.record.record import RETRIED
    from harness.record.store import RecordStore

    console, store = Console(), RecordStore(options.results)
    with console.status("checking data, models and methods"):
        checked = preflight.check_tasks(sweep, place)
        cells = preflight.check_methods(sweep, checked, place, store.find)
        said = preflight.check_models(checked, sweep.train, place)
    planned = preflight.plan_checked(sweep, checked, cells, place)
    specs = [spec for spec, _ in planned]
    searches = tuning.searches_of(sweep, planned)
    retried = RETRIED if options.retry_failed else ()
    with contextlib.ExitStack() as stack:
        start = functools.cache(lambda: stack.enter_context(session.session(execution, sweep.threads, place.device)))
        first = tuning.trials_of(searches) or specs
        there = _there(store, first, retried)
        if there[1]:
            start()  # Ray has the last word on what there is, before anything is written
        store.make_ready()
        for line in [*preflight.summaries(checked), *said]:
            console.out(line, highlight=False)  # print makes a picture of the name in "text:x: ..."

        def carry_out(specs: list[RunSpec], finished: Mapping[str, Skim], missing: list[RunSpec]) -> None:
            """Make the records that are missing."""
            write_cells(store, specs)
            _check_kept(store, finished, place, console)
            done = len(specs) - len(missing)
            console.print(f"{len(specs)} runs: {done} finished before, {len(missing)} to do", highlight=False)
            if missing:
                execute = start()
                with view.view(missing, console) as shown:
                    execute(missing, store, shown)

        if searches:
            console.print(f"tuning: {sweep.tune} trials for each of {len(searches)} method-task pairs", highlight=False)
            carry_out(first, *there)
            specs = tuning.chosen(searches, specs, store)
            there = _there(store, specs, retried)
        carry_out(specs, *there)
    if not there[1] and len(specs) > MOST_SHOWN:
        return brief(store, {run_id: found.status for run_id, found in there[0].items()})
    return show_sweep(store, _ids(specs), options.tracking_uri)


def _there(store: RecordStore, specs: list[RunSpec], retried: Collection[str]) -> tuple[dict[str, Skim], list[RunSpec]]:
    """The runs that are finished, by run_id, those with a `retried` status left out, and the other runs."""
    skimmed = {spec.run_id: store.skim(spec.run_id) for spec in specs}
    finished = {run_id: skim for run_id, skim in skimmed.items() if skim and skim.status not in retried}
    return finished, [spec for spec in specs if spec.run_id not in finished]


def _ids(specs: list[RunSpec]) -> list[str]:
    return [spec.run_id for spec in specs]


def _dry_run(sweep: Sweep, place: Place, results: Path) -> int:
    from tabulate import tabulate

    from harness.plan import estimate, preflight, tuning
    from harness.record.store import RecordStore

    checked = preflight.check_tasks(sweep, place)
    store = RecordStore(results)
    cells = preflight.check_methods(sweep, checked, place, store.find)
    planned = preflight.plan_checked(sweep, checked, cells, place)
    specs = [spec for spec, _ in planned]
    searches = tuning.searches_of(sweep, planned)
    trials = tuning.trials_of(searches)
    missing = [spec for spec in [*trials, *tuning.chosen(searches, specs, store)] if store.skim(spec.run_id) is None]
    print("\n".join(preflight.summaries(checked)))
    rows, notes = [], defaultdict(list)
    for task, column in zip(checked, cells, strict=True):
        for name, method, reason, said in column:
            shown = registry.label_of(name, method.model_dump(mode="json"))
            batches = sweep.train.budget(len(task.splits.train))
            if reason is not None:
                rows.append([shown, task.name, "unsupported", "", "", batches])
                notes[shown, reason].append(task.name)
                continue
            count = preflight.preview(method, task, sweep, place)
            rows.append(
                [shown, task.name, *(f"{n:,}" for n in (count.adapter_initial, count.head, count.total)), batches]
            )
            for line in said:
                notes[shown, line].append(task.name)
    headers = ["method", "task", "adapter at start", "head", "total", "batches"]
    print(tabulate(rows, headers, disable_numparse=True, colalign=("left", "left", *["right"] * 4)))
    for (shown, line), tasks in notes.items():
        print(f"{shown} on {', '.join(tasks)}: {line}")
    unsupported = {spec.run_id for spec, cell in planned if cell.reason is not None}
    for line in preflight.model_notes(checked):
        print(line)
    for line in estimate.lines([spec for spec in missing if spec.run_id not in unsupported], store):
        print(line)
    seeds = ", ".join(map(str, sweep.seeds))
    before = f"{len(trials)} trials ({sweep.tune} for each method and task), then " if searches else ""
    finished = len(trials) + len(specs) - len(missing)
    print(f"{before}{len(specs)} runs (seeds {seeds}), {finished} of them finished. Nothing was kept.")
    return 0
