"""GLUE whole: truncation of pairs, batches by length, the test sets' submission, the table's average, presets."""

from __future__ import annotations

import csv
import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from harness import registry
from harness.cli import main
from harness.errors import InputError
from harness.plan import sweep_file
from harness.plan.sweep import Sweep, task_cells
from harness.record.store import RecordStore
from harness.run.streams import TrainingData
from harness.splits import make_splits
from harness.task import Examples
from tasks import glue_submission, pretrained
from tasks.glue import TABLE, Glue
from tests.support import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_bert(folder / "bert")
    tiny.write_data_root(folder / "data")
    for task, columns in tiny.GLUE_COLUMNS.items():
        for split in TABLE[task].test:
            rows = tiny.glue_rows(task, tiny.EVALUATION_ROWS, seed=7)
            backwards = {name: rows[name][::-1] for name in (*columns, "idx")} | {"label": [-1] * tiny.EVALUATION_ROWS}
            tiny.write_parquet(folder / f"data/nyu-mll/glue/{task}/{split}-00000-of-00001.parquet", backwards)
    return folder


def glue(member: str, **parameters) -> Glue:
    return Glue.of({"member": member, **parameters}, owner=f"glue/{member}")


def test_a_long_pair_loses_the_end_of_its_longer_text(place):
    texts = {"a": ["the film was good and bad", "plot"], "b": ["odd", "music ending camera actor scene story"]}
    examples = Examples(texts, np.array([0, 1]))
    encoded = glue("rte", max_length=8).encode(examples, str(place / "bert"))
    tokenizer = pretrained.load_tokenizer(str(place / "bert"))
    rows = [encoded.tokens["input_ids"][a:b] for a, b in zip(encoded.starts, encoded.starts[1:], strict=False)]
    assert tokenizer.decode(rows[0]) == "[CLS] the film was good [SEP] odd [SEP]"
    assert tokenizer.decode(rows[1]) == "[CLS] plot [SEP] music ending camera actor [SEP]"
    assert encoded.cut.tolist() == [True, True]
    whole = glue("rte", max_length=11).encode(examples, str(place / "bert"))
    assert whole.cut.tolist() == [False, False]
    assert glue("rte").facts(encoded) == {"truncated_share": 1.0}


def drawn(data: TrainingData, count: int) -> list[tuple[int, ...]]:
    return [data.draw("all") for _ in range(count)]


def test_batches_by_length_hold_every_row_once_a_pass_and_little_padding():
    lengths = np.random.default_rng(0).integers(4, 128, 1003)
    plain, grouped = (TrainingData(1003, 16, 0, by) for by in (None, lengths))
    passes = [np.concatenate(drawn(data, 3 * 63))[: 3 * 1003].reshape(3, 1003) for data in (plain, grouped)]
    for rows in np.concatenate(passes):
        assert sorted(rows) == list(range(1003))
    assert not (passes[1][0] == passes[1][1]).all()

    def padding(data: TrainingData) -> float:
        batches = [lengths[list(batch)] for batch in drawn(data, 600)]
        return 1 - sum(batch.sum() for batch in batches) / sum(16 * batch.max() for batch in batches)

    assert padding(plain) > 0.4
    assert padding(grouped) < 0.06  # also in passes whose first batch began in the one before


def test_batches_by_length_are_the_same_for_a_seed_and_in_random_order():
    lengths = np.random.default_rng(0).integers(4, 128, 640)
    one, two, other = (TrainingData(640, 16, seed, lengths) for seed in (3, 3, 4))
    two.draw("upper")
    assert drawn(one, 90) == drawn(two, 90)
    batches = drawn(other, 40)
    assert batches != drawn(TrainingData(640, 16, 3, lengths), 40)
    means = [lengths[list(batch)].mean() for batch in batches]
    assert abs(np.corrcoef(means, range(40))[0, 1]) < 0.5
    halves = [
        set(np.concatenate([data.draw(stream) for _ in range(20)])) for data in (one,) for stream in ("lower", "upper")
    ]
    assert not halves[0] & halves[1]


def test_reserved_rows_are_neither_trained_on_nor_selected_by(place, tmp_path):
    root = str(place / "data")
    whole, part = make_splits(glue("mnli"), root), make_splits(glue("mnli", reserved=10), root)
    assert list(part.evaluation) == ["validation_matched", "validation_mismatched", "reserved"]

    def premises(*splits):
        return [text for split in splits for text in split.columns["premise"]]

    held = part.evaluation["reserved"]
    assert 0 < len(held) <= 10
    assert not set(premises(held)) & set(premises(part.train, part.holdout))
    assert sorted(premises(part.train, part.holdout, held)) == sorted(premises(whole.train, whole.holdout))
    with pytest.raises(InputError, match=r"reserved = 1000 is more than half of the .* training rows of glue/mnli"):
        glue("mnli", reserved=1000).load(root)


