"""CIFAR-10 with a convolutional network of transformers (a ResNet) and a new head."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from harness.errors import InputError
from harness.task import Batch, Classification, Examples
from tasks import pretrained
from tasks.hub import read_split

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from harness.method import Backbone

REPOSITORY, CONFIGURATION = "uoft-cs/cifar10", "plain_text"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32  # pixels
CROP_PADDING = 4  # pixels
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class EncodedImages:
    """images: uint8 (rows, 32, 32, 3); mean and std: (3,), of the channels in [0, 1]."""

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor


class Cifar10(Classification):
    """CIFAR-10, ten classes of small photographs, scored on the test set.

    In training mode BatchNorm layers stay in evaluation mode: the statistics of the pretrained backbone are kept, so
    that every method changes it by its adapter alone. Their scales and shifts are ordinary parameters.
    """

    default_model: ClassVar[str | None] = "microsoft/resnet-50"
    capabilities: ClassVar[tuple[str, ...]] = ("image", "conv2d")

    image_size: int = Field(64, ge=32, le=512, description="pixels a side that images are resized to for the model")
    augment: bool = Field(True, description="train on random crops (4 pixels of padding) and horizontal flips")

    def load(self, data_root: str | None) -> tuple[Examples, dict[str, Examples]]:
        return self._split("train", data_root), {"test": self._split("test", data_root)}

    def _split(self, split: str, data_root: str | None) -> Examples:
        rows = read_split(REPOSITORY, CONFIGURATION, split, ("img", "label"), data_root)
        return Examples({"image": rows.images("img", SIDE)}, rows.classes("label", CLASSES))

    def model_fingerprint(self, model: str | None) -> str:
        return pretrained.fingerprint(self._model(model))

    def backbone(self, model: str | None, *, meta: bool = False, trust_remote_code: bool = False) -> Backbone:
        return pretrained.load_backbone(
            self._model(model),
            "AutoModelForImageClassification",
            len(CLASSES),
            meta=meta,
            trust_remote_code=trust_remote_code,
        )

    def encode(self, examples: Examples, model: str | None) -> EncodedImages:
        """The images as they are, and the normalisation that the model was trained with."""
        import numpy as np
        import torch

        mean, std = normalisation(self._model(model))
        images = torch.from_numpy(np.asarray(examples.columns["image"]))
        return EncodedImages(images, torch.from_numpy(examples.labels), torch.tensor(mean), torch.tensor(std))

    def collate(self, encoded: EncodedImages, rows: Sequence[int], generator: torch.Generator | None) -> Batch:
        """`pixel_values` (rows, 3, image_size, image_size), float32, normalised; labels int64."""
        import torch
        from torch.nn.functional import interpolate

        chosen = torch.as_tensor(rows)
        images = encoded.images[chosen]
        if self.augment and generator is not None:
            images = cropped_and_flipped(images, generator)
        pixels = ((images / 255 - encoded.mean) / encoded.std).permute(0, 3, 1, 2).contiguous()
        if self.image_size != SIDE:
            size = (self.image_size, self.image_size)
            pixels = interpolate(pixels, size=size, mode="bilinear", align_corners=False)
        return Batch({"pixel_values": pixels}, encoded.labels[chosen])

    def set_training(self, model: nn.Module) -> None:
        """Training mode, but BatchNorm's statistics stay those of the pretrained backbone."""
        from torch.nn.modules.batchnorm import _BatchNorm

        model.train()
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()

    def _model(self, model: str | None) -> str:
        assert self.default_model is not None
        return model or self.default_model


def normalisation(model: str) -> tuple[list[float], list[float]]:
    """(mean, std) of the three channels from the model's preprocessor_config.json, else ImageNet's.

    Raises InputError for a file that does not hold them as three numbers each.
    """
    path = pretrained.model_folder(model) / "preprocessor_config.json"
    if not path.is_file():
        return list(IMAGENET_MEAN), list(IMAGENET_STD)
    try:
        settings = json.loads(path.read_text())
        mean = [float(value) for value in settings.get("image_mean", IMAGENET_MEAN)]
        std = [float(value) for value in settings.get("image_std", IMAGENET_STD)]
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"'{path}' is damaged ({error})") from None
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise InputError(f"'{path}': image_mean = {mean}, image_std = {std}; three numbers each, std above 0")
    return mean, std


def cropped_and_flipped(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random 32 x 32 window of each padded image, mirrored with probability 1/2; uint8 (rows, 32, 32, 3)."""
    import torch
    from torch.nn.functional import pad

    count = len(images)
    corners = torch.randint(0, 2 * CROP_PADDING + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand((count, 1), generator=generator) < 0.5
    window = torch.arange(SIDE)
    down, across = corners[0] + window, corners[1] + torch.where(mirrored, window.flip(0), window)
    padded = pad(images, (0, 0, *[CROP_PADDING] * 4))
    return padded[torch.arange(count)[:, None, None], down[:, :, None], across[:, None, :]]
