"""scikit-learn's handwritten digits with a small classifier: no download and seconds a run, for smoke tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from harness.method import Backbone
from harness.task import Batch, Classification, Examples

if TYPE_CHECKING:
    import torch
    from torch import nn

SIDE, CLASSES, WIDTH = 8, 10, 64
BRIGHTEST = 16.0  # pixels are 0 to 16
EVALUATION_SHARE = 0.2


class Digits(Classification):
    """Handwritten digits (8 x 8 pixels) with a built-in, untrained network of three linear layers; for smoke tests."""

    capabilities: ClassVar[tuple[str, ...]] = ("image",)

    def load(self, data_root: str | None) -> tuple[Examples, dict[str, Examples]]:
        """Stratified by digit, the same rows every time. scikit-learn carries the data; `data_root` is not used."""
        import numpy as np
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        examples = Examples({"pixels": (pixels / BRIGHTEST).astype(np.float32)}, labels.astype(np.int64))
        train, evaluation = train_test_split(
            np.arange(len(labels)), test_size=EVALUATION_SHARE, random_state=0, stratify=labels
        )
        return examples.select(np.sort(train)), {"validation": examples.select(np.sort(evaluation))}

    def backbone(self, model: str | None, *, meta: bool = False, trust_remote_code: bool = False) -> Backbone:
        """Linear layers 64 -> 64 -> 64 -> 10; the last is the head. `model` is not used."""
        import torch

        with torch.device("meta" if meta else "cpu"):
            module = _classifier()
        return Backbone(module, head=("classifier",), layers=("first", "second"))

    def collate(self, encoded: Examples, rows: Sequence[int], generator: torch.Generator | None) -> Batch:
        """`pixels` (rows, 64), float32 in [0, 1]; labels int64."""
        import numpy as np
        import torch

        chosen = np.asarray(rows)
        pixels = torch.from_numpy(np.asarray(encoded.columns["pixels"])[chosen])
        return Batch({"pixels": pixels}, torch.from_numpy(encoded.labels[chosen]))


def _classifier() -> nn.Module:
    """The network, its class made at first use because importing torch takes a second."""
    from types import SimpleNamespace

    import torch
    from torch import nn

    class DigitsClassifier(nn.Module):
        """Returns an object with `logits` (rows, 10), as the models of transformers do."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(SIDE * SIDE, WIDTH)
            self.second = nn.Linear(WIDTH, WIDTH)
            self.classifier = nn.Linear(WIDTH, CLASSES)

        def forward(self, pixels: torch.Tensor) -> SimpleNamespace:
            hidden = torch.relu(self.second(torch.relu(self.first(pixels))))
            return SimpleNamespace(logits=self.classifier(hidden))

    return DigitsClassifier()