def test_batches_by_length_on_the_command_line(place, tmp_path):
    options = ["--methods", "head", "--batches", "4", "--batch-size", "8", "--model", str(place / "bert")]
    options += ["--tasks", "glue/rte", "--data-root", str(place / "data"), "--results", str(tmp_path)]
    assert main(["run", "--executor", "serial", *options, "--group-by-length"]) == 0
    assert main(["run", "--executor", "serial", *options]) == 0
    one, two = RecordStore(tmp_path).records()
    assert {one.spec.train.group_by_length, two.spec.train.group_by_length} == {True, False}


@pytest.fixture(scope="module")
def submitted(place, tmp_path_factory) -> Path:
    """Results with one run of every task that kept its test predictions, and one of RTE that did not."""
    results = tmp_path_factory.mktemp("results")
    options = ["--methods", "head", "--batches", "2", "--model", str(place / "bert"), "--results", str(results)]
    options += ["--data-root", str(place / "data")]
    assert main(["run", "--executor", "serial", "--tasks", "glue", *options, "--predict-test"]) == 0
    assert main(["run", "--executor", "serial", "--tasks", "glue/rte,digits", "--seeds", "1,", *options]) == 0
    return results


@pytest.fixture
def official_rows(monkeypatch) -> None:
    """The tiny test sets' sizes for the official ones."""
    files = [
        glue_submission.TestFile(*file[:3], tiny.EVALUATION_ROWS, *file[4:]) if file.task[5:] in TABLE else file
        for file in glue_submission.TEST_FILES
    ]
    monkeypatch.setattr(glue_submission, "TEST_FILES", tuple(files))


def runs_of(results: Path, seed: int = 0) -> dict[str, str]:
    return {r.spec.task: r.run_id for r in RecordStore(results).records() if r.spec.seed == seed}


def test_submission_in_the_official_format(submitted, official_rows, place, tmp_path, capsys):
    runs = runs_of(submitted)
    to = tmp_path / "glue.zip"
    assert main(["export-glue", *runs.values(), "--results", str(submitted), "--to", str(to)]) == 0
    assert "no run given for WNLI.tsv, AX.tsv" in capsys.readouterr().out
    allowed = {
        **dict.fromkeys(("CoLA", "SST-2", "MRPC", "QQP", "WNLI"), ("0", "1")),
        **dict.fromkeys(("MNLI-m", "MNLI-mm", "AX"), ("entailment", "neutral", "contradiction")),
        **dict.fromkeys(("QNLI", "RTE"), ("entailment", "not_entailment")),
        "STS-B": None,
    }
    with zipfile.ZipFile(to) as archive:
        assert archive.testzip() is None
        assert sorted(archive.namelist()) == sorted(f"{name}.tsv" for name in allowed)
        for name, values in allowed.items():
            rows = list(csv.reader(io.StringIO(archive.read(f"{name}.tsv").decode()), delimiter="\t"))
            assert rows[0] == ["index", "prediction"]
            assert [row[0] for row in rows[1:]] == [str(n) for n in range(len(rows) - 1)]
            predicted = [row[1] for row in rows[1:]]
            if values is None:
                assert all(0 <= float(value) <= 5 for value in predicted)
            else:
                assert set(predicted) <= set(values)
        cola = archive.read("CoLA.tsv").decode()
    task = glue("cola")
    (test,) = task.test(str(place / "data")).values()
    assert test.columns["sentence"] == tiny.glue_rows("cola", tiny.EVALUATION_ROWS, seed=7)["sentence"]  # by idx
    from safetensors.numpy import load_file

    kept = load_file(RecordStore(submitted).folder(runs["glue/cola"]) / "predictions.safetensors")
    assert "test/references" not in kept
    assert [int(line.split("\t")[1]) for line in cola.splitlines()[1:]] == kept["test/predictions"].tolist()
    again = tmp_path / "again.zip"
    assert main(["export-glue", *runs.values(), "--results", str(submitted), "--to", str(again)]) == 0
    assert again.read_bytes() == to.read_bytes()


def test_test_predictions_are_no_part_of_a_runs_identity(submitted, place, capsys):
    options = ["--methods", "head", "--batches", "2", "--model", str(place / "bert"), "--results", str(submitted)]
    assert main(["run", "--executor", "serial", "--tasks", "glue", *options, "--data-root", str(place / "data")]) == 0
    assert "8 finished before, 0 to do" in capsys.readouterr().out
    options += ["--data-root", str(place / "data"), "--seeds", "1,", "--predict-test"]
    assert main(["run", "--executor", "serial", "--tasks", "glue/rte", *options]) == 0
    assert "1 of the finished runs have kept no predictions for the test set" in capsys.readouterr().out


def test_damaged_predictions_make_no_submission(submitted, tmp_path, capsys):
    results = shutil.copytree(submitted, tmp_path / "results")
    run = runs_of(results)["glue/cola"]
    (RecordStore(results).folder(run) / "predictions.safetensors").write_bytes(b"no tensors")
    assert main(["export-glue", run, "--results", str(results), "--to", str(tmp_path / "x.zip")]) == 2
    told = capsys.readouterr().err
    assert run in told
    assert "make the run again" in told


