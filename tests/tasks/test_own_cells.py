"""Cells of the user's own tables: text is text, labels are of one form, and no line is lost, whatever the file."""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.cli import main
from tasks import own
from tasks.delimited import delimited
from tests.support.own_data import both_splits, reviews, task_of, told, write_csv, write_jsonl

TEXTS = [f"the film {n}" for n in range(40)]


def parquet(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def labelled(path: Path, labels: list[Any]) -> Path:
    """A CSV, JSONL or parquet file of 40 texts and these labels, over and over."""
    rows = [{"text": text, "label": labels[n % len(labels)]} for n, text in enumerate(TEXTS)]
    if path.suffix == ".parquet":
        return parquet(path, text=TEXTS, label=pa.array([row["label"] for row in rows]))
    return write_csv(path, rows) if path.suffix == ".csv" else write_jsonl(path, rows)


D = decimal.Decimal


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([0.0, 1.0], ("0", "1")),
        ([3, 20, 100], ("3", "20", "100")),
        ([1.5, 2.0], ()),
        ([True, False], ("false", "true")),
        (["NA", "nan"], ("NA", "nan")),
        (["1.0", "1.0 a"], ("1.0", "1.0 a")),
    ],
)
def test_labels_are_classes_or_values_in_every_kind_of_file(tmp_path, kind, labels, classes):
    task = task_of(f"text:{labelled(tmp_path / f'x.{kind}', labels)}")
    assert (task.classes, task.headline) == (classes, "accuracy" if classes else "pearson")
    train, evaluation = both_splits(task)
    assert set(np.concatenate([train.labels, evaluation.labels])) == set(range(len(classes)) if classes else labels)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([D("0.50"), D("1.50")], ()),
        ([D("0.00"), D("1.00")], ("0", "1")),
        ([datetime.date(2024, 1, 2), datetime.date(2023, 1, 2)], ("2023-01-02", "2024-01-02")),
        (pd.Categorical(["b", "a"]).tolist(), ("a", "b")),
        (["1", "2"], ("1", "2")),
        (["01", "1"], ("01", "1")),  # words, says the file
        (["1.5", "2.5"], ("1.5", "2.5")),
    ],
)
def test_typed_labels_of_parquet(tmp_path, labels, classes):
    task = task_of(f"text:{labelled(tmp_path / 'x.parquet', labels)}")
    assert task.classes == classes
    both_splits(task)


def test_numbers_of_a_csv_are_one_class_however_they_are_written(tmp_path):
    task = task_of(f"text:{labelled(tmp_path / 'x.csv', ['1', '1.0', '01', '2', '+2', '2e0'])}")
    assert task.classes == ("1", "2")
    values = task_of(f"text:{labelled(tmp_path / 'y.csv', ['1.50', '1e-1', '-3', '1e300000000'])}")
    with told("holds inf", "1e+30"):
        values.load(None)


def test_labels_are_of_one_form_over_all_splits(tmp_path):
    parquet(tmp_path / "train.parquet", text=TEXTS, label=[n % 2 for n in range(40)])
    write_csv(tmp_path / "test.csv", [{"text": text, "label": f"{n % 2}.0"} for n, text in enumerate(TEXTS)])
    write_jsonl(tmp_path / "dev.jsonl", [{"text": text, "label": str(n % 2)} for n, text in enumerate(TEXTS)])
    task = task_of(f"text:{tmp_path}")
    assert task.classes == ("0", "1")
    for part in task.load(None)[1].values():
        assert part.labels.tolist() == [n % 2 for n in range(40)]
    write_csv(tmp_path / "test.csv", [{"text": text, "label": n / 2} for n, text in enumerate(TEXTS)])
    assert task_of(f"text:{tmp_path}").classes == ()  # one fraction in any split: all are values


