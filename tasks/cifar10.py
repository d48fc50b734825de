"""CIFAR-10 with a convolutional network of transformers (a ResNet) and a new head."""

from __future__ import annotations

from typing import ClassVar

from harness.task import Examples
from tasks.hub import read_split
from tasks.images import ImageClassification

REPOSITORY, CONFIGURATION = "uoft-cs/cifar10", "plain_text"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32  # pixels


class Cifar10(ImageClassification):
    """CIFAR-10, ten classes of small photographs, scored on the test set.

    Images are augmented at 32 x 32 and then resized to `image_size`. With batch_norm=frozen every method changes the
    pretrained backbone by its adapter alone.
    """

    default_model: ClassVar[str | None] = "microsoft/resnet-50"
    capabilities: ClassVar[tuple[str, ...]] = ("image", "conv2d")

    @property
    def num_labels(self) -> int:
        return len(CLASSES)

    @property
    def class_names(self) -> tuple[str, ...]:
        return CLASSES

    def load(self, data_root: str | None) -> tuple[Examples, dict[str, Examples]]:
        return self._split("train", data_root), {"test": self._split("test", data_root)}

    def _split(self, split: str, data_root: str | None) -> Examples:
        rows = read_split(REPOSITORY, CONFIGURATION, split, ("img", "label"), data_root)
        return Examples({"image": rows.images("img", SIDE)}, rows.classes("label", CLASSES))
