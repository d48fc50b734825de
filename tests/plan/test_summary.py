"""What was read is said before anything trains, and stands in the record."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from harness import registry
from harness.cli import main
from harness.record.store import RecordStore
from harness.run import summary
from harness.run.data import Data
from harness.spec import Limits
from harness.splits import make_splits, stratified_rows
from harness.task import Examples
from tests.support import tiny
from tests.support.own_data import both_splits, task_of, told, write_csv


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    return str(tiny.write_bert(tmp_path_factory.mktemp("models") / "bert"))


def payments(count: int, frauds: int) -> list[dict[str, str]]:
    return [{"text": f"payment {n}", "label": "fraud" if n < frauds else "ok"} for n in range(count)]


def said(task, model: str | None = None, limit: int | None = None) -> list[str]:
    return Data(task, make_splits(task, None, Limits(limit)), model).summary("it")


@pytest.mark.parametrize("frauds", [2, 3, 5, 20])
def test_a_rare_class_is_in_training_and_in_evaluation(tmp_path, frauds):
    task = task_of(f"text:{write_csv(tmp_path / 'x.csv', payments(100, frauds))}")
    train, evaluation = both_splits(task)
    assert np.bincount(evaluation.labels)[0] == max(1, round(frauds / 5))
    assert len(train) + len(evaluation) == 100
    assert 0 in make_splits(task, None).train.labels


def test_whole_groups_are_cut_off_and_no_class_is_lost_on_the_way():
    for seed in range(30):
        generator = np.random.default_rng(seed)
        labels = generator.choice(4, size=120, p=[0.6, 0.3, 0.07, 0.03])
        groups = generator.integers(0, 40, 120)
        rows = Examples({"n": np.arange(120)}, labels, groups)
        rest, held = stratified_rows(rows, 0.2, 120)
        assert sorted([*rest, *held]) == list(range(120))
        assert not set(groups[rest]) & set(groups[held])
        for label in np.unique(labels):
            assert label in labels[rest]
            if len(np.unique(groups[labels == label])) > 1:
                assert label in labels[held] or len(np.unique(groups[labels == label])) < 4
        again = stratified_rows(rows, 0.2, 120)
        np.testing.assert_array_equal(held, again[1])
        assert 12 <= len(held) <= 30


def test_classes_that_are_missing_and_references_that_are_all_equal_are_said(tmp_path, bert):
    write_csv(tmp_path / "train.csv", payments(40, 20))
    write_csv(tmp_path / "test.csv", payments(6, 0))
    lines = said(task_of(f'text:{tmp_path}[classes=["fraud","ok","odd"]]'), bert)
    assert lines[0] == "it: train 36, holdout 4, test 6 rows; score: accuracy of test"
    assert lines[1] == "  rows by class: train fraud (18), ok (18), odd (0); test fraud (0), ok (6), odd (0)"
    assert "  note: no row of class 'odd': it is learned from no row" in lines
    assert "  test: no row of class 'fraud', 'odd': it is no part of accuracy" in lines
    assert "  test: every reference is class 'ok': accuracy tells nothing of a method" in lines
    values = [{"text": f"payment {n}", "label": n / 2} for n in range(20)]
    write_csv(tmp_path / "values/train.csv", values)
    write_csv(tmp_path / "values/test.csv", [{**row, "label": 3.5} for row in values])
    lines = said(task_of(f"text:{tmp_path / 'values'}"), bert)
    assert "  values: train 0 to 9; test 3.5 to 3.5" in lines
    assert "  test: every reference is 3.5: pearson tells nothing of a method" in lines


def test_f1_is_of_a_class_and_of_many_classes_the_rarest_are_shown(tmp_path, bert):
    lines = said(task_of(f"text:{write_csv(tmp_path / 'x.csv', payments(40, 20))}[metric=f1]"), bert)
    assert lines[0].endswith("score: f1 of validation (f1 of class 'ok')")
    rows = [{"text": f"{n}", "label": f"c{n % 30:02d}"} for n in range(290)]
    task = task_of(f"text:{write_csv(tmp_path / 'y.csv', rows)}")
    assert "train 30 classes, the rarest c20 (" in "\n".join(said(task, bert))
    found = summary.facts_of(task, make_splits(task, None), "train")
    assert (found["num_classes"], len(found["classes"])) == (30, 20)


def test_it_is_printed_by_a_run_and_a_dry_run_and_is_in_the_record(tmp_path, capsys, bert):
    path = write_csv(tmp_path / "x.csv", [{**row, "text": row["text"] + " was good" * 9} for row in payments(40, 20)])
    task = f"text:{path}[max_length=8]"
    options = ["run", "--methods", "head", "--batches", "2", "--model", bert, "--executor", "serial", "--tasks", task]
    options += ["--results", str(tmp_path / "results")]
    lines = [
        "text:x: train 29, holdout 3, validation 8 rows; score: accuracy of validation (f1 of class 'ok')",
        "  rows by class: train fraud (14), ok (15); validation fraud (4), ok (4)",
        "  texts cut to the length: train 100.0 %; validation 100.0 %",
    ]
    assert main([*options, "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert main(options) == 0
    out = capsys.readouterr().out
    for line in lines:
        assert line in dry
        assert line in out
    (record,) = RecordStore(tmp_path / "results").records()
    assert record.data["train"] == {"classes": {"fraud": 14, "ok": 15}, "truncated_share": 1.0}
    assert record.data["validation"]["f1_of"] == "ok"
    assert record.data["validation"]["notes"] == ["cut off from the training rows"]


def test_tasks_without_classes_or_models_of_their_own_are_said_too():
    lines = said(registry.make_task("digits", {}))
    assert "score: accuracy of validation" in lines[0]
    assert "10 classes, the rarest 8 (" in lines[1]


def test_rows_that_all_share_one_text_or_prompt(tmp_path):
    rows = [{"premise": "tell me", "hypothesis": f"film {n}", "label": n % 2} for n in range(40)]
    path = write_csv(tmp_path / "x.csv", rows)
    train, evaluation = both_splits(task_of(f'text:{path}[text=["premise","hypothesis"]]'))
    assert (len(train), len(evaluation)) == (32, 8)
    assert not set(train.columns["hypothesis"]) & set(evaluation.columns["hypothesis"])
    assert "40 rows share one first text" in train.notes[0]
    with told("all 40 training rows belong together"):
        task_of(f"text:{path}[text=premise]").load(None)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": "tell me", "response": f"film {n}"}) + "\n" for n in range(40)))
    train, evaluation = both_splits(task_of(f"generation:{pairs}"))
    assert (len(train), len(evaluation)) == (32, 8)
    pairs.write_text('{"prompt": "tell me", "response": "film"}\n' * 40)
    with told("all 40 training rows belong together"):
        task_of(f"generation:{pairs}").load(None)


def test_the_rows_of_values_and_of_a_limit_keep_their_cut(tmp_path: Path):
    """Where there are no classes the cut is as it was."""
    rows = [{"text": f"film {n}", "label": n / 2} for n in range(50)]
    train, evaluation = both_splits(task_of(f"text:{write_csv(tmp_path / 'x.csv', rows)}"))
    assert (len(train), len(evaluation)) == (40, 10)
    limited = make_splits(task_of(f"text:{tmp_path / 'x.csv'}"), None, Limits(8))
    assert {name: len(part) for name, part in limited.by_name.items()} == {"train": 7, "holdout": 1, "validation": 8}
