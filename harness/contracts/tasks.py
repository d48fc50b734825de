"""What every task must keep to."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from harness.contracts.subject import CPU, Subject, spec_of, task_of
from harness.method import Adaptation, in_modules
from harness.plan.trial import difference
from harness.record.record import RunRecord
from harness.record.store import RecordStore
from harness.run.prediction import predict
from harness.run.run import run_one
from harness.run.streams import seed_everything
from harness.spec import Limits, TrainSpec
from harness.splits import make_splits
from harness.task import Task


def splits_are_the_same_every_time(subject: Subject) -> None:
    """Loading twice gives the same rows; a limit takes a part of them; no split is empty."""
    task = task_of(subject.name)
    first, second = (make_splits(task, subject.place.data_root) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    for one, two in ((first.train, second.train), (first.holdout, second.holdout)):
        assert len(one) > 0
        np.testing.assert_array_equal(one.labels, two.labels)
    limited = make_splits(task, subject.place.data_root, Limits(20))
    assert len(limited.train) + len(limited.holdout) <= 20
    assert all(len(examples) <= 20 for examples in limited.evaluation.values())
    assert limited.fingerprint == first.fingerprint


def train_and_holdout_share_no_group(subject: Subject) -> None:
    """Rows that belong together are on one side."""
    splits = make_splits(task_of(subject.name), subject.place.data_root)
    if splits.train.groups is not None and splits.holdout.groups is not None:
        assert not set(splits.train.groups.tolist()) & set(splits.holdout.groups.tolist())


def labels_never_go_into_the_model(subject: Subject) -> None:
    """No input of the model is called, or holds, the labels; batches are deterministic at one generator seed."""
    task, encoded = _encoded(subject)
    one, two = (task.collate(encoded, range(4), torch.Generator().manual_seed(3)) for _ in range(2))
    assert not {"label", "labels", "target", "targets"} & one.inputs.keys()
    assert len(one.labels) == 4
    for name, value in one.inputs.items():
        assert torch.equal(value, two.inputs[name])


def shapes_on_the_meta_device_are_the_real_ones(subject: Subject) -> None:
    """A dry run sees the layers, head and sizes that a real run has."""
    task = task_of(subject.name)
    model = subject.place.model or task.default_model
    real, meta = task.backbone(model), task.backbone(model, meta=True)
    assert (real.head, real.layers) == (meta.head, meta.layers)
    shapes = [{name: p.shape for name, p in backbone.module.named_parameters()} for backbone in (real, meta)]
    assert shapes[0] == shapes[1]
    assert all(p.is_meta for p in meta.module.parameters())
    assert not any(in_modules(f"{layer}.weight", real.head) for layer in real.layers)


def the_head_is_the_same_for_every_method(subject: Subject) -> None:
    """At one seed the new parameters are equal, whoever asks."""
    task = task_of(subject.name)
    model = subject.place.model or task.default_model
    heads = []
    for _ in range(2):
        seed_everything(5)
        heads.append(dict(task.backbone(model).head_parameters()))
    for name, value in heads[0].items():
        assert torch.equal(value, heads[1][name])


def loss_and_predictions_fit_the_metrics(subject: Subject) -> None:
    """The loss is a finite scalar with a gradient; true labels score at least as well as predictions."""
    task, encoded = _encoded(subject)
    model = subject.place.model or task.default_model
    backbone = task.backbone(model)
    task.set_training(backbone.module)
    generator = torch.Generator().manual_seed(0)
    loss = task.loss(backbone.module, task.collate(encoded, range(4), generator), generator)
    assert loss.shape == ()
    assert torch.isfinite(loss)
    loss.backward()
    trained = [p for _, p in backbone.head_parameters()] or list(backbone.module.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    splits = make_splits(task, subject.place.data_root, Limits(20))
    adaptation = Adaptation(backbone.module, torch.optim.SGD(backbone.module.parameters()), backbone)
    encoded = task.encode(splits.train, model)
    references = task.gold(splits.train, encoded)
    predictions = predict(adaptation, task, encoded, references, TrainSpec(batch_size=4), CPU)
    assert predictions.shape[0] == len(references)
    found, best = task.metrics(predictions, references), task.metrics(references, references)
    assert found.keys() == best.keys()
    assert task.headline in found
    assert all(isinstance(value, float) and math.isfinite(value) for value in found.values())
    better = best[task.headline] - found[task.headline]
    assert (better if task.higher_is_better else -better) >= 0
    json.dumps(found)
    _check_parts(task, predictions, references, found)


def _check_parts(task: Task, predictions: np.ndarray, references: np.ndarray, found: Mapping[str, float]) -> None:
    """The parts of a metric, where it has them and these predictions are of its kind, make its value."""
    for metric in task.reported:
        if metric.parts is not None and metric.of_sums is not None:
            with contextlib.suppress(ValueError):
                parts = metric.parts(predictions, references)
                assert parts.ndim == 2
                assert (parts[:, 0] == 1).all()
                assert abs(float(metric.of_sums(parts.sum(axis=0))) - found[metric.name]) <= 1e-6, metric.name


def a_row_does_not_depend_on_the_rows_beside_it(subject: Subject) -> None:
    """Where a batch pads rows: the model says of a row in it what it says of the row alone."""
    task, encoded = _encoded(subject)
    lengths = task.lengths(encoded)
    if lengths is None:
        return
    module = task.backbone(subject.place.model or task.default_model).module
    found = difference(task, module, encoded, range(min(8, len(lengths))), TrainSpec())
    assert found is None or found.reason is None, f"they differ by {found.largest}: {found.reason}"


def a_run_on_it_gives_a_record(subject: Subject) -> None:
    """run_one with the subject's method ends with a valid record that is on disk."""
    store = RecordStore(subject.folder)
    store.make_ready()
    record = run_one(spec_of(subject, task=subject.name, method=subject.method), store)
    assert record.status == "done", record.traceback
    assert RunRecord.model_validate_json(record.model_dump_json()) == store.read(record.run_id)
    assert record.score == record.metrics[record.headline]


TASK_CONTRACTS = (
    splits_are_the_same_every_time,
    train_and_holdout_share_no_group,
    labels_never_go_into_the_model,
    shapes_on_the_meta_device_are_the_real_ones,
    the_head_is_the_same_for_every_method,
    loss_and_predictions_fit_the_metrics,
    a_row_does_not_depend_on_the_rows_beside_it,
    a_run_on_it_gives_a_record,
)


def _encoded(subject: Subject) -> tuple[Task, Any]:
    task = task_of(subject.name)
    splits = make_splits(task, subject.place.data_root, Limits(20))
    return task, task.encode(splits.train, subject.place.model or task.default_model)
