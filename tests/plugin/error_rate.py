"""A task with a metric of its own, in one file: it declares the metric, and tables, search and tests know its sense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.method import Backbone
from harness.metric import mean_of
from harness.task import Batch, Classification, Examples

if TYPE_CHECKING:
    import torch

ROWS, FEATURES = 240, 12
ERROR_RATE = mean_of("error_rate", lambda p, r: p != r, higher_is_better=False, right_or_wrong=True)


class Halfspace(Classification):
    """Points on two sides of a plane, for a network of two layers; the score is the error rate."""

    measures = (ERROR_RATE,)

    def load(self, data_root: str | None) -> tuple[Examples, dict[str, Examples]]:
        """See `Task.load`. A tenth of the labels is turned, so that no method has all of them right."""
        import numpy as np

        generator = np.random.default_rng(0)
        points = generator.standard_normal((ROWS, FEATURES)).astype(np.float32)
        labels = (points.sum(axis=1) > 0) != (generator.random(ROWS) < 0.1)
        rows = Examples({"points": points}, labels.astype(np.int64))
        return rows.select(np.arange(ROWS // 2)), {"test": rows.select(np.arange(ROWS // 2, ROWS))}

    def backbone(self, model: str | None, *, meta: bool = False, trust_remote_code: bool = False) -> Backbone:
        """See `Task.backbone`."""
        import torch

        with torch.device("meta" if meta else "cpu"):
            module = _network()
        return Backbone(module, head=("classifier",), layers=("hidden",))

    def collate(self, encoded: Any, rows: Sequence[int], generator: torch.Generator | None) -> Batch:
        """See `Task.collate`."""
        import torch

        points = torch.from_numpy(encoded.columns["points"][list(rows)])
        return Batch({"points": points}, torch.from_numpy(encoded.labels[list(rows)]))


def _network() -> torch.nn.Module:
    from types import SimpleNamespace

    from torch import nn

    class Network(nn.Module):
        """Returns an object with `logits` (rows, 2)."""

        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Linear(FEATURES, 16)
            self.classifier = nn.Linear(16, 2)

        def forward(self, points: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.classifier(self.hidden(points).relu()))

    return Network()
