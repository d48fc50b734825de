"""Everything that can be found wrong before the first run is, without writing anything."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from harness.errors import InputError
from harness.method import FinishedRun, Method
from harness.parameters import ParameterCount
from harness.plan.plan import Fingerprints, Sweep, method_cells, model_of, plan, task_cells
from harness.plan.trial import check_rows
from harness.record.environment import device_of
from harness.run.data import Data, data_of
from harness.run.sizes import Sizes
from harness.spec import Place, RunSpec, TrainSpec
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
        of_model = task.model_fingerprint(model, trust_remote_code=place.trust_remote_code)
        fingerprints = Fingerprints(data.splits.fingerprint, of_model)
        checked.append(CheckedTask(name, task, model, data, fingerprints))
    return checked


def summaries(tasks: Sequence[CheckedTask]) -> list[str]:
    """What was read of every task, a few lines each: see `Data.summary`."""
    return [line for checked in tasks for line in checked.data.summary(checked.name)]


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
) -> list[tuple[RunSpec, CheckedMethod]]:
    """The plan, each run with its method as `check_methods` resolved it; cells that became the same run are one."""
    planned: dict[str, tuple[RunSpec, CheckedMethod]] = {}
    specs = plan(sweep, [task.fingerprints for task in tasks], place)
    given = itertools.cycle([method for _ in tasks for _, method in method_cells(sweep)])
    for spec, method, cell in zip(specs, given, itertools.cycle(itertools.chain(*cells)), strict=False):
        if cell.method != method:
            spec = spec.model_copy(update={"method_parameters": cell.method.model_dump(mode="json")})
        planned.setdefault(spec.run_id, (spec, cell))
    return list(planned.values())


def check_models(tasks: Sequence[CheckedTask], train: TrainSpec, place: Place) -> list[str]:
    """Load every task's model, encode its holdout and put a few rows of it through the model once, so that missing
    files, and a model that cannot serve, are found before the first run. What is to be said of them, a line each.

    Raises InputError, also where a prediction depends on the rows beside it.
    """
    said: dict[str, None] = {}
    for checked in tasks:
        encoded = checked.data.encoded("holdout")
        if place.predict_test and not checked.task.test(place.data_root):
            raise InputError(f"--predict-test: task '{checked.name}' has no unlabelled test split", checked.name)
        backbone = checked.task.backbone(checked.model, trust_remote_code=place.trust_remote_code)
        where = f"task '{checked.name}': model '{checked.model}'"
        lines = check_rows(checked.task, backbone.module, encoded, train, where)
        said |= dict.fromkeys([*checked.task.model_notes(checked.model), *lines])
    return list(said)


def model_notes(tasks: Sequence[CheckedTask]) -> list[str]:
    """What is to be said of the models, a line each, as far as their files are here: a dry run needs only shapes."""
    said: dict[str, None] = {}
    for checked in tasks:
        with contextlib.suppress(InputError):
            said |= dict.fromkeys(checked.task.model_notes(checked.model))
    return list(said)


def preview(method: Method, checked: CheckedTask, sweep: Sweep, place: Place) -> ParameterCount:
    """The counts at the start of a run, from shapes alone: the backbone is on the meta device."""
    backbone = checked.task.backbone(checked.model, meta=True, trust_remote_code=place.trust_remote_code)
    data = _Undrawn(len(checked.splits.train))
    adaptation = method.start(backbone, sweep.train, data, torch.Generator().manual_seed(0))
    return Sizes(adaptation).parameters()


class _Undrawn:
    """Training data for a dry run, which must not draw any."""

    def __init__(self, size: int) -> None:
        self.size = size

    def draw(self, stream: str) -> tuple[int, ...]:
        raise RuntimeError("a method drew data on the meta device, where nothing is trained")