def test_runs_that_make_no_submission(submitted, place, tmp_path, capsys):
    runs, others = runs_of(submitted), runs_of(submitted, seed=1)
    to = tmp_path / "x.zip"
    cases = {
        ("nosuchrun",): ["unknown run", "nosuchrun"],
        (runs["glue/cola"][:-1] + "x",): [f"Did you mean '{runs['glue/cola']}'"],
        (others["digits"],): ["is on digits, which is no task of glue"],
        (others["glue/rte"],): ["kept no predictions for the test set", "--predict-test"],
        (runs["glue/rte"], others["glue/rte"]): ["are both on glue/rte", "give one"],
        (runs["glue/mnli"],): ["MNLI-m.tsv would have 24 rows", "9,796"],
    }
    for given, pieces in cases.items():
        assert main(["export-glue", *given, "--results", str(submitted), "--to", str(to)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert [piece for piece in pieces if piece not in error] == [], error
    assert list(tmp_path.iterdir()) == []
    options = ["--methods", "head", "--predict-test", "--results", str(tmp_path / "results")]
    assert main(["run", "--tasks", "digits", *options]) == 2
    assert "--predict-test: task 'digits' has no unlabelled test split" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_submission_of_regression_is_clipped_and_sizes_are_the_official_ones():
    values = np.linspace(-1, 7, 1379)
    files, notes = Glue.submission({"glue/stsb": {"test": values}})
    assert [line.split("\t")[1] for line in files["STS-B.tsv"].splitlines()[1:]] == [
        f"{v:.3f}" for v in values.clip(0, 5)
    ]
    assert len(notes) == 1
    rows = {name: len(content.splitlines()) - 1 for name, content in files.items()}
    assert rows == {
        "CoLA.tsv": 1063,
        "SST-2.tsv": 1821,
        "MRPC.tsv": 1725,
        "STS-B.tsv": 1379,
        "MNLI-m.tsv": 9796,
        "MNLI-mm.tsv": 9847,
        "QNLI.tsv": 5463,
        "QQP.tsv": 390965,
        "RTE.tsv": 3000,
        "WNLI.tsv": 146,
        "AX.tsv": 1104,
    }


def test_average_of_the_published_row_and_of_a_missing_task():
    full = {  # full fine-tuning in AdaLoRA's table
        "mnli": {"accuracy": 89.90, "validation_mismatched_accuracy": 90.12},
        "sst2": {"accuracy": 95.63},
        "cola": {"matthews_correlation": 69.19},
        "qqp": {"accuracy": 92.40, "f1": 89.80},
        "qnli": {"accuracy": 94.03},
        "rte": {"accuracy": 83.75},
        "mrpc": {"accuracy": 89.46, "f1": 92.0},
        "stsb": {"pearson": 91.60, "spearmanr": 91.0},
    }
    # 92.40 and 89.80 count as 91.10; MRPC's F1, Spearman and the mismatched set not at all
    assert Glue.average(full) == pytest.approx((89.90 + 95.63 + 69.19 + 91.10 + 94.03 + 83.75 + 89.46 + 91.60) / 8)
    assert Glue.average({name: found for name, found in full.items() if name != "rte"}) is None
    assert registry.task_class("digits").average({}) is None


@pytest.mark.parametrize("name", ["glue-small", "glue-base", "glue-large", "cifar10", "cifar10-small"])
def test_presets_are_sweeps(name):
    sweep = Sweep.of(sweep_file.read(sweep_file.preset(name)), name)
    cells = task_cells(sweep)
    assert len(cells) == (8 if name.startswith("glue") else 1)


def test_a_sentencepiece_tokenizer_as_deberta_v3_has_it(tmp_path, place):
    """config.json, spm.model and tokenizer_config.json, and no tokenizer.json: what the Hub has."""
    import sentencepiece
    import transformers

    folder = tmp_path / "deberta"
    folder.mkdir()
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(" ".join(tiny.FILLERS + tiny.SIGNS + tiny.MARKS) for _ in range(20)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "spm"), vocab_size=60, hard_vocab_limit=False,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]",
        unk_piece="[UNK]", minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "vocab_type": "spm"}))
    config = transformers.DebertaV2Config(
        vocab_size=80, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.DebertaV2Model(config).save_pretrained(folder)
    task = glue("rte", max_length=32)
    train = make_splits(task, str(place / "data")).train
    encoded = task.encode(train, str(folder))
    tokenizer = pretrained.load_tokenizer(str(folder))
    rows = encoded.tokens["input_ids"][encoded.starts[0] : encoded.starts[1]]
    assert tokenizer.decode(rows).startswith("[CLS]")
    assert train.columns["sentence1"][0] in tokenizer.decode(rows)
    assert task.backbone(str(folder)).head == ("pooler", "classifier")
