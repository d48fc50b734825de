"""Everything that can be found wrong before the first run is, without writing anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from harness.errors import InputError
from harness.method import Method, ParameterCount
from harness.plan import Fingerprints, Sweep, method_cells, model_of, task_cells
from harness.run import device_of, splits_of
from harness.spec import Place
from harness.task import Splits, Task


@dataclass
class CheckedTask:
    """A task of the sweep whose data and model were found to be in order."""

    name: str
    task: Task
    model: str | None
    splits: Splits
    fingerprints: Fingerprints


def check_tasks(sweep: Sweep, place: Place) -> list[CheckedTask]:
    """Load every task's data and find every model, in the order of `task_cells`. Raises InputError."""
    device_of(place)
    checked = []
    for name, task in task_cells(sweep):
        model = model_of(sweep, task)
        try:
            splits = splits_of(task, place.data_root, sweep.limit)
        except InputError as error:
            raise InputError(f"task '{name}': {error}", error.mention) from None
        fingerprints = Fingerprints(splits.fingerprint, task.model_fingerprint(model))
        checked.append(CheckedTask(name, task, model, splits, fingerprints))
    return checked


def check_methods(sweep: Sweep, tasks: Sequence[CheckedTask], place: Place) -> dict[tuple[int, int], str]:
    """Try every method on every task's backbone, on the meta device.

    Returns the reason for each (method, task) pair, by position, that is unsupported. Raises InputError for a
    hyperparameter that cannot be right.
    """
    reasons = {}
    methods = method_cells(sweep)
    for column, checked in enumerate(tasks):
        backbone = checked.task.backbone(checked.model, meta=True, trust_remote_code=place.trust_remote_code)
        for row, (_, method) in enumerate(methods):
            reason = method.unsupported(backbone)
            if reason is not None:
                reasons[row, column] = reason
    return reasons


def check_models(tasks: Sequence[CheckedTask], place: Place) -> None:
    """Load every task's model and encode its holdout once, so that missing weights or tokenizer files are found
    before the first run. Raises InputError."""
    for checked in tasks:
        checked.task.encode(checked.splits.holdout, checked.model)
        if place.predict_test and not checked.task.test(place.data_root):
            raise InputError(f"--predict-test: task '{checked.name}' has no unlabelled test split", checked.name)
        checked.task.backbone(checked.model, trust_remote_code=place.trust_remote_code)


def preview(method: Method, checked: CheckedTask, sweep: Sweep, place: Place) -> tuple[ParameterCount, list[str]]:
    """The counts at the start of a run, from shapes alone (the backbone is on the meta device), and what the method has
    to say about it; see `Method.notes`."""
    backbone = checked.task.backbone(checked.model, meta=True, trust_remote_code=place.trust_remote_code)
    data = _Undrawn(len(checked.splits.train))
    notes = method.notes(backbone, sweep.train, data.size)
    adaptation = method.start(backbone, sweep.train, data, torch.Generator().manual_seed(0))
    return adaptation.parameter_count(), notes


class _Undrawn:
    """Training data for a dry run, which must not draw any."""

    def __init__(self, size: int) -> None:
        self.size = size

    def draw(self, stream: str) -> tuple[int, ...]:
        raise RuntimeError("a method drew data on the meta device, where nothing is trained")
