"""What a user asks for, methods x tasks x seeds x grid, and the spec of each of its cells. Pure, no torch."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field, field_validator

from harness import registry
from harness.errors import InputError, unknown
from harness.method import Method
from harness.notation import parse_choice
from harness.parameters import Strict, checked_path
from harness.plan import references
from harness.spec import EVERYTHING, MOST, Limits, Place, RunSpec, Selection, TrainSpec
from harness.task import Task

MOST_SEEDS = 100_000
LARGEST_SEED = 2**63 - 1
MOST_CELLS = 1_000_000  # of one sweep, its trials included
MOST_TRIALS = 10_000  # of one search
TRIAL_SEED = 1_000_000  # of every trial of a search; none of the report


class Sweep(Strict):
    """A comparison as a user writes it, on the command line or in a TOML file."""

    description: str = Field("", description="one line, shown by `list` for a preset")
    methods: tuple[str, ...] = Field((), description='names, with parameters in brackets: "lora[rank=4]"')
    tasks: tuple[str, ...] = Field(
        (), description='names; a family ("glue") stands for all of its tasks; own data: "text:PATH"'
    )
    seeds: tuple[int, ...] = Field((0,), description="every cell is run once per seed")
    grid: dict[str, tuple[Any, ...]] = Field({}, description='"debora.tau" = [4, 8, 16]')
    model: Annotated[str, AfterValidator(checked_path)] | None = Field(
        None, description="model folder or Hub id, for the tasks that take one"
    )
    limit: int | None = Field(
        None, ge=2, le=MOST, description="most training rows, and most rows of each evaluation split"
    )
    evaluation_limit: int | None = Field(
        None, ge=2, le=MOST, description="most rows of each evaluation split, where `limit` is for training rows alone"
    )
    threads: int = Field(1, ge=1, description="CPU threads of each run")
    tune: int | None = Field(
        None, ge=1, le=MOST_TRIALS, description="trials of the search that each method gets on each task"
    )
    train: TrainSpec = TrainSpec()
    report: Selection = Field(EVERYTHING, description="what its report shows")

    @property
    def limits(self) -> Limits:
        """How many rows of the data the runs may take."""
        return Limits(self.limit, self.evaluation_limit)

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(seeds) > MOST_SEEDS:
            raise ValueError(f"{len(seeds):,} of them are not allowed: give 1 to {MOST_SEEDS:,}")
        if not seeds or min(seeds) < 0 or max(seeds) > LARGEST_SEED or len(set(seeds)) < len(seeds):
            raise ValueError(
                f"{list(seeds)} is not allowed: give at least one, each 0 or above and only once, below 2^63"
            )
        return seeds


class Fingerprints(NamedTuple):
    """Content hashes that a run's identity covers."""

    data: str
    model: str


def method_cells(sweep: Sweep) -> list[tuple[str, Method]]:
    """Every method of the sweep with its parameters, the grid multiplied out, duplicates left out.

    Raises InputError for an unknown method, parameter or value, and a label that is not one of the sweep.
    """
    if not sweep.methods:
        raise InputError(f"no methods: give --methods, for example --methods lora,debora ({_all(registry.METHODS)})")
    chosen = [parse_choice(text) for text in dict.fromkeys(sweep.methods)]
    grid = _grid(sweep, {name for name, _ in chosen})
    cells: dict[str, tuple[str, Method]] = {}
    for name, parameters in chosen:
        axes = {key: values for (method, key), values in grid.items() if method == name}
        if clash := axes.keys() & parameters.keys():
            raise InputError(
                f"parameter '{min(clash)}' of {name} is fixed in brackets and varied by the grid; drop one"
            )
        _check_number(len(cells) + math.prod(map(len, axes.values())), "methods, multiplied out by the grid,")
        for values in itertools.product(*axes.values()):
            method = registry.make_method(name, parameters | dict(zip(axes, values, strict=True)))
            named = references.with_one_spelling((name, method))
            cells[references.key_of(named)] = named
    references.check(cells.values())
    return list(cells.values())


