"""Predictions of a trained model for the rows of a split."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.method import Adaptation
from harness.run.training import autocast, to_device
from harness.spec import TrainSpec
from harness.task import Task


@contextmanager
def in_evaluation(model: nn.Module, train: TrainSpec, device: torch.device) -> Iterator[None]:
    """In evaluation mode, without gradients, in the precision of training; then in the mode from before."""
    was_training = model.training
    model.eval()
    with torch.no_grad(), autocast(train, device):
        yield
    model.train(was_training)


def rows_at_once(train: TrainSpec, batch_size: int | None) -> int:
    """Rows of an evaluation's batch; None: twice as many as in training."""
    return batch_size or 2 * train.batch_size


def predict(
    adaptation: Adaptation,
    task: Task,
    encoded: Any,
    references: np.ndarray,
    train: TrainSpec,
    device: torch.device,
    batch_size: int | None = None,
) -> np.ndarray:
    """Predictions for every row of a split, in evaluation mode, as a NumPy array whose first dimension is the rows.
    `batch_size`: see `rows_at_once`."""
    model, size = adaptation.model, rows_at_once(train, batch_size)
    lengths = task.lengths(encoded)
    order = np.arange(len(references)) if lengths is None else np.argsort(lengths, kind="stable")
    parts = []
    with in_evaluation(model, train, device):
        for rows in np.split(order, range(size, len(order), size)):
            parts.append(task.predict(model, to_device(task.collate(encoded, rows.tolist(), None), device)))
    task.set_training(model)
    predictions = _joined(parts).cpu()[torch.from_numpy(np.argsort(order))]
    return (predictions.float() if predictions.is_floating_point() else predictions).numpy()


def _joined(parts: list[Tensor]) -> Tensor:
    """The batches' rows, one after the other; shorter ones are filled up with -1."""
    width = max(part.shape[1] if part.dim() == 2 else 0 for part in parts)
    fill = torch.nn.functional.pad
    return torch.cat([fill(each, (0, width - each.shape[1]), value=-1) if each.dim() == 2 else each for each in parts])
