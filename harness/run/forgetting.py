"""What a language model has forgotten: its loss on a fixed sample of text, before and after training."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

from harness.method import Backbone
from harness.record.record import FORGETTING, Forgetting
from harness.run.prediction import in_evaluation
from harness.spec import RunSpec
from harness.task import Task

AT_ONCE = 4  # windows in a forward pass, or as many as an evaluation's batch may have: the logits of one take 50 MB at
# a vocabulary of 50,000


class Sample:
    """The windows of a run's text sample, and the untouched backbone's losses on them. Without a sample, where the spec
    asks for none, the task has no causal language model, or the run is a trial, it measures nothing."""

    def __init__(self, spec: RunSpec, task: Task, backbone: Backbone, device: torch.device) -> None:
        self._spec, self._task, self._device = spec, task, device
        place = spec.place
        self._windows: np.ndarray | None = None
        if place.forgetting is not None and not spec.is_trial:
            count = place.forgetting_windows
            self._windows = task.text_windows(place.forgetting, count, backbone.module, place.model, place.data_root)
        self._untouched = self._losses(backbone.module)

    def forgotten(self, model: nn.Module, kept: dict[str, np.ndarray]) -> tuple[Forgetting | None, tuple[str, ...]]:
        """(the record's field of the trained model, notes); the losses of every window go into `kept`. Where one is not
        finite, as it may be in fp16, there is a note alone: the run's scores are what they are."""
        if self._windows is None:
            return None, ()
        trained = self._losses(model)
        for which, losses in (("untouched backbone", self._untouched), ("trained model", trained)):
            if not np.isfinite(losses).all():
                return None, (f"no forgetting: a loss of the {which} on the text sample is not finite",)
        kept |= {f"{FORGETTING}/predictions": trained, f"{FORGETTING}/references": self._untouched}
        number, tokens = self._windows.shape
        found = Forgetting(
            sample=Path(self._spec.place.forgetting or "").name,
            fingerprint=hashlib.sha256(self._windows.tobytes()).hexdigest()[:16],
            windows=number,
            tokens=tokens,
            untouched=float(self._untouched.mean()),
            trained=float(trained.mean()),
        )
        return found, ()

    def _losses(self, model: nn.Module) -> np.ndarray:
        """(windows,) mean loss of each window's tokens, in nats."""
        if self._windows is None:
            return np.empty(0)
        ids = torch.from_numpy(self._windows).to(self._device)
        at_once = min(AT_ONCE, self._spec.place.evaluation_batch_size or AT_ONCE)
        with in_evaluation(model, self._spec.train, self._device):
            losses = torch.cat([self._task.window_losses(model, some) for some in ids.split(at_once)])
        return losses.double().cpu().numpy()