def test_what_is_no_label_is_told_in_one_line(tmp_path):
    for name, labels, piece in (
        ("a.jsonl", [[0, 1], [1, 0]], "column 'label' holds lists; one text, word or number a row is needed"),
        ("b.jsonl", [{"a": 1}, {"a": 0}], "holds records"),
        ("c.parquet", [[0], [1]], "holds lists"),
        ("d.parquet", [{"a": 1}, {"a": 0}], "holds records"),
        ("e.parquet", [b"a", b"b"], "holds binary data"),
        ("f.csv", ["nan", "1.0", "0.0"], "has 14 empty or NaN cells"),
        ("g.parquet", [float("nan"), 1.0, 0.0], "has 14 empty"),
        ("h.jsonl", [float("nan"), 1.0, 0.0], "has 14 empty"),
        ("i.jsonl", ["", "a", "b"], "has 14 empty"),
        ("j.jsonl", [1, "a", [2]], "column 'label'"),
    ):
        with told(piece):
            task_of(f"text:{labelled(tmp_path / name, labels)}")
    with told("one text, word or number a row is needed"):
        write_jsonl(tmp_path / "t.jsonl", [{"text": ["a"], "label": n} for n in range(4)])
        task_of(f"text:{tmp_path / 't.jsonl'}").load(None)


