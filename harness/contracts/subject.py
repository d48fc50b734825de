"""What a contract is tried on, and the run that it is tried with."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch

from harness import registry
from harness.method import Adaptation, Backbone, Method
from harness.notation import parse_choice
from harness.plan.sweep import Fingerprints, Sweep, model_of
from harness.plan.sweep import spec_of as spec_of_cell
from harness.run.streams import TrainingData, seed_everything
from harness.run.training import Training
from harness.spec import Place, RunSpec, TrainSpec
from harness.splits import make_splits
from harness.task import Task

CPU = torch.device("cpu")


@dataclass
class Subject:
    """What a contract is tried on: a method or task as the command line names it ("lora[rank=4]"), and a folder."""

    name: str
    folder: Path
    task: str = "synthetic"
    method: str = "head"  # the method a task is tried with
    batches: int = 24
    place: Place = field(default_factory=Place)


@dataclass
class Started:
    """A method that was started on a task's backbone."""

    method: Method
    task: Task
    before: Backbone  # a copy from before the method touched it
    adaptation: Adaptation
    training: Training


def start(subject: Subject, seed: int = 0, batches: int | None = None) -> Started:
    """Start the subject's method as `run_one` would, on the CPU with one thread."""
    torch.set_num_threads(1)
    method, task = method_of(subject.name), task_of(subject.task)
    splits = make_splits(task, subject.place.data_root, None)
    train = TrainSpec(batches=batches or subject.batches, batch_size=8, warmup=0.0, schedule="constant")
    model = subject.place.model or task.default_model
    seed_everything(seed)
    backbone = task.backbone(model)
    before = copy.deepcopy(backbone)
    data = TrainingData(len(splits.train), train.batch_size, seed, upper_share=method.upper_share)
    adaptation = method.start(backbone, train, data, torch.Generator().manual_seed(seed))
    encoded = task.encode(splits.train, model)
    assert train.batches is not None
    training = Training(adaptation, task, encoded, data, train, CPU, train.batches)
    task.set_training(adaptation.model)
    return Started(method, task, before, adaptation, training)


def spec_of(subject: Subject, task: str | None = None, method: str | None = None) -> RunSpec:
    """A short run of a method on a task, both as the command line names them."""
    method_name, parameters = parse_choice(method or subject.name)
    task_name, task_parameters = parse_choice(task or subject.task)
    chosen, problem = registry.make_method(method_name, parameters), registry.make_task(task_name, task_parameters)
    sweep = Sweep(model=subject.place.model, train=TrainSpec(batches=subject.batches, batch_size=8))
    found = Fingerprints(
        make_splits(problem, subject.place.data_root, None).fingerprint,
        problem.model_fingerprint(model_of(sweep, problem)),
    )
    return spec_of_cell(sweep, subject.place, (method_name, chosen), (task_name, problem), found)


def method_of(text: str) -> Method:
    """The method that the command line would make of `text`."""
    return registry.make_method(*parse_choice(text))


def task_of(text: str) -> Task:
    """The task that the command line would make of `text`."""
    return registry.make_task(*parse_choice(text))
