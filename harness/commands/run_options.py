"""The options of `run` as a sweep, the place of its runs, and how they are carried out. Imports nothing heavy."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path
from typing import Any

from harness.errors import InputError
from harness.notation import parse_value, split_list
from harness.parameters import checked_path
from harness.plan import sweep_file
from harness.plan.sweep import LARGEST_SEED, MOST_SEEDS, Sweep
from harness.spec import Execution, Place, TrainSpec

DATA_ROOT = "HARNESS_DATA_ROOT"
WIKITEXT = "wikitext"  # the one text of --forgetting that is no file


def sweep_of(options: argparse.Namespace) -> Sweep:
    """The comparison: options over the --config file over the --preset. Raises InputError."""
    values: dict[str, Any] = {}
    for path in [None if options.preset is None else sweep_file.preset(options.preset), options.config]:
        if path is not None:
            _overlay(values, sweep_file.read(path))
    given = {name: getattr(options, name) for name in ("methods", "tasks", "model")}
    given |= {name: _parsed(getattr(options, name)) for name in ("limit", "evaluation_limit", "threads", "tune")}
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
    numbers = ("evaluation_batch_size", "checkpoint_every", "forgetting_windows")
    given |= {name: _parsed(given[name]) for name in numbers}
    if given["rank_curve"] is not None:
        given["rank_curve"] = [parse_value(rank) for rank in split_list(given["rank_curve"])]
        if not given["rank_curve"]:
            raise InputError("--rank-curve '' is not allowed: give ranks, such as 1,2,4,8")
    given["data_root"] = _data_root(given["data_root"])
    given["forgetting"] = _text_sample(given["forgetting"])
    place = Place.of({name: value for name, value in given.items() if value is not None}, "--")
    if repeated := [rank for rank, times in Counter(place.rank_curve).items() if times > 1]:
        raise InputError(f"--rank-curve has {repeated[0]} more than once: give each rank once")
    return place


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


def _text_sample(given: str | None) -> str | None:
    """The option; a file as an absolute path, since workers of a cluster have folders of their own and a finished run
    is asked whether it had this text."""
    if given is None or given == WIKITEXT:
        return given
    try:
        path = Path(given).expanduser().absolute()
        return str(path) if path.is_file() else given
    except (OSError, ValueError, RuntimeError):  # told when it is read
        return given


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
