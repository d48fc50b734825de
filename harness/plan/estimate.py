"""How long a plan will take: from finished runs, else from a few updates of one run a method."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch

from harness import registry
from harness.notation import duration
from harness.record.environment import device_of
from harness.record.store import RecordStore
from harness.run.data import data_of
from harness.run.streams import TrainingData
from harness.run.training import Training
from harness.spec import RunSpec

TIMED_UPDATES = 3  # after one that is not counted
LONGEST_SECONDS = 10.0  # of a timing, but for an update that takes longer


class Kind(NamedTuple):
    """Runs that take about as long a batch."""

    method: str
    task: str
    model: str
    settings: str  # of the task, the precision, gradient checkpointing
    batch_size: int
    threads: int


def lines(specs: Sequence[RunSpec], store: RecordStore) -> list[str]:
    """What to say of the time that these runs take."""
    known = _finished(store)
    seconds: dict[Kind, float | None] = {}
    told = []
    for spec in specs:
        kind = _kind(spec)
        if kind in seconds:
            continue
        like = [other for other in seconds if other._replace(task=kind.task, settings=kind.settings) == kind]
        if kind in known:
            seconds[kind] = sum(known[kind]) / len(known[kind])
            how = f"finished runs: {len(known[kind])}"
        elif like:  # one timing a method: on another task it takes about as long a batch
            seconds[kind] = seconds[like[0]]
            continue
        else:
            seconds[kind], how = _timed(spec)
        text = "unknown" if seconds[kind] is None else f"about {seconds[kind]:.3g} s a batch"
        told.append(f"time: {kind.method} on {kind.task}: {text} ({how})")
    total = 0.0
    for spec in specs:
        a_batch = seconds[_kind(spec)]
        if a_batch is None:
            return told
        total += a_batch * _batches(spec)
    return [*told, f"time: training takes about {duration(total)} in all, one run at a time"] if specs else []


def _finished(store: RecordStore) -> dict[Kind, list[float]]:
    """Seconds a batch of the runs in the store."""
    known: dict[Kind, list[float]] = defaultdict(list)
    for record in store.records():
        if record.status == "done" and record.batches:
            known[_kind(record.spec)].append(record.seconds.training / record.batches)
    return known


def _kind(spec: RunSpec) -> Kind:
    settings = [spec.task_parameters, spec.train.precision, spec.place.gradient_checkpointing]
    told = json.dumps(settings, sort_keys=True)
    return Kind(spec.method, spec.task, spec.model_fingerprint, told, spec.train.batch_size, spec.threads)


def _batches(spec: RunSpec) -> int:
    task = registry.task_of(spec)
    place = spec.place
    return spec.train.budget(len(data_of(task, place.data_root, spec.limits, place.model).splits.train))


def _timed(spec: RunSpec) -> tuple[float | None, str]:
    """Seconds a batch over a few updates of the run, and how they are known; None and why they are not."""
    try:
        return seconds_a_batch(spec), f"timed: {TIMED_UPDATES} updates"
    except Exception as error:  # no weights on this machine, too little memory: a dry run goes on
        return None, " ".join(f"not timed: {error}".split())[:200]


def seconds_a_batch(spec: RunSpec) -> float:
    """Timed over a few updates of the run, on its device."""
    torch.set_num_threads(spec.threads)
    task, place, device = registry.task_of(spec), spec.place, device_of(spec.place)
    data = data_of(task, place.data_root, spec.limits, place.model)
    method = registry.make_method(spec.method, spec.method_parameters)
    backbone = task.backbone(place.model, trust_remote_code=place.trust_remote_code)
    backbone.module.to(device)
    drawn = TrainingData(len(data.splits.train), spec.train.batch_size, spec.seed, None, method.upper_share)
    adaptation = method.start(backbone, spec.train, drawn, torch.Generator().manual_seed(spec.seed))
    if place.gradient_checkpointing:
        backbone.checkpoint_activations()
    training = Training(adaptation, task, data.encoded("train"), drawn, spec.train, device, _batches(spec))
    task.set_training(adaptation.model)
    training.update()
    training.fetch()  # waits for the device
    began, first = time.perf_counter(), training.used
    for _ in range(TIMED_UPDATES):
        if training.used < training.budget and time.perf_counter() - began < LONGEST_SECONDS:
            training.update()
            training.fetch()
    return (time.perf_counter() - began) / max(1, training.used - first)
