"""What an answer costs: seconds a generated token, of the untouched backbone and of the trained model."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn

from harness.method import Backbone
from harness.record.record import Generation
from harness.run.data import Data
from harness.run.prediction import in_evaluation, rows_at_once
from harness.run.training import to_device
from harness.spec import RunSpec
from harness.task import Task

TOKENS = 32  # of each row, or as many as the task's longest answer has
REPEATS = 3  # after one that is not counted


class GeneratedTokens:
    """The untouched backbone's seconds a token, on one batch of the first evaluation split. It measures nothing where
    the task generates nothing, or the run is a trial."""

    def __init__(self, spec: RunSpec, task: Task, data: Data, backbone: Backbone, device: torch.device) -> None:
        self._spec, self._task, self._device = spec, task, device
        self._batch: Any = None
        self._tokens = min(TOKENS, task.longest_answer)
        if self._tokens and not spec.is_trial:
            split, rows = next(iter(data.splits.evaluation.items()))
            self._rows = min(rows_at_once(spec.train, spec.place.evaluation_batch_size), len(rows))
            self._batch = to_device(task.collate(data.encoded(split), list(range(self._rows)), None), device)
            self._untouched = self._seconds(backbone.module)

    def measured(self, model: nn.Module) -> Generation | None:
        """The record's field of the trained model."""
        if self._batch is None:
            return None
        seconds = self._seconds(model)
        return Generation(rows=self._rows, tokens=self._tokens, untouched=self._untouched, trained=seconds)

    def _seconds(self, model: nn.Module) -> float:
        with in_evaluation(model, self._spec.train, self._device):
            times = [self._timed(model) for _ in range(REPEATS + 1)]
        return statistics.median(times[1:]) / (self._rows * self._tokens)

    def _timed(self, model: nn.Module) -> float:
        started = time.perf_counter()
        self._task.generate(model, self._batch, self._tokens)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - started