def task_cells(sweep: Sweep) -> list[tuple[str, Task]]:
    """Every task of the sweep, families expanded. Raises InputError for an unknown task, parameter or value."""
    if not sweep.tasks:
        raise InputError(f"no tasks: give --tasks, for example --tasks rotten_tomatoes ({_all(registry.TASKS)})")
    cells: dict[str, tuple[str, Task]] = {}
    for text in dict.fromkeys(sweep.tasks):
        name, parameters = parse_choice(text)
        _check_path(name)
        for member in registry.task_names(name):
            task = registry.make_task(member, parameters)
            cells[member + task.model_dump_json()] = registry.task_name(member), task
    if sweep.model and all(task.default_model is None for _, task in cells.values()):
        names = ", ".join(name for name, _ in cells.values())
        raise InputError(f"--model '{sweep.model}' has no use here: {names} brings its own model", sweep.model)
    return list(cells.values())


def cells_of(sweep: Sweep) -> tuple[list[tuple[str, Method]], list[tuple[str, Task]]]:
    """`method_cells` and `task_cells`. Raises InputError as they do, for more runs than one sweep can have, and where a
    seed of the report is that of the trials."""
    if sweep.tune and TRIAL_SEED in sweep.seeds:
        raise InputError(f"--seeds {TRIAL_SEED} is the seed of the trials of --tune: give another", str(TRIAL_SEED))
    methods, tasks = method_cells(sweep), task_cells(sweep)
    each = len(sweep.seeds) + (sweep.tune or 0)
    parts = (
        f"{len(methods):,} methods x {len(tasks):,} tasks x {each:,} {'seeds and trials' if sweep.tune else 'seeds'}"
    )
    _check_number(len(methods) * len(tasks) * each, f"runs ({parts})")
    return methods, tasks


def _check_number(number: int, what: str) -> None:
    if number > MOST_CELLS:
        raise InputError(f"{number:,} {what} are more than the {MOST_CELLS:,} runs that a sweep can have")


def _check_path(task: str) -> None:
    """Raises InputError for "family:PATH" with a path that cannot be one."""
    _, colon, path = task.partition(":")
    if not (colon and path):
        return
    try:
        checked_path(path)
    except ValueError as error:
        raise InputError(f"task '{task}': {error}", task) from None


def spec_of(
    sweep: Sweep, place: Place, method: tuple[str, Method], task: tuple[str, Task], found: Fingerprints
) -> RunSpec:
    """The run of a method on a task at the sweep's first seed; those of the other seeds differ in the seed alone.

    `method`: as it was resolved for the task's backbone, with its name; see `Method.resolve`.
    """
    (method_name, chosen), (task_name, problem) = method, task
    return RunSpec(
        method=method_name,
        method_version=chosen.version,
        method_parameters=chosen.model_dump(mode="json"),
        task=task_name,
        task_version=problem.version,
        task_parameters=registry.task_parameters(problem),
        data_fingerprint=found.data,
        model_fingerprint=found.model,
        limit=sweep.limit,
        evaluation_limit=sweep.evaluation_limit,
        threads=sweep.threads,
        train=sweep.train,
        seed=sweep.seeds[0],
        place=place.model_copy(update={"model": model_of(sweep, problem), "path": getattr(problem, "path", None)}),
    )


def model_of(sweep: Sweep, task: Task) -> str | None:
    """The model folder or Hub id that a task of this sweep starts from; None where the task builds its own."""
    return None if task.default_model is None else sweep.model or task.default_model


def _grid(sweep: Sweep, methods: set[str]) -> dict[tuple[str, str], tuple[Any, ...]]:
    grid = {}
    for key, values in sweep.grid.items():
        method, dot, parameter = key.partition(".")
        if not dot:
            raise InputError(f"grid '{key}' cannot be read; write method.parameter=value,value", key)
        if method not in methods:
            raise unknown("method in the grid", method, methods)
        if not values:
            raise InputError(f"grid '{key}' has no values; write {key}=value,value", key)
        grid[method, parameter] = values
    return grid


@functools.cache
def _all(group: str) -> str:
    return "available: " + ", ".join(registry.registered(group))
