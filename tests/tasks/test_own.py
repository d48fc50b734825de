"""The user's own data: text:PATH and image:PATH, from files to records, and every mistake in them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from harness.cli import main
from harness.contracts import TASK_CONTRACTS, Subject
from harness.record.store import RecordStore
from harness.run import summary
from harness.spec import Place
from harness.splits import make_splits
from tasks import own, own_image
from tests.support import tiny
from tests.support.own_data import (
    both_splits,
    reviews,
    task_of,
    told,
    write_csv,
    write_jsonl,
    write_photos,
    write_table,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.write_bert(folder / "bert")
    tiny.write_resnet(folder / "resnet")
    return folder


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_of_every_kind_give_the_same_rows(tmp_path, kind):
    path = write_table(tmp_path / f"reviews.{kind}", reviews(60))
    task = task_of(f"text:{path}[text=review,label=stars]")
    assert (task.classes, task.headline, task.num_labels) == (("bad", "good", "odd"), "accuracy", 3)
    train, evaluation = both_splits(task)
    assert (len(train), len(evaluation)) == (48, 12)
    for examples in (train, evaluation):
        for text, label in zip(examples.columns["review"], examples.labels, strict=True):
            assert text.endswith(task.classes[label])
    reference = task_of(f"text:{write_table(tmp_path / 'other.csv', reviews(60))}[text=review,label=stars]")
    assert make_splits(task, None).fingerprint == make_splits(reference, None).fingerprint


@pytest.mark.parametrize(
    ("labels", "classes", "metric"),
    [
        (("no", "yes"), ("no", "yes"), "accuracy"),
        ((True, False), ("false", "true"), "accuracy"),
        ((10, 9, 2), ("2", "9", "10"), "accuracy"),  # by size, not by letter
        ((1.5, 0.25, 3.0), (), "pearson"),
    ],
)
def test_the_type_of_the_labels_decides(tmp_path, labels, classes, metric):
    path = write_table(tmp_path / "reviews.csv", reviews(40, labels))
    task = task_of(f"text:{path}[text=review,label=stars]")
    assert (task.classes, task.headline) == (classes, metric)
    train, _ = both_splits(task)
    assert train.labels.dtype == (np.int64 if classes else np.float64)
    found = task.metrics(train.labels, train.labels)
    assert next(iter(found)) == metric
    assert all(value == pytest.approx(1.0) for value in found.values())


def test_whole_numbers_as_values_and_another_metric(tmp_path):
    path = write_table(tmp_path / "reviews.csv", reviews(40, (1, 2, 3)))
    task = task_of(f"text:{path}[text=review,label=stars,labels=values,metric=r2]")
    assert (task.num_labels, task.headline) == (1, "r2")
    assert both_splits(task)[0].labels.dtype == np.float64


def test_rows_of_a_group_stay_together(tmp_path):
    path = write_table(tmp_path / "reviews.csv", reviews(60))
    train, evaluation = both_splits(task_of(f"text:{path}[text=review,label=stars,group=by]"))
    numbers = [{int(text.split()[2]) // 2 for text in part.columns["review"]} for part in (train, evaluation)]
    assert not numbers[0] & numbers[1]
    same = [{**row, "review": f"text {n % 20}"} for n, row in enumerate(reviews(60))]
    train, evaluation = both_splits(task_of(f"text:{write_csv(tmp_path / 'same.csv', same)}[text=review,label=stars]"))
    assert not set(train.columns["review"]) & set(evaluation.columns["review"])


def test_groups_join_what_equal_texts_already_keep_together(tmp_path):
    rows = [{**row, "review": f"text {n % 20}", "by": n // 2} for n, row in enumerate(reviews(200))]
    rows += [{**row, "by": 100 + n // 2} for n, row in enumerate(reviews(40))]  # groups of texts of their own
    path = write_csv(tmp_path / "both.csv", rows)
    train, evaluation = both_splits(task_of(f"text:{path}[text=review,label=stars,group=by]"))
    of_text = {row["review"]: row["by"] for row in rows[200:]}
    assert not set(train.columns["review"]) & set(evaluation.columns["review"])
    groups = [{of_text[text] for text in part.columns["review"] if text in of_text} for part in (train, evaluation)]
    assert groups[1]
    assert not groups[0] & groups[1]
    assert own.joined(np.array([0, 1, 2, 0, 3]), np.array([0, 0, 1, 2, 2])).tolist() == [0, 0, 1, 0, 0]


def test_a_search_keeps_two_files_of_one_name_apart(models, tmp_path):
    tasks = [write_csv(tmp_path / year / "reviews.csv", reviews(40 + n)) for n, year in enumerate(("2023", "2024"))]
    names = ",".join(f"text:{path}[text=review,label=stars]" for path in tasks)
    options = ["--executor", "serial", "--methods", "head", "--batches", "2", "--batch-size", "4", "--tune", "1"]
    options += ["--model", str(models / "bert"), "--results", str(tmp_path / "results"), "--tasks", names]
    assert main(["run", *options]) == 0
    runs = [record for record in RecordStore(tmp_path / "results").records() if record.spec.search.role == "chosen"]
    assert len({record.spec.data_fingerprint for record in runs}) == 2


def test_a_folder_brings_its_own_evaluation_and_pairs_have_two_columns(tmp_path):
    write_table(tmp_path / "train.csv", reviews(30))
    write_table(tmp_path / "dev.jsonl", reviews(9))
    write_table(tmp_path / "test.parquet", reviews(6))
    task = task_of(f'text:{tmp_path}[text=["review","by"],label=stars]')
    assert task.load(None)[0].columns["by"][:3] == ["0", "0", "1"]
    rows = [{**row, "by": f"reader {row['by']}"} for row in reviews(30)]
    for name, count in (("train.csv", 30), ("dev.jsonl", 9), ("test.parquet", 6)):
        write_table(tmp_path / name, rows[:count])
    task = task_of(f'text:{tmp_path}[text=["review","by"],label=stars]')
    train, evaluation = task.load(None)
    assert list(train.columns) == ["review", "by"]
    assert [(name, len(examples)) for name, examples in evaluation.items()] == [("test", 6), ("validation", 9)]


@pytest.mark.parametrize("contract", TASK_CONTRACTS, ids=lambda contract: contract.__name__)
@pytest.mark.parametrize("kind", ["text", "image"])
def test_contract(kind, contract, models, tmp_path):
    if kind == "text":
        name = f"text:{write_csv(tmp_path / 'reviews.csv', reviews(60))}[text=review,label=stars]"
    else:
        name = f"image:{write_photos(tmp_path / 'photos', 20)}[image_size=32]"
    model = models / ("bert" if kind == "text" else "resnet")
    contract(Subject(name, tmp_path / "results", batches=2, place=Place(model=str(model))))


def test_on_the_command_line_and_the_map_of_labels_in_the_record(models, tmp_path, capsys):
    path = write_csv(tmp_path / "reviews.csv", reviews(60))
    rest = ["--methods", "head", "--batches", "2", "--model", str(models / "bert")]
    options = ["run", *rest, "--executor", "serial", "--results", str(tmp_path / "results")]
    assert main([*options, "--tasks", f"text:{path}[text=review,label=stars,max_length=6]"]) == 0
    (record,) = RecordStore(tmp_path / "results").records()
    assert record.spec.task == "text:reviews"
    assert record.spec.task_parameters["classes"] == ["bad", "good", "odd"]
    assert "path" not in record.spec.task_parameters
    assert record.data["train"]["truncated_share"] == 1.0  # "the film 7 was odd" and two special tokens
    assert {"train", "holdout", "validation"} == set(record.data)
    assert "text:reviews" in capsys.readouterr().out
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(path, tmp_path / "elsewhere" / "reviews.csv")
    config = tmp_path / "sweep.toml"
    config.write_text(f"""tasks = ['text:{moved}[text=review,label=stars,max_length=6]']\n""")
    assert main([*options, "--config", str(config)]) == 0
    assert "1 finished before, 0 to do" in capsys.readouterr().out  # a moved file is the same run


def test_mistakes_in_the_name(tmp_path, capsys):
    options = ["run", "--methods", "head", "--results", str(tmp_path / "results"), "--tasks"]
    path = write_csv(tmp_path / "reviews.csv", reviews(20))
    for task, pieces in {
        "text": ["write text:PATH"],
        "text:": ["write text:PATH"],
        "digits:x.csv": ["takes no path"],
        f"text:{tmp_path}/none.csv": ["none.csv' is not there", ".csv, .tsv, .jsonl, .parquet"],
        f"text:{path}[txt=review]": ["unknown parameter", "Did you mean 'text'"],
        f"text:{path}[path=x]": ["'path'", "text:PATH"],
        f"text:{path}[text=revew,label=stars]": ["no column 'revew'", "nearest: 'review'"],
        f"text:{path}[text=review,label=star]": ["no column 'star'", "review, stars, by"],
        f"text:{path}[text=review,label=stars,metric=acuracy]": ["unknown metric", "Did you mean 'accuracy'"],
        f"text:{path}[text=review,label=by,metric=pearson]": ["unknown metric", "accuracy"],
        f"text:{path}[text=review,label=stars,labels=numbers]": ["labels", "classes", "values"],
    }.items():
        assert main([*options, task]) == 2, task
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert [piece for piece in pieces if piece not in error] == [], error
    assert not (tmp_path / "results").exists()


def test_mistakes_in_tables(tmp_path):
    def task(rows: list[dict[str, Any]], name: str = "x.csv") -> Any:
        return task_of(f"text:{write_table(tmp_path / name, rows)}[text=review,label=stars]")

    with told("holds one class, 'good'"):
        task(reviews(10, ("good",)))
    with told("column 'stars' has 1 empty cells"):
        task([*reviews(10), {"review": "x", "stars": None, "by": 1}])
    with told("column 'review' has 1 empty cells"):
        task([*reviews(10), {"review": None, "stars": "bad", "by": 1}]).load(None)
    with told("1,200 different values", "labels=values"):
        task([{"review": "x", "stars": n, "by": 1} for n in range(1200)])
    with told("no rows"):
        (tmp_path / "y.csv").write_text("review,stars,by\n")
        task_of(f"text:{tmp_path / 'y.csv'}[text=review,label=stars]")
    (tmp_path / "z.csv").write_text("review,stars\na,1\nb,2,3\n")
    with told("z.csv' cannot be read as .csv"):
        task_of(f"text:{tmp_path / 'z.csv'}[text=review,label=stars]")
    (tmp_path / "z.jsonl").write_text('{"review": "a", "stars": 1}\n{"review": ')
    with told("z.jsonl' cannot be read as .jsonl"):
        task_of(f"text:{tmp_path / 'z.jsonl'}[text=review,label=stars]")
    (tmp_path / "z.parquet").write_text("no parquet")
    with told("z.parquet", "not a readable parquet file"):
        task_of(f"text:{tmp_path / 'z.parquet'}[text=review,label=stars]")
    (tmp_path / "z.txt").write_text("text")
    with told("ends in '.txt'", ".csv"):
        task_of(f"text:{tmp_path / 'z.txt'}")
    folder = tmp_path / "folder"
    folder.mkdir()
    with told("has no table 'train'", "it holds: nothing"):
        task_of(f"text:{folder}")
    write_table(folder / "train.csv", reviews(10))
    write_table(folder / "train.jsonl", reviews(10))
    with told("more than one table of a split", "'train.csv', 'train.jsonl'"):
        task_of(f"text:{folder}")
    (folder / "train.jsonl").unlink()
    write_table(folder / "test.csv", reviews(5, ("bad", "goood")))
    with told("unknown class in column 'stars'", "'goood'", "Did you mean 'good'"):
        task_of(f"text:{folder}[text=review,label=stars]").load(None)


def test_images_in_folders_of_classes(models, tmp_path):
    task = task_of(f"image:{write_photos(tmp_path / 'photos', 20)}[image_size=48]")
    assert (task.classes, task.headline) == (("cat", "dog"), "accuracy")
    train, evaluation = both_splits(task)
    assert (len(train), len(evaluation)) == (32, 8)
    assert train.columns["image"].shape == (32, 48, 48, 3)
    brightness = train.columns["image"].mean(axis=(1, 2, 3))
    assert ((brightness > 100) == train.labels.astype(bool)).all()
    write_photos(tmp_path / "parts/train", 6)
    write_photos(tmp_path / "parts/val", 3)
    _, splits = task_of(f"image:{tmp_path / 'parts'}[image_size=32]").load(None)
    assert {name: len(examples) for name, examples in splits.items()} == {"validation": 6}


def test_images_named_in_a_table_or_kept_in_a_parquet(tmp_path):
    photos = write_photos(tmp_path / "photos", 20)
    rows = [{"image": f"{name}/{n}.png", "kind": name} for name in ("cat", "dog") for n in range(20)]
    table = task_of(f"image:{write_csv(photos / 'list.csv', rows)}[label=kind,image_size=32]")
    stored = {
        "image": [{"bytes": (photos / row["image"]).read_bytes(), "path": None} for row in rows],
        "kind": [row["kind"] for row in rows],
    }
    tiny.write_parquet(tmp_path / "photos.parquet", stored)
    packed = task_of(f"image:{tmp_path / 'photos.parquet'}[label=kind,image_size=32]")
    assert make_splits(table, None).fingerprint == make_splits(packed, None).fingerprint


def test_tables_in_a_folder_of_images_win_over_its_folders(tmp_path):
    photos = write_photos(tmp_path / "photos", 20, classes=("camera1", "camera2"))
    rows = [{"image": f"camera{1 + n % 2}/{n}.png", "label": ("cat", "dog")[n % 3 == 0]} for n in range(20)]
    write_csv(photos / "train.csv", rows)
    write_csv(photos / "test.csv", rows[:4])
    task = task_of(f"image:{photos}[image_size=32]")
    assert task.classes == ("cat", "dog")
    assert {name: len(part) for name, part in task.load(None)[1].items()} == {"test": 4}


def test_sixteen_bits_keep_their_range_and_unknown_ranges_are_unreadable(tmp_path):
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32)
    folder = tmp_path / "scans"
    for name in ("ill", "well"):
        (folder / name).mkdir(parents=True)
        for n in range(4):
            Image.fromarray((ramp * (n + 1) / 4).astype(np.uint16)).save(folder / name / f"{n}.png")
    images = np.concatenate([part.columns["image"] for part in both_splits(task_of(f"image:{folder}[image_size=32]"))])
    assert images.min() == 0
    assert sorted(images.max(axis=(1, 2, 3)).tolist()) == sorted(2 * [63, 127, 191, 255])
    Image.fromarray(ramp.astype(np.float32)).save(folder / "ill" / "float.tiff")
    with told("1 of 9 images cannot be read", "float.tiff"):
        task_of(f"image:{folder}[image_size=32]").load(None)


def test_images_outside_the_folder_are_refused(tmp_path):
    photos = write_photos(tmp_path / "photos", 20)
    other = write_photos(tmp_path / "other", 1)
    rows = [{"image": f"cat/{n}.png", "label": n % 2} for n in range(20)]
    (photos / "cat/link.png").symlink_to(other / "cat/0.png")
    (photos / "linked").symlink_to(other)
    for name in ("../other/cat/0.png", str(other / "cat/0.png"), "cat/link.png", "linked/cat/0.png", "/dev/zero"):
        with told(f"image '{name}' is not inside '{photos}'"):
            task_of(f"image:{write_csv(photos / 'list.csv', [*rows, {'image': name, 'label': 0}])}").load(None)
    within = [{**rows[0], "image": str(photos / "cat/0.png")}, {**rows[1], "image": "dog/../cat/1.png"}, *rows[2:]]
    (photos / "cat/again.png").symlink_to(photos / "cat/2.png")
    within[2]["image"] = "cat/again.png"
    train, _ = task_of(f"image:{write_csv(photos / 'list.csv', within)}[image_size=32]").load(None)
    assert train.left_out == ()
    (photos / "list.csv").unlink()
    (photos / "cat/again.png").unlink()
    with told("cat/link.png' is not inside"):
        task_of(f"image:{photos}[image_size=32]").load(None)


def test_pipes_folders_and_large_files_are_unreadable_images(tmp_path):
    photos = write_photos(tmp_path / "photos", 20)
    rows = [{"image": f"cat/{n}.png", "label": n % 2} for n in range(20)]
    os.mkfifo(photos / "cat/pipe.png")
    with told("1 of 41 images cannot be read", "pipe.png"):
        task_of(f"image:{photos}[image_size=32]").load(None)
    for name in ("cat/pipe.png", "cat", "nul\0.png", "x" * 300):
        write_jsonl(photos / "list.jsonl", [*rows, {"image": name, "label": 0}])
        with told("1 of 21 images cannot be read"):
            task_of(f"image:{photos / 'list.jsonl'}").load(None)
    (photos / "cat/pipe.png").unlink()
    with (photos / "dog/3.png").open("ab") as stream:
        stream.truncate(own_image.LARGEST_FILE + 1)  # a hole: no room is taken
    with told("1 of 40 images cannot be read", "3.png"):
        task_of(f"image:{photos}[image_size=32]").load(None)


def test_cells_that_hold_no_image_are_unreadable(tmp_path):
    photo = (write_photos(tmp_path / "photos", 1) / "cat/0.png").read_bytes()
    good = [{"bytes": photo, "path": "elsewhere.png"}] * 20
    for cell in (
        {"bytes": b"", "path": None},
        {"bytes": b"", "path": "lost.png"},
        {"bytes": b"no image", "path": None},
    ):
        tiny.write_parquet(tmp_path / "x.parquet", {"image": [*good, cell], "label": [0, 1] * 10 + [0]})
        with told("1 of 21 images cannot be read"):
            task_of(f"image:{tmp_path / 'x.parquet'}").load(None)
    tiny.write_parquet(tmp_path / "x.parquet", {"image": [{"bytes": "text"}] * 4, "label": [0, 1] * 2})
    with told("4 of 4 images cannot be read"):
        task_of(f"image:{tmp_path / 'x.parquet'}").load(None)
    tiny.write_parquet(tmp_path / "x.parquet", {"image": [1, 2, 3, 4], "label": [0, 1] * 2})
    with told("4 of 4 images cannot be read"):
        task_of(f"image:{tmp_path / 'x.parquet'}").load(None)


def test_a_decompression_bomb_is_an_unreadable_image(tmp_path, monkeypatch):
    photos = write_photos(tmp_path / "photos", 20)
    Image.new("RGB", (100, 100)).save(photos / "cat/0.png")
    task = task_of(f"image:{photos}[image_size=32]")
    monkeypatch.setenv("HARNESS_CACHE", "")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4999)  # Pillow warns above it and refuses twice as many
    with told("1 of 40 images cannot be read", "0.png"):
        task.load(None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5001)
    assert task.load(None)[0].left_out == ()


def test_an_image_that_changes_while_it_is_read_is_told(tmp_path, monkeypatch):
    photos = write_photos(tmp_path / "photos", 20)

    def overtaken(kind, made_from, libraries, make):
        shutil.copy(photos / "dog/1.png", photos / "cat/1.png")
        return make()

    monkeypatch.setattr(own_image, "cached", overtaken)
    with told("image '1.png' in", "changed while it was read"):
        task_of(f"image:{photos}[image_size=32]").load(None)


def test_paths_that_are_neither_files_nor_folders(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "train-0.parquet")
    options = ["run", "--methods", "head", "--results", str(tmp_path / "results"), "--tasks"]
    for path, reason in {
        "/dev/zero": "'/dev/zero' is neither a regular file nor a folder",
        f"{tmp_path}/pipe.csv": "pipe.csv' is neither a regular file nor a folder",
        f"{tmp_path}/folder": "train-0.parquet' is not a regular file",
        "~nobody-of-this-name/x.csv": "begins with a user who is not here",
        "x" * 300: "is longer than a path can be",
    }.items():
        for kind in ("text", "generation", "image"):
            assert main([*options, f"{kind}:{path}"]) == 2, path
            error = capsys.readouterr().err
            assert reason in error, error
            assert error.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_unreadable_images_are_named_and_counted_up_to_one_per_cent(models, tmp_path):
    photos = write_photos(tmp_path / "photos", 60)
    whole = (photos / "cat/7.png").read_bytes()
    (photos / "cat/7.png").write_bytes(whole[: len(whole) // 2])
    task = task_of(f"image:{photos}[image_size=32]")
    train, evaluation = both_splits(task)
    assert len(train) + len(evaluation) == 119
    assert train.left_out == ("7.png",)
    found = summary.facts_of(task, make_splits(task, None), "train")
    assert (found["num_left_out"], found["left_out"]) == (1, ["7.png"])
    (photos / "dog/3.png").write_bytes(b"")
    with told("2 of 120 images cannot be read", "1 %", "7.png, 3.png"):
        task.load(None)
    rows = [{"image": f"{n}.png", "label": n % 2} for n in range(10)]
    with told("10 of 10 images cannot be read", "0.png"):
        task_of(f"image:{write_csv(tmp_path / 'lost.csv', rows)}").load(None)
    (tmp_path / "empty/cat").mkdir(parents=True)
    with told("has no table 'train'"):
        task_of(f"image:{tmp_path / 'empty'}")
    with told("a folder of images", "'kind'"):
        task_of(f"image:{photos}[label=kind]")
