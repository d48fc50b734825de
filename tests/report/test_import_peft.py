"""`import-peft`: what PEFT's suite reports, as tables of their own."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest

from harness import cli
from tests.support.report_records import record, stored

REAL = os.environ.get("HARNESS_PEFT_RESULTS")


def content(name: str = "lora/llama-rank32", accuracy: float | None = 0.478, **changes: Any) -> dict[str, Any]:
    """One result in the suite's schema; `changes` are of its train_config."""
    last = {"step": 5000, "train loss": 0.6, "forgetting": 0.0496}
    return {
        "run_info": {
            "created_at": "2026-07-15T05:41:18+00:00",
            "experiment_name": name,
            "train_config": {
                "model_id": "some/model-3B",
                "dtype": "bfloat16",
                "max_steps": 5000,
                "batch_size": 4,
                "seed": 0,
                "optimizer_type": "AdamW",
                "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1},
            }
            | changes,
            "peft_config": {"peft_type": "LORA", "r": 32},
        },
        "train_info": {
            "status": "success" if accuracy is not None else "canceled",
            "train_time": 941.96,
            "file_size": 36715216,
            "num_trainable_params": 9175040,
            "accelerator_memory_max": 22292725760,
            "metrics": [{"step": 250, "valid accuracy": 0.9}]
            + ([last | {"test accuracy": accuracy}] if accuracy is not None else []),
        },
        "meta_info": {"package_info": {"peft-version": "0.19.2"}, "system_info": {"accelerator": "a card"}},
    }


def folder(path: Path, *contents: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "README.md").write_text("not a result")
    for place, each in enumerate(contents):
        (path / f"{place}.json").write_text(json.dumps(each))
    return path


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_a_table_of_its_own_marked_as_reported_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = folder(tmp_path / "in", content("a/one", 0.2), content("b/two", 0.478), content("c/three", None))
    to = tmp_path / "out"
    assert cli.main(["import-peft", str(found), "--to", str(to)]) == 0
    assert sorted(path.name for path in to.iterdir()) == ["peft.csv", "peft.md", "peft.tex"]
    printed, markdown = capsys.readouterr().out, (to / "peft.md").read_text()
    for text in (printed, markdown, (to / "peft.tex").read_text()):
        for words in ("Reported elsewhere", "Not measured by this benchmark", "One run each"):
            assert words in " ".join(text.split())
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if line[:1] == "|"]
    assert [line[0] for line in lines[2:]] == ["b/two", "a/one", "c/three"]
    assert lines[2][1:] == ["LORA", "0.478", "0.050", "9.18M", "36.7M", "942", "22.3G", "0.0001"]
    assert lines[4][2] == "- canceled"
    best, _, canceled = rows(to / "peft.csv")
    assert best | {
        "reported_by": "PEFT's method_comparison/MetaMathQA", "runs": "1", "seed": "0", "experiment": "b/two",
        "test_accuracy": "0.478", "forgetting": "0.0496", "parameters": "9175040", "stored_bytes": "36715216",
    } == best  # fmt: skip
    assert (canceled["status"], canceled["test_accuracy"]) == ("canceled", "")


def test_other_settings_are_other_tables_and_a_learning_rate_is_the_experiments(tmp_path: Path) -> None:
    same = content("a/fast", optimizer_kwargs={"lr": 0.01})
    found = folder(tmp_path / "in", content(), same, content("a/long", max_steps=10))
    assert cli.main(["import-peft", str(found), "--to", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "peft.md").read_text().count("## Setting") == 2
    settings = {row["experiment"]: row["setting"] for row in rows(tmp_path / "out" / "peft.csv")}
    assert settings["lora/llama-rank32"] == settings["a/fast"] != settings["a/long"]


def test_nothing_of_it_stands_beside_what_was_measured(tmp_path: Path) -> None:
    store = stored(tmp_path / "results", record())
    to = store.results / "reported"
    assert cli.main(["import-peft", str(folder(tmp_path / "in", content("x/elsewhere"))), "--to", str(to)]) == 0
    assert cli.main(["report", "--results", str(store.results), "--tracking-uri", "off"]) == 0
    told = [path for path in store.results.rglob("*") if path.is_file() and b"x/elsewhere" in path.read_bytes()]
    assert {path.parent for path in told} == {to}
    assert len(list(store.runs.iterdir())) == 1


def without(key: str, value: Any = None) -> dict[str, Any]:
    """A result without a key, or with another value there."""
    made = content()
    *parents, last = key.split(".")
    place: Any = made
    for name in parents:
        place = place[name]
    del place[last]
    return made if value is None else {**made, parents[0]: {**made[parents[0]], last: value}}


@pytest.mark.parametrize(
    ("other", "key", "expected"),
    [
        ({"method": "lora", "score": 0.5}, "key 'run_info.train_config' is missing", "expected an object"),
        (without("run_info.experiment_name"), "key 'run_info.experiment_name' is missing", "expected a text"),
        (without("train_info.file_size", "big"), "key 'train_info.file_size' = \"big\"", "expected a number"),
        (without("train_info.file_size", 1e400), "key 'train_info.file_size' = Infinity", "expected a number"),
        (without("train_info.metrics", []), "'train_info.metrics[-1].test accuracy' is missing", "expected a number"),
        (without("train_info.metrics", [3]), "key 'train_info.metrics' ends with 3", "expected a list of objects"),
        ([1, 2], "key 'run_info.train_config' is missing", "expected an object"),
    ],
)
def test_another_schema_is_one_line(
    other: Any, key: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = folder(tmp_path / "in", content(), other)
    assert cli.main(["import-peft", str(found), "--to", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"'{found / '1.json'}' is no result of PEFT's method_comparison/MetaMathQA" in line
    assert key in line
    assert line.endswith(expected)
    assert not (tmp_path / "out").exists()


def test_no_folder_no_result_no_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, broken = folder(tmp_path / "empty"), folder(tmp_path / "broken", content())
    (broken / "0.json").write_bytes(b"\xff{")
    (broken / "taken").write_text("a file")
    good = folder(tmp_path / "good", content())
    for given, to, message in (
        (tmp_path / "nothing", "out", "is not a folder"),
        (empty, "out", "no *.json in"),
        (broken, "out", "expected a file of JSON"),
        (good, "broken/taken", "cannot be made"),
    ):
        assert cli.main(["import-peft", str(given), "--to", str(tmp_path / to)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(REAL is None, reason="HARNESS_PEFT_RESULTS names no folder of PEFT's results")
def test_the_published_results(tmp_path: Path) -> None:
    assert REAL is not None
    assert cli.main(["import-peft", REAL, "--to", str(tmp_path)]) == 0
    found = rows(tmp_path / "peft.csv")
    assert len(found) == len(list(Path(REAL).glob("*.json")))
    for row in found:
        published = json.loads((Path(REAL) / row["file"]).read_text())
        assert float(row["test_accuracy"]) == published["train_info"]["metrics"][-1]["test accuracy"]
        assert int(row["parameters"]) == published["train_info"]["num_trainable_params"]
