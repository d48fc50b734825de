"""The whole program on real data and weights: needs HARNESS_DATA_ROOT, a folder in the Hub's layout."""

import os
from pathlib import Path

import pytest

from harness.cli import main
from harness.record.store import RecordStore

ROOT = Path(os.environ.get("HARNESS_DATA_ROOT", ""))
pytestmark = pytest.mark.skipif("HARNESS_DATA_ROOT" not in os.environ, reason="HARNESS_DATA_ROOT is not set")


def model(name: str) -> str:
    folder = ROOT / "models" / name
    if not folder.is_dir():
        pytest.skip(f"no models/{name} in HARNESS_DATA_ROOT")
    return str(folder)


def run(tmp_path, *options) -> list:
    assert main(["run", "--executor", "serial", "--results", str(tmp_path), *options]) == 0
    return list(RecordStore(tmp_path).records())


def test_glue_with_four_methods(tmp_path, capsys):
    options = ["--methods", "debora[T_max=2,n0=0,step_size=0.5],lora,full,head", "--limit", "100", "--batches", "9"]
    tasks = "glue/cola,glue/mrpc,glue/stsb,glue/mnli"
    records = run(tmp_path, *options, "--tasks", tasks, "--model", model("bert-tiny"))
    assert [record.status for record in records] == ["done"] * 16
    metrics = {record.spec.task: set(record.metrics) for record in records}
    assert metrics == {
        "glue/cola": {"matthews_correlation"},
        "glue/mrpc": {"accuracy", "f1"},
        "glue/stsb": {"pearson", "spearmanr"},
        "glue/mnli": {"accuracy", "validation_mismatched_accuracy"},
    }
    for record in records:
        assert record.batches == 9
        assert record.rows["train"] + record.rows["holdout"] == 100
    ranks = {sum(r.ranks.values()) for r in records if r.spec.method == "debora"}
    assert ranks
    assert max(ranks) < 12 * 8  # components were removed
    assert "glue/mnli" in capsys.readouterr().out


def test_cifar10_with_convolutions(tmp_path):
    options = ["--methods", "head,lora[rank=2],debora[rank=2]", "--limit", "40", "--batches", "2", "--batch-size", "8"]
    tasks = "cifar10[image_size=32]"
    records = run(tmp_path, *options, "--tasks", tasks, "--model", model("resnet50-half"))
    status = {record.spec.method: record.status for record in records}
    assert status == {"head": "done", "lora": "done", "debora": "done"}
    (debora,) = [record for record in records if record.spec.method == "debora"]
    assert len(debora.ranks) == 53  # every convolution


def test_counts_on_deberta_v3_from_its_configuration_alone(tmp_path, capsys):
    options = ["--methods", "lora[rank=8],lora[rank=2],head,full", "--tasks", "glue/cola", "--dry-run"]
    assert main(["run", *options, "--model", model("deberta-v3-base-config"), "--results", str(tmp_path)]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if "glue/cola" in line}
    head = f"{590_592 + 2 * 768 + 2:,}"
    assert rows["lora"][2:4] == ["1,327,104", head]
    assert rows["lora[rank=2]"][2:4] == ["331,776", head]
    assert rows["head"][2:4] == ["0", head]
    assert not list(tmp_path.iterdir())


def test_a_model_without_weights_or_tokenizer_is_found_before_the_first_run(tmp_path, capsys):
    options = ["--methods", "head", "--tasks", "glue/cola", "--limit", "50", "--results", str(tmp_path / "results")]
    assert main(["run", *options, "--model", model("deberta-v3-base-config")]) == 2
    assert "deberta-v3-base-config" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
