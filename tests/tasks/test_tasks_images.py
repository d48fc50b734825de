"""CIFAR-10 and the digits: pixels, augmentation, frozen BatchNorm statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from harness.splits import make_splits
from tasks.cifar10 import Cifar10
from tasks.digits import Digits
from tasks.images import cropped_and_flipped
from tests.support import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tiny.write_all(tmp_path_factory.mktemp("tiny"))


def test_cifar10_images(place):
    model = str(place / "resnet")
    plain = Cifar10(image_size=64, augment=False)
    splits = make_splits(plain, str(place / "data"))
    encoded = plain.encode(splits.train, model)
    assert encoded.images.dtype == np.uint8
    batch = plain.collate(encoded, (0, 1), torch.Generator().manual_seed(0))
    assert batch.inputs["pixel_values"].shape == (2, 3, 64, 64)
    small = Cifar10(image_size=32, augment=False).collate(encoded, (0,), None).inputs["pixel_values"][0]
    raw = torch.from_numpy(splits.train.columns["image"][0]).permute(2, 0, 1) / 255
    assert torch.allclose(small, (raw - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / 0.2, atol=1e-6)


def test_cifar10_augmentation_follows_the_generator_and_is_off_in_evaluations(place):
    task, model = Cifar10(image_size=32), str(place / "resnet")
    encoded = task.encode(make_splits(task, str(place / "data")).train, model)

    def pixels(seed: int | None) -> torch.Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return task.collate(encoded, range(16), generator).inputs["pixel_values"]

    assert torch.equal(pixels(1), pixels(1))
    assert not torch.equal(pixels(1), pixels(2))
    plain = Cifar10(image_size=32, augment=False).collate(encoded, range(16), None).inputs["pixel_values"]
    assert torch.equal(pixels(None), plain)


def test_crops_are_windows_of_the_padded_image_mirrored_or_not():
    images = torch.arange(1, 32 * 32 + 1).reshape(1, 32, 32, 1).expand(40, 32, 32, 3)
    padded = torch.nn.functional.pad(images[0], (0, 0, 4, 4, 4, 4))
    windows = {tuple(padded[y : y + 32, x : x + 32].flatten().tolist()) for y in range(9) for x in range(9)}
    crops = cropped_and_flipped(images, torch.Generator().manual_seed(0))
    mirrored = 0
    for crop in crops:
        straight = tuple(crop.flatten().tolist()) in windows
        assert straight or tuple(crop.flip(1).flatten().tolist()) in windows
        mirrored += not straight
    assert 8 <= mirrored <= 32  # about half of 40


def test_batch_norm_statistics_are_frozen_in_training(place):
    task, model = Cifar10(image_size=32), str(place / "resnet")
    encoded = task.encode(make_splits(task, str(place / "data")).train, model)
    module = task.backbone(model).module
    task.set_training(module)
    before = {name: value.clone() for name, value in module.named_buffers()}
    task.loss(module, task.collate(encoded, range(8), None), None).backward()
    assert module.training
    assert all(torch.equal(before[name], value) for name, value in module.named_buffers())
    assert all(type(module.get_submodule(layer)).__name__ == "Conv2d" for layer in task.backbone(model).layers)


def test_digits_are_stratified_and_small():
    train, evaluation = Digits().load(None)
    assert (len(train), len(evaluation["validation"])) == (1437, 360)
    assert np.bincount(evaluation["validation"].labels).min() >= 34
    backbone = Digits().backbone(None)
    assert (backbone.head, backbone.layers) == (("classifier",), ("first", "second"))
