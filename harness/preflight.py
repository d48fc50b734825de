"""Everything that can be found wrong before the first run is, without writing anything."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from harness import registry
from harness.data import Data, data_of
from harness.errors import InputError
from harness.method import FinishedRun, Method, ParameterCount
from harness.plan import Fingerprints, Sweep, cell_of, method_cells, model_of, plan, task_cells
from harness.run import device_of
from harness.spec import Place, RunSpec
from harness.task import Splits, Task


@dataclass
class CheckedTask:
    """A task of the sweep whose data and model were found to be in order."""

    name: str
    task: Task
    model: str | None
    data: Data
    fingerprints: Fingerprints

    @property
    def splits(self) -> Splits:
        """The task's rows."""
        return self.data.splits


def check_tasks(sweep: Sweep, place: Place) -> list[CheckedTask]:
    """Load every task's data and find every model, in the order of `task_cells`. Raises InputError."""
    device_of(place)
    checked = []
    for name, task in task_cells(sweep):
        model = model_of(sweep, task)
        try:
            data = data_of(task, place.data_root, sweep.limit, model)
        except InputError as error:
            raise InputError(f"task '{name}': {error}", error.mention) from None
        fingerprints = Fingerprints(data.splits.fingerprint, task.model_fingerprint(model))
        checked.append(CheckedTask(name, task, model, data, fingerprints))
    return checked


class CheckedMethod(NamedTuple):
    """A method as it was resolved for one task's backbone, why it cannot work on it, or None, and what it says."""

    name: str
    method: Method
    reason: str | None
    notes: list[str]


def check_methods(
    sweep: Sweep, tasks: Sequence[CheckedTask], place: Place, finished: FinishedRun
) -> list[list[CheckedMethod]]:
    """Resolve every method for every task's backbone, on the meta device, and try it: for each task a list in the order
    of `method_cells`. Raises InputError for a hyperparameter that cannot be right."""
    cells = []
    methods = method_cells(sweep)
    for checked in tasks:
        backbone = checked.task.backbone(checked.model, meta=True, trust_remote_code=place.trust_remote_code)
        column = []
        for name, given in methods:
            method = given.resolve(backbone, finished)
            reason = method.unsupported(backbone)
            notes = method.notes(backbone, sweep.train, len(checked.splits.train)) if reason is None else []
            column.append(CheckedMethod(name, method, reason, notes))
        cells.append(column)
    return cells


def plan_checked(
    sweep: Sweep, tasks: Sequence[CheckedTask], cells: Sequence[Sequence[CheckedMethod]], place: Place
) -> list[RunSpec]:
    """The plan with the methods as `check_methods` resolved them; cells that became the same run are one."""
    specs = plan(sweep, [task.fingerprints for task in tasks], place)
    given = [method for _, method in method_cells(sweep)]
    changed = [
        None if cell.method == method else cell.method.model_dump(mode="json")
        for column in cells
        for cell, method in zip(column, given, strict=True)
    ]
    if not any(changed):
        return specs
    resolved = (
        spec if parameters is None else spec.model_copy(update={"method_parameters": parameters})
        for spec, parameters in zip(specs, itertools.cycle(changed), strict=False)
    )
    return list({spec.run_id: spec for spec in resolved}.values())


def supported(
    specs: Sequence[RunSpec], tasks: Sequence[CheckedTask], cells: Sequence[Sequence[CheckedMethod]]
) -> list[tuple[Method, RunSpec]]:
    """Every method that can work on its task, with the first of its runs in the plan."""
    first: dict[str, RunSpec] = {}
    for spec in specs:
        first.setdefault(cell_of(spec), spec)
    found: dict[str, tuple[Method, RunSpec]] = {}
    for task, column in zip(tasks, cells, strict=True):
        for cell in column:
            parameters = {"method": cell.name, "method_parameters": cell.method.model_dump(mode="json")}
            of_task = {"task": task.name, "task_parameters": registry.task_parameters(task.task)}
            key = cell_of(specs[0].model_copy(update=parameters | of_task))
            if cell.reason is None:
                found.setdefault(key, (cell.method, first[key]))
    return list(found.values())


def check_models(tasks: Sequence[CheckedTask], place: Place) -> None:
    """Load every task's model and encode its holdout once, so that missing weights or tokenizer files are found
    before the first run. Raises InputError."""
    for checked in tasks:
        checked.data.encoded("holdout")
        if place.predict_test and not checked.task.test(place.data_root):
            raise InputError(f"--predict-test: task '{checked.name}' has no unlabelled test split", checked.name)
        checked.task.backbone(checked.model, trust_remote_code=place.trust_remote_code)


def preview(method: Method, checked: CheckedTask, sweep: Sweep, place: Place) -> ParameterCount:
    """The counts at the start of a run, from shapes alone: the backbone is on the meta device."""
    backbone = checked.task.backbone(checked.model, meta=True, trust_remote_code=place.trust_remote_code)
    data = _Undrawn(len(checked.splits.train))
    return method.start(backbone, sweep.train, data, torch.Generator().manual_seed(0)).parameter_count()


class _Undrawn:
    """Training data for a dry run, which must not draw any."""

    def __init__(self, size: int) -> None:
        self.size = size

    def draw(self, stream: str) -> tuple[int, ...]:
        raise RuntimeError("a method drew data on the meta device, where nothing is trained")