def test_a_column_that_is_there_twice(tmp_path):
    (tmp_path / "x.csv").write_text("text,label,text\na,0,b\nc,1,d\n")
    with told("2 columns 'text'"):
        task_of(f"text:{tmp_path / 'x.csv'}")
    (tmp_path / "x.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "a", "label": 0, "text": "b"}\n')
    with told("line 2", "'text' is given twice"):
        task_of(f"text:{tmp_path / 'x.jsonl'}")
    twice = pa.table([pa.array(["a", "b"]), pa.array([0, 1]), pa.array(["c", "d"])], names=["text", "label", "text"])
    pq.write_table(twice, tmp_path / "x.parquet")
    with told("2 columns 'text'"):
        task_of(f"text:{tmp_path / 'x.parquet'}")


def test_texts_are_as_they_stand_in_the_file(tmp_path):
    cells = ["01", "1e5", "TRUE", "2024-01-01", " x ", "NA", "nan", "1.50", "null", "12:30"]
    rows = [{"text": cell, "other": f"{n}", "label": n % 2} for n, cell in enumerate(cells)]
    for name in ("x.csv", "x.tsv"):
        path = write_csv(tmp_path / name, rows, "\t" if name.endswith("tsv") else ",")
        assert own.read_own(str(path), ["text"])["train"].texts("text") == cells
    lines = ['{"text": 01.50}'.replace("01", "1"), '{"text": 1e5}', '{"text": true}', '{"text": "01"}']
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    assert own.read_own(str(tmp_path / "x.jsonl"), ["text"])["train"].texts("text") == ["1.50", "1e5", "true", "01"]
    for values, texts in (
        (pa.array([1, 20]), ["1", "20"]),
        (pa.array([0.1, 2.0], pa.float32()), ["0.1", "2.0"]),
        (pa.array([True, False]), ["true", "false"]),
        (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
        (pa.array(["a", "b"], pa.string_view()), ["a", "b"]),
        (pa.array(["a", "b"], pa.large_string()), ["a", "b"]),
        (pa.array([datetime.date(2024, 1, 2)] * 2), ["2024-01-02"] * 2),
    ):
        path = parquet(tmp_path / "x.parquet", text=values)
        assert own.read_own(str(path), ["text"])["train"].texts("text") == texts


def test_categories_and_numbers_used_as_text_run_through_a_task(tmp_path):
    path = parquet(
        tmp_path / "x.parquet", text=pa.array(TEXTS).dictionary_encode(), n=list(range(40)), label=[0, 1] * 20
    )
    train, _ = both_splits(task_of(f'text:{path}[text=["text","n"]]'))
    assert train.columns["text"][0].startswith("the film")
    assert train.notes == ("column 'n' holds int64: read as text",)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_lines_of_any_length(tmp_path, kind):
    rows = [{"text": f"the film {n} " + "very " * (300_000 if n in (3, 7) else 1), "label": n % 2} for n in range(12)]
    path = (write_csv if kind == "csv" else write_jsonl)(tmp_path / f"x.{kind}", rows)
    assert own.read_own(str(path), ["text"])["train"].texts("text") == [row["text"] for row in rows]
    before = csv.field_size_limit()
    assert before < 300_000, "the limit of other readers is left as it is"


def test_a_quote_sign_that_is_not_closed_swallows_nothing(tmp_path):
    texts = [('"' if n % 7 == 3 else "") + f"the film {n} was" + (' "good"' if n == 10 else "") for n in range(60)]
    for name, sign in (("x.tsv", "\t"), ("x.csv", ",")):
        lines = [f"{text}{sign}{n % 2}" for n, text in enumerate(texts)]
        (tmp_path / name).write_text(f"text{sign}label\n" + "\n".join(lines) + "\n")
        train, evaluation = both_splits(task_of(f"text:{tmp_path / name}"))
        assert sorted([*train.columns["text"], *evaluation.columns["text"]]) == sorted(texts)
        assert "quote signs are part of the texts" in train.notes[0]


def test_quote_signs_mean_the_same_in_every_split(tmp_path):
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + '"well" he said\t0\n"fine"\t1\n' * 9)
    (tmp_path / "dev.tsv").write_text('text\tlabel\n"fine"\t0\n"well"\t1\n')
    splits = own.read_own(str(tmp_path), ["text"], label="label")
    assert splits["validation"].texts("text") == ['"fine"', '"well"']
    (tmp_path / "dev.tsv").write_text('text\tlabel\n"fi\tne"\t0\n"well"\t1\n')  # cannot be read so
    assert own.read_own(str(tmp_path), ["text"], label="label")["validation"].texts("text") == ["fi\tne", "well"]


def test_a_quote_that_another_one_closes_swallows_nothing():
    """The whole file is as RFC 4180 has it, but the lines in between are rows by themselves."""
    lines = ['"it begins,0', "a film,1", "a story,0", 'it ends",1', "a camera,1"]
    _, rows, notes = delimited("text,label\n" + "\n".join(lines), ",", "auto", "x")
    assert [",".join(row) for row in rows] == lines
    assert len(notes) == 1
    assert len(delimited("text,label\n" + "\n".join(lines), ",", "quoted", "x")[1]) == 2
    with told("lines 2 to 5 are one row between two quote signs", "quoting=quoted"):  # plain does not fit either
        delimited("text,label\n" + "\n".join([*lines, '"well, yes",1']), ",", "auto", "x.csv")


@pytest.mark.parametrize("delimiter", [",", "\t"])
@pytest.mark.parametrize("style", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_is_quoted_properly_is_read_as_other_readers_do(delimiter, style, end):
    generator = random.Random(0)
    pieces = ["film", '"', ",", "\t", "\n", "\r\n", " ", "é", "''", "a,b", '""', "x"]
    rows = [["".join(generator.choices(pieces, k=5)) + "." for _ in range(2)] + [str(n % 2)] for n in range(200)]
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter, quoting=style, lineterminator=end)
    writer.writerow(["one", "two", "label"])
    writer.writerows(rows)
    header, found, _ = delimited(stream.getvalue(), delimiter, "auto", "x")
    assert (header, found) == (["one", "two", "label"], rows)
    oracle = pd.read_csv(io.StringIO(stream.getvalue(), newline=""), sep=delimiter, dtype=str, keep_default_na=False)
    assert oracle["label"].tolist() == [row[2] for row in found]


def test_raw_tables_without_quoting_are_read_as_the_csv_module_does_without_it():
    generator = random.Random(1)
    pieces = ["film", '"', ",", " ", "'", "x"]
    rows = [["".join(generator.choices(pieces, k=4)) + "." for _ in range(2)] + [str(n % 2)] for n in range(300)]
    text = "\n".join("\t".join(row) for row in [["one", "two", "label"], *rows])
    _, found, _ = delimited(text, "\t", "auto", "x")
    assert found == rows == list(csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))[1:]


