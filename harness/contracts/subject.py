"""What a contract is tried on, and the run that it is tried with."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness import registry
from harness.method import Adaptation, Backbone, Method, in_modules
from harness.notation import parse_choice
from harness.plan.sweep import Fingerprints, Sweep, model_of
from harness.plan.sweep import spec_of as spec_of_cell
from harness.run.streams import TrainingData, seed_everything
from harness.run.training import Training, to_device
from harness.spec import Place, RunSpec, TrainSpec
from harness.splits import make_splits
from harness.task import Batch, Task

CPU = torch.device("cpu")


@dataclass
class Subject:
    """What a contract is tried on: a method or task as the command line names it ("lora[rank=4]"), and a folder.

    device: where methods are tried. backbone_dtype: of the backbone's weights but for the head, which stays float32.
    """

    name: str
    folder: Path
    task: str | Task = "synthetic"
    method: str = "head"  # the method a task is tried with
    batches: int = 24
    place: Place = field(default_factory=Place)
    batch_size: int = 8
    device: str = "cpu"
    backbone_dtype: torch.dtype = torch.float32

    def made_task(self) -> Task:
        """The task, where it is named as the command line names it."""
        return self.task if isinstance(self.task, Task) else task_of(self.task)

    @property
    def tolerance(self) -> float:
        """How far outputs may be apart that are equal but for rounding: on the CPU sums are made in one order."""
        if self.backbone_dtype != torch.float32:
            return 2e-2
        return 1e-6 if self.device == "cpu" else 1e-5


@dataclass
class Started:
    """A method that was started on a task's backbone."""

    method: Method
    task: Task
    before: Backbone  # a copy from before the method touched it
    adaptation: Adaptation
    training: Training

    def batch(self, rows: range) -> Batch:
        """Rows of the training split, on the model's device."""
        return to_device(self.task.collate(self.training.encoded, rows, None), self.training.device)


def start(subject: Subject, seed: int = 0, batches: int | None = None) -> Started:
    """Start the subject's method as `run_one` would, with one thread of the CPU."""
    torch.set_num_threads(1)
    method, task, device = method_of(subject.name), subject.made_task(), torch.device(subject.device)
    splits = make_splits(task, subject.place.data_root)
    train = TrainSpec(
        batches=batches or subject.batches, batch_size=subject.batch_size, warmup=0.0, schedule="constant"
    )
    model = subject.place.model or task.default_model
    seed_everything(seed)
    backbone = task.backbone(model)
    lower_precision(backbone, subject.backbone_dtype)
    backbone.module.to(device)
    before = copy.deepcopy(backbone)
    data = TrainingData(len(splits.train), train.batch_size, seed, upper_share=method.upper_share)
    adaptation = method.start(backbone, train, data, torch.Generator().manual_seed(seed))
    if subject.place.gradient_checkpointing:
        backbone.checkpoint_activations()
    encoded = task.encode(splits.train, model)
    assert train.batches is not None
    training = Training(adaptation, task, encoded, data, train, device, train.batches)
    task.set_training(adaptation.model)
    return Started(method, task, before, adaptation, training)


class _Interrupted(Exception):
    """Raised between two updates."""


def one_update(training: Training) -> None:
    """The next update of a run, as the loop makes it."""

    def interrupt(training: Training) -> None:
        raise _Interrupted

    with contextlib.suppress(_Interrupted):
        training.run(interrupt)


def spec_of(subject: Subject, task: str | None = None, method: str | None = None) -> RunSpec:
    """A short run of a method on a task, both as the command line names them."""
    method_name, parameters = parse_choice(method or subject.name)
    if not isinstance(named := task or subject.task, str):
        raise TypeError(f"a run's task is named, and this is {named!r}")
    task_name, task_parameters = parse_choice(named)
    chosen, problem = registry.make_method(method_name, parameters), registry.make_task(task_name, task_parameters)
    sweep = Sweep(model=subject.place.model, train=TrainSpec(batches=subject.batches, batch_size=subject.batch_size))
    place = subject.place.model_copy(update={"device": subject.device})
    found = Fingerprints(
        make_splits(problem, subject.place.data_root).fingerprint,
        problem.model_fingerprint(model_of(sweep, problem)),
    )
    return spec_of_cell(sweep, place, (method_name, chosen), (task_name, problem), found)


def lower_precision(backbone: Backbone, dtype: torch.dtype) -> None:
    """Hold the backbone's weights in `dtype`, in place. The head stays as it is and casts what it gets."""
    for name, parameter in backbone.module.named_parameters():
        if not in_modules(name, backbone.head):
            parameter.data = parameter.data.to(dtype)
    if dtype != torch.float32:
        for name in backbone.head:
            backbone.module.get_submodule(name).register_forward_pre_hook(_cast)


def _cast(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Floating-point inputs in the precision of the layer's parameters."""
    dtype = next(layer.parameters()).dtype
    return tuple(x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def method_of(text: str) -> Method:
    """The method that the command line would make of `text`."""
    return registry.make_method(*parse_choice(text))


def task_of(text: str) -> Task:
    """The task that the command line would make of `text`."""
    return registry.make_task(*parse_choice(text))
