"""Everything that can be found wrong before the first run is, without writing anything."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from harness.errors import InputError
from harness.method import Backbone, Finished, Method
from harness.parameters import ParameterCount
from harness.plan.sweep import Fingerprints, Sweep, method_cells, model_of, task_cells
from harness.plan.trial import check_rows
from harness.record.environment import device_of
from harness.run.data import Data, data_of
from harness.run.sizes import Sizes
from harness.spec import Place, TrainSpec
from harness.task import Splits, Task


@dataclass(frozen=True)
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

    def meta_backbone(self, place: Place) -> Backbone:
        """A new backbone of the task's model on the meta device: shapes and names alone."""
        return self.task.backbone(self.model, meta=True, trust_remote_code=place.trust_remote_code)


def check_tasks(sweep: Sweep, place: Place) -> list[CheckedTask]:
    """Load every task's data and find every model, in the order of `task_cells`. Raises InputError."""
    device_of(place)
    for name, method in method_cells(sweep) if place.gradient_checkpointing else ():
        if not method.repeatable_blocks:
            raise InputError(f"--gradient-checkpointing: '{name}' hands values from block to block: leave it out", name)
    checked = []
    for name, task in task_cells(sweep):
        model = model_of(sweep, task)
        try:
            data = data_of(task, place.data_root, sweep.limits, model)
        except InputError as error:
            raise InputError(f"task '{name}': {error}", error.mention) from None
        if place.gradient_checkpointing:
            try:
                task.backbone(model, meta=True, trust_remote_code=place.trust_remote_code).checkpoint_activations()
            except InputError as error:
                raise InputError(f"--gradient-checkpointing: task '{name}': {error}", name) from None
        of_model = task.model_fingerprint(model, trust_remote_code=place.trust_remote_code)
        fingerprints = Fingerprints(data.splits.fingerprint, of_model)
        found = CheckedTask(name, task, model, data, fingerprints)
        if place.forgetting is not None:
            module = found.meta_backbone(place).module
            task.text_windows(place.forgetting, place.forgetting_windows, module, model, place.data_root)
        checked.append(found)
    return checked


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


def at_start(method: Method, backbone: Backbone, train: TrainSpec, num_examples: int) -> Finished:
    """What a run of `num_examples` training rows starts with, from shapes alone. `backbone`: as in `preview`."""
    adaptation = method.start(backbone, train, _Undrawn(num_examples), torch.Generator().manual_seed(0))
    return Finished(adaptation.ranks(), Sizes(adaptation).parameters())


def preview(method: Method, backbone: Backbone, train: TrainSpec, num_examples: int) -> ParameterCount:
    """The counts at the start of a run of `num_examples` training rows, from shapes alone. `backbone`: a new one on the
    meta device, which the method adapts."""
    count = at_start(method, backbone, train, num_examples).parameters
    assert count is not None
    return count


class _Undrawn:
    """Training data for a dry run, which must not draw any."""

    def __init__(self, size: int) -> None:
        self.size = size

    def draw(self, stream: str) -> tuple[int, ...]:
        raise RuntimeError("a method drew data on the meta device, where nothing is trained")