def test_uneven_rows_and_open_quotes_are_told_with_their_line():
    for text, sign, pieces in (
        ("a,b\n1,2\n1,2,3\n", ",", ["line 3 has 3 columns, the header has 2"]),
        ("a,b\n1,2\n\n1\n", ",", ["line 4 has 1 columns"]),
        ('a,b\n"x, y",2\n"x, z,2\n', ",", ["row at line 3", "not closed", "quoting=plain"]),
        ('a,b\n"x, y",2\n"x" z,2\n', ",", ["row at line 3", "not doubled"]),
    ):
        with told(*pieces):
            delimited(text, sign, "auto", "x.csv")
    with told("line 2 has 3 columns"):
        delimited('a,b\n"x, y",2\n', ",", "plain", "x.csv")


def test_rows_of_several_lines_are_counted():
    _, rows, notes = delimited('a,b\n"one\ntwo\nthree",1\nx,2\n', ",", "auto", "x.csv")
    assert len(rows) == 2
    assert notes == [
        "1 rows take 3 lines, as cells in quotes hold line ends; the longest 3 lines, from line 2",
    ]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "gb18030", "utf-8-sig", "latin-1"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_encodings(tmp_path, encoding, kind):
    texts = [f"le film {n} a \u00e9t\u00e9 b\u00e2cl\u00e9" for n in range(20)]
    path = tmp_path / f"x.{kind}"
    rows = [{"text": text, "label": n % 2} for n, text in enumerate(texts)]
    lines = ["text,label", *(f"{row['text']},{row['label']}" for row in rows)]
    if kind == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes("\n".join(lines).encode(encoding))
    train, evaluation = both_splits(task_of(f"text:{path}[encoding={encoding}]"))
    assert sorted([*train.columns["text"], *evaluation.columns["text"]]) == sorted(texts)
    if encoding != "utf-8-sig":
        with told(
            "is not utf-8", "line 1 " if kind == "jsonl" else "line ", "utf-16" if "16" in encoding else "cp1252"
        ):
            task_of(f"text:{path}")


def test_utf_16_that_could_be_utf_8(tmp_path):
    (tmp_path / "x.csv").write_bytes("text,label\na,0\nb,1\n".encode("utf-16-le"))
    with told("holds NUL characters", "encoding=utf-16"):
        task_of(f"text:{tmp_path / 'x.csv'}")


def test_unknown_encodings(tmp_path):
    for name in ("utf9", "base64"):
        with told(f"'{name}' is no text encoding", "cp1252"):
            task_of(f"text:{write_csv(tmp_path / 'x.csv', reviews(9))}[encoding={name}]")


def test_shards(tmp_path):
    for shard in (0, 2):
        parquet(tmp_path / f"missing/train-{shard:05d}-of-00003.parquet", text=TEXTS, label=[0, 1] * 20)
    with told("2 of the 3 files", "missing"):
        task_of(f"text:{tmp_path / 'missing'}")
    train = own.read_own(str(tmp_path / "missing/train-00000-of-00003.parquet"), ["text"])["train"]
    assert "one of 3 parts" in train.notes[0]
    parts = {
        "types": ([0, 1] * 20, pa.array([0.0, 1.0] * 20)),
        "strings": (pa.array(["a", "b"] * 20), pa.array(["b", "a"] * 20, pa.large_string())),
        "categories": (pa.array(["a", "b"] * 20).dictionary_encode(), pa.array(["b", "a"] * 20)),
    }
    for name, labels in parts.items():
        for shard, some in enumerate(labels):
            texts = [f"{shard} {text}" for text in TEXTS]
            parquet(tmp_path / name / f"train-{shard:05d}-of-00002.parquet", text=texts, label=some)
        task = task_of(f"text:{tmp_path / name}")
        assert task.classes == (("0", "1") if name == "types" else ("a", "b"))
        assert sum(map(len, both_splits(task))) == 80
    for shard, some in enumerate(([0, 1], ["a", "b"])):
        parquet(tmp_path / f"odd/train-{shard:05d}-of-00002.parquet", text=["x", "y"], label=some)
    with told("differ", "label", "int64 vs string"):
        task_of(f"text:{tmp_path / 'odd'}")


