"""What is measured of the untouched backbone and again of the trained model: loss on a text, seconds a token."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from harness.method import Backbone
from harness.run.data import Data
from harness.run.forgetting import Sample
from harness.run.generation import GeneratedTokens
from harness.spec import RunSpec
from harness.task import Task


class BeforeAfter:
    """Made before the method touches the backbone."""

    def __init__(self, spec: RunSpec, task: Task, data: Data, backbone: Backbone, device: torch.device) -> None:
        self._sample = Sample(spec, task, backbone, device)
        self._tokens = GeneratedTokens(spec, task, data, backbone, device)

    def of(self, model: nn.Module, kept: dict[str, np.ndarray]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """(fields of the record, notes) of the trained model. Losses of the text's windows go into `kept`."""
        forgetting, notes = self._sample.forgotten(model, kept)
        return {"forgetting": forgetting, "generation": self._tokens.measured(model)}, notes
