"""Folders of images: what is a split, what a class, what is no image, and what is asked about."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.support.own_data import both_splits, task_of, told, write_photos


def task(folder: Path) -> object:
    return task_of(f"image:{folder}[image_size=32]")


def rows(folder: Path) -> dict[str, int]:
    train, evaluation = task(folder).load(None)
    return {"train": len(train), **{name: len(part) for name, part in evaluation.items()}}


@pytest.mark.parametrize(
    ("train", "other", "split"),
    [
        ("Train", "Test", "test"),
        ("TRAIN", "TEST", "test"),
        ("training_set", "test_set", "test"),
        ("training", "testing", "test"),
        ("train", "Val", "validation"),
        ("Training Data", "valid", "validation"),
        ("train", "dev", "validation"),
        ("train_images", "eval", "validation"),
        ("training_set/training_set", "test_set/test_set", "test"),
    ],
)
def test_names_of_splits(tmp_path, train, other, split):
    write_photos(tmp_path / train, 6)
    write_photos(tmp_path / other, 3)
    assert task(tmp_path).classes == ("cat", "dog")
    assert rows(tmp_path) == {"train": 12, split: 6}


@pytest.mark.parametrize("names", [("car", "plane", "train"), ("test", "train", "valley"), ("test", "toast")])
def test_a_class_may_have_the_name_of_a_split(tmp_path, names):
    write_photos(tmp_path, 10, names)
    assert task(tmp_path).classes == names
    assert sum(rows(tmp_path).values()) == 10 * len(names)


def test_bare_test_images_are_left_out_and_said(tmp_path):
    write_photos(tmp_path / "train", 10)
    write_photos(tmp_path, 5, ["test"])
    train, evaluation = task(tmp_path).load(None)
    assert {name: len(part) for name, part in evaluation.items()} == {"validation": 4}
    assert train.notes == ("'test' is left out, not scored on: it holds no folders of classes, so no labels",)


def test_what_is_not_clear_is_asked_about(tmp_path):
    for name, folders, pieces in (
        ("folds", ["fold1", "fold2"], ["'fold1', 'fold2' all hold the folders 'cat', 'dog'", "train/"]),
        ("mixed", ["train", "bird"], ["is 'train' a split or a class", "'bird'"]),
        ("nested", ["train/a", "train/b"], ["'a', 'b' all hold the folders 'cat', 'dog'"]),
        ("only", ["test"], ["'test', taken for splits, and no training split"]),
        ("twice", ["train", "Training"], ["both taken for the train split"]),
    ):
        for folder in folders:
            write_photos(tmp_path / name / folder, 4)
        with told(*pieces):
            task(tmp_path / name)
    write_photos(tmp_path / "bare", 4, ["train", "test"])
    with told("bare/train' is taken for the training split", "one folder a class"):
        task(tmp_path / "bare")
    (tmp_path / "bare/train/metadata.csv").write_text("file_name,label\n")
    with told("metadata.csv[image=file_name"):
        task(tmp_path / "bare")


def test_files_of_the_system_are_no_images_and_no_classes(tmp_path):
    write_photos(tmp_path, 10)
    for name in ("__MACOSX", "@eaDir", ".ipynb_checkpoints", "cat/.ipynb_checkpoints", "dog/@eaDir"):
        write_photos(tmp_path / name, 3)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png", ".hidden.png"):
        (tmp_path / "cat" / name).write_bytes(b"no image")
    train, evaluation = both_splits(task(tmp_path))
    assert (len(train) + len(evaluation), train.notes, train.left_out) == (20, (), ())


def test_images_of_any_suffix_are_read_and_what_is_none_is_counted(tmp_path):
    write_photos(tmp_path, 10)
    for n, name in enumerate(("a.jfif", "b.jpe", "c.avif", "d", "e.image", "f.JPG", "g.jp2")):
        kind = {"c.avif": "AVIF", "g.jp2": "JPEG2000"}.get(name, "JPEG")
        Image.new("RGB", (40, 40), (n, 0, 0)).save(tmp_path / "dog" / name, kind)
    for name in ("cat/a.txt", "cat/b.xml", "dog/c.txt"):
        (tmp_path / name).write_text("no image")
    write_photos(tmp_path, 10, ["horse"])
    for file in (tmp_path / "horse").iterdir():
        file.rename(file.with_suffix(".jfif"))  # what Pillow reads goes by the content
    train, evaluation = both_splits(task(tmp_path))
    assert task(tmp_path).classes == ("cat", "dog", "horse")
    assert len(train) + len(evaluation) == 37
    assert train.notes == ("left out: 3 files that are no images: 2 .txt, 1 .xml",)
    (tmp_path / "cat/x.heic").write_bytes(b"no image that can be read")
    with told("1 of 38 images cannot be read", "x.heic"):
        task(tmp_path).load(None)


def test_a_class_without_images_and_images_without_a_class(tmp_path):
    write_photos(tmp_path, 10)
    Image.new("RGB", (40, 40)).save(tmp_path / "stray.png")
    assert both_splits(task(tmp_path))[0].notes == ("left out: 1 files beside the folders of the classes: stray.png",)
    (tmp_path / "horse").mkdir()
    (tmp_path / "horse/a.xml").write_text("")
    with told("class folder", "horse' holds no images (it holds 1 .xml)"):
        task(tmp_path)