@pytest.mark.parametrize(
    ("train", "test", "split"),
    [
        ("Train.csv", "Test.csv", "test"),
        ("TRAIN.CSV", "TEST.CSV", "test"),
        ("training.csv", "testing.csv", "test"),
        ("training_set.csv", "test_set.csv", "test"),
        ("train.csv", "Valid.csv", "validation"),
        ("train.csv", "eval.csv", "validation"),
    ],
)
def test_names_of_tables(tmp_path, train, test, split):
    write_csv(tmp_path / train, reviews(30))
    write_csv(tmp_path / test, reviews(6))
    (tmp_path / "._train.csv").write_bytes(b"\x00")
    (tmp_path / ".DS_Store").write_bytes(b"\x00")
    write_csv(tmp_path / "sample_submission.csv", reviews(3))
    examples, evaluation = task_of(f"text:{tmp_path}[text=review,label=stars]").load(None)
    assert {name: len(part) for name, part in evaluation.items()} == {split: 6}
    assert examples.notes == ("tables that are no split are left out: sample_submission.csv",)


@pytest.mark.parametrize("labels", [[0.5, 2.0], [0, 1], ["no", "yes"]])
@pytest.mark.parametrize("lacking", ["-1", "-1.0", "", None])
def test_test_sets_without_labels_are_left_out_and_said(tmp_path, labels, lacking):
    labelled(tmp_path / "train.csv", labels)
    labelled(tmp_path / "validation.csv", labels)
    rows = [{"text": text} if lacking is None else {"text": text, "label": lacking} for text in TEXTS]
    write_csv(tmp_path / "test.csv", rows)
    train, evaluation = task_of(f"text:{tmp_path}").load(None)
    assert list(evaluation) == ["validation"]
    assert train.notes[0].startswith("'test.csv' is left out, not scored on: it has ")
    (tmp_path / "validation.csv").unlink()
    assert {name: len(part) for name, part in task_of(f"text:{tmp_path}").load(None)[1].items()} == {"validation": 8}


def test_minus_one_is_a_label_where_training_rows_have_it(tmp_path):
    labelled(tmp_path / "train.csv", [-1, 1])
    labelled(tmp_path / "test.csv", [-1])
    task = task_of(f"text:{tmp_path}")
    assert (task.classes, list(task.load(None)[1])) == (("-1", "1"), ["test"])


def test_paths_that_are_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "data/pairs.csv", reviews(9))
    options = ["run", "--methods", "head", "--results", str(tmp_path / "results"), "--tasks"]
    for task, pieces in {
        "generation:data/pairs.jsonl": ["'data/pairs.jsonl' is not there", "nearest: 'data/pairs.csv'"],
        "generation:dta/pairs.csv": ["'dta/pairs.csv' is not there", "nor is the folder 'dta'"],
        "generation:./pairs": ["'./pairs' is not there"],
        "text:data/pair.csv": ["'data/pair.csv' is not there", "nearest: 'data/pairs.csv'"],
        "image:data/pair.csv": ["'data/pair.csv' is not there"],
    }.items():
        assert main([*options, task]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert [piece for piece in pieces if piece not in error] == [], error
    assert not own.is_local("openai/gsm8k")
    assert not own.is_local("owner/data-v1.0")
