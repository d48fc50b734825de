"""Classification of images with a convolutional network of transformers and a new head."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from harness.errors import InputError
from harness.task import Batch, Classification, Examples
from tasks import pretrained

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from harness.method import Backbone

PADDING_SHARE = 8  # crops are of images padded by an eighth of their side: 4 pixels of 32
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class EncodedImages:
    """images: uint8 (rows, side, side, 3); mean and std: (3,), of the channels in [0, 1]."""

    images: np.ndarray
    labels: np.ndarray
    mean: np.ndarray
    std: np.ndarray


class ImageClassification(Classification):
    """Abstract base of tasks on square images: the column "image" of their Examples, uint8 (rows, side, side, 3)."""

    version: ClassVar[int] = 2

    image_size: int = Field(64, ge=32, le=512, description="pixels a side that images are resized to for the model")
    augment: bool = Field(True, description="train on random crops (an eighth of padding) and horizontal flips")
    batch_norm: Literal["frozen", "updated"] = Field(
        "frozen",
        description="statistics in training: those of the pretrained backbone, or each batch's, which update them",
    )

    @property
    @abstractmethod
    def num_labels(self) -> int:
        """Number of classes."""

    def model_fingerprint(self, model: str | None, *, trust_remote_code: bool = False) -> str:
        return pretrained.fingerprint(self.model_name(model), trust_remote_code=trust_remote_code)

    def backbone(self, model: str | None, *, meta: bool = False, trust_remote_code: bool = False) -> Backbone:
        return pretrained.load_backbone(
            self.model_name(model),
            "AutoModelForImageClassification",
            self.num_labels,
            meta=meta,
            trust_remote_code=trust_remote_code,
        )

    def encode(self, examples: Examples, model: str | None) -> EncodedImages:
        """The images as they are, and the normalisation that the model was trained with."""
        import numpy as np

        mean, std = (np.array(values, dtype=np.float32) for values in normalisation(self.model_name(model)))
        return EncodedImages(np.asarray(examples.columns["image"]), examples.labels, mean, std)

    def collate(self, encoded: EncodedImages, rows: Sequence[int], generator: torch.Generator | None) -> Batch:
        """`pixel_values` (rows, 3, image_size, image_size), float32, normalised; labels int64."""
        import numpy as np
        import torch
        from torch.nn.functional import interpolate

        chosen = np.asarray(rows)
        images = torch.from_numpy(encoded.images[chosen])
        if self.augment and generator is not None:
            images = cropped_and_flipped(images, generator)
        mean, std = torch.tensor(encoded.mean), torch.tensor(encoded.std)
        pixels = ((images / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
        size = (self.image_size, self.image_size)
        if pixels.shape[2:] != size:
            pixels = interpolate(pixels, size=size, mode="bilinear", align_corners=False)
        return Batch({"pixel_values": pixels}, torch.from_numpy(encoded.labels[chosen]))

    def set_training(self, model: nn.Module) -> None:
        """Training mode; BatchNorm layers as `batch_norm` says. Their scales and shifts are ordinary parameters."""
        from torch.nn.modules.batchnorm import _BatchNorm

        model.train()
        if self.batch_norm == "frozen":
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()


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
    """A random window of each padded image, of its old size and mirrored with probability 1/2; uint8 (rows, side,
    side, 3)."""
    import torch
    from torch.nn.functional import pad

    count, side = images.shape[:2]
    padding = side // PADDING_SHARE
    corners = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand((count, 1), generator=generator) < 0.5
    window = torch.arange(side)
    down, across = corners[0] + window, corners[1] + torch.where(mirrored, window.flip(0), window)
    padded = pad(images, (0, 0, *[padding] * 4))
    return padded[torch.arange(count)[:, None, None], down[:, :, None], across[:, None, :]]
