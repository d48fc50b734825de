"""A causal language model's loss on a text sample, before and after training, on a tiny Llama of random weights."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from harness import cli
from harness.cli import main
from harness.commands.run_options import place_of
from harness.record.record import PREDICTIONS, RunRecord
from harness.record.store import RecordStore
from tests.support import tiny, tiny_text

TEXT = "the film was good . a story was bad . " * 120
WINDOWS, TOKENS = 3, tiny.SIZES["max_position_embeddings"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"was {'camera ' * n}", "response": ("the film", "a story")[n % 2]} for n in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sample.txt").write_text(TEXT)
    return folder


def run(model: Path, folder: Path, results: Path, *options: str, methods: str = "lora[rank=2]") -> int:
    task = f"generation:{folder / 'pairs.jsonl'}[max_length=24,max_response=4,metric=exact_match]"
    fixed = ("--executor", "serial", "--tracking-uri", "off", "--batches", "6", "--batch-size", "4")
    places = ("--model", str(model), "--results", str(results))
    return main(["run", "--methods", methods, "--tasks", task, *places, *fixed, *options])


@pytest.fixture(scope="module")
def results(model, folder, tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("results")
    sample = ("--forgetting", str(folder / "sample.txt"), "--forgetting-windows", str(WINDOWS))
    methods = "lora[learning_rate=1e-12],lora[learning_rate=0.05]"
    assert run(model, folder, results, *sample, "--seeds", "2", methods=methods) == 0
    return results


def records(results: Path, learning_rate: float) -> list[RunRecord]:
    found = RecordStore(results).read_all().records
    chosen = [each for each in found if each.spec.method_parameters["learning_rate"] == learning_rate]
    return sorted(chosen, key=lambda each: each.spec.seed)


def losses_by_hand(model: Path) -> list[float]:
    """Mean loss of each window, token by token, of the backbone in plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(TEXT, add_special_tokens=False)["input_ids"]
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    found = []
    for window in range(WINDOWS):
        some = torch.tensor(ids[window * TOKENS : (window + 1) * TOKENS])
        with torch.no_grad():
            logs = network(input_ids=some[None]).logits[0].log_softmax(-1)
        found.append(-float(torch.stack([logs[i - 1, some[i]] for i in range(1, TOKENS)]).mean()))
    return found


class TestNumbers:
    def test_untouched_is_the_backbones_own_loss(self, results, model) -> None:
        (record, _) = records(results, 0.05)
        assert record.forgetting is not None
        kept = load_file(RecordStore(results).folder(record.run_id) / PREDICTIONS)
        expected = losses_by_hand(model)
        np.testing.assert_allclose(kept["forgetting/references"], expected, rtol=1e-5)
        assert record.forgetting.untouched == pytest.approx(np.mean(expected), rel=1e-5)
        assert (record.forgetting.windows, record.forgetting.tokens) == (WINDOWS, TOKENS)
        assert record.forgetting.sample == "sample.txt"

    def test_an_adapter_that_does_nothing_forgets_nothing(self, results) -> None:
        for record in records(results, 1e-12):
            assert record.forgetting is not None
            assert record.forgetting.rise == pytest.approx(0, abs=1e-6)

    def test_training_moves_the_loss_of_every_seed_its_own_way(self, results) -> None:
        rises = [record.forgetting.rise for record in records(results, 0.05) if record.forgetting]
        assert len(rises) == 2
        assert rises[0] != rises[1]
        assert all(abs(rise) > 1e-3 for rise in rises)

    def test_it_changes_nothing_else_of_a_run(self, results, model, folder, tmp_path) -> None:
        assert run(model, folder, tmp_path, methods="lora[learning_rate=0.05]") == 0
        (without,) = RecordStore(tmp_path).read_all().records
        (with_sample, _) = records(results, 0.05)
        assert without.run_id == with_sample.run_id
        assert without.forgetting is None
        assert without.result() | {"forgetting": 0} == with_sample.result() | {"forgetting": 0}

    def test_evaluation_batch_size_is_honoured(self, results, model, folder, tmp_path, monkeypatch) -> None:
        from tasks import text_sample

        sizes, losses = [], text_sample.window_losses
        monkeypatch.setattr(text_sample, "window_losses", lambda m, ids: (sizes.append(len(ids)), losses(m, ids))[1])
        sample = ("--forgetting", str(folder / "sample.txt"), "--forgetting-windows", str(WINDOWS))
        learning = "lora[learning_rate=0.05]"
        assert run(model, folder, tmp_path, *sample, "--evaluation-batch-size", "2", methods=learning) == 0
        assert sizes == [2, 1, 2, 1]
        (record,) = RecordStore(tmp_path).read_all().records
        (together, _) = records(results, 0.05)
        assert record.forgetting is not None
        assert together.forgetting is not None
        assert record.forgetting.rise == pytest.approx(together.forgetting.rise, abs=1e-5)

    def test_a_loss_that_is_not_finite_costs_the_number_alone(self, model, folder, tmp_path, monkeypatch) -> None:
        from tasks import text_sample

        monkeypatch.setattr(text_sample, "window_losses", lambda m, ids: torch.full((len(ids),), float("inf")))
        assert run(model, folder, tmp_path, "--forgetting", str(folder / "sample.txt")) == 0
        (record,) = RecordStore(tmp_path).read_all().records
        assert (record.status, record.forgetting) == ("done", None)
        assert record.score is not None
        assert "the untouched backbone on the text sample is not finite" in record.notes[-1]

    def test_its_seconds_are_evaluation(self, model, folder, tmp_path, monkeypatch) -> None:
        from tasks import text_sample

        losses = text_sample.window_losses
        monkeypatch.setattr(text_sample, "window_losses", lambda m, ids: (time.sleep(1), losses(m, ids))[1])
        sample = ("--forgetting", str(folder / "sample.txt"), "--forgetting-windows", "4", "--holdout-points", "0")
        assert run(model, folder, tmp_path, *sample) == 0
        (record,) = RecordStore(tmp_path).read_all().records
        assert record.seconds.evaluation > 2, "before and after training"
        assert record.seconds.training < 1

    @pytest.mark.parametrize("before", [[], [1]], ids=["no start token", "a start token"])
    def test_a_start_token_begins_each_window(self, before, model, folder, tmp_path) -> None:
        from transformers import AutoTokenizer

        from tasks import text_sample
        from tasks.pretrained import load_backbone

        llama = tiny_text.write_llama(tmp_path, tiny_text.sentence_piece("bpe"), positions=TOKENS) if before else model
        tokenizer = AutoTokenizer.from_pretrained(llama)
        module = load_backbone(str(llama), "AutoModelForCausalLM", None, meta=True).module
        found = text_sample.windows(str(folder / "sample.txt"), 2, module, str(llama), None)
        whole = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        taken = TOKENS - len(before)
        assert found.tolist() == [before + whole[:taken], before + whole[taken : 2 * taken]]

    def test_fewer_windows_than_asked_for_are_as_many_as_there_are(self, model, folder, tmp_path) -> None:
        short = tmp_path / "short.txt"
        short.write_text("the film " * (TOKENS // 2 * 2 + 3))
        assert run(model, folder, tmp_path / "r", "--forgetting", str(short), "--forgetting-windows", "50") == 0
        (record,) = RecordStore(tmp_path / "r").read_all().records
        assert record.forgetting is not None
        assert record.forgetting.windows == 2


class TestReport:
    def test_table_and_column(self, results) -> None:
        import pandas as pd

        assert main(["report", "--results", str(results)]) == 0
        table = pd.read_csv(results / "tables" / "forgetting.csv")
        trained = table[table["method"].str.contains("0.05")].iloc[0]
        rises = [record.forgetting.rise for record in records(results, 0.05) if record.forgetting]
        assert trained["rise"] == pytest.approx(np.mean(rises))
        assert trained["low"] < trained["rise"] < trained["high"]
        assert (trained["windows"], trained["seeds"]) == (WINDOWS, 2)
        board = pd.read_csv(results / "tables" / "leaderboard.csv")
        assert board[board["label"].str.contains("0.05")]["forgetting"].iloc[0] == pytest.approx(np.mean(rises))
        assert "Forgetting" in (results / "report.html").read_text()

    def test_runs_of_other_windows_are_not_averaged(self, results, model, folder, tmp_path) -> None:
        import pandas as pd

        sample = ("--forgetting", str(folder / "sample.txt"), "--forgetting-windows")
        for seed, windows in (("0,", "2"), ("1,", "3")):
            assert run(model, folder, tmp_path, *sample, windows, "--seeds", seed) == 0
        assert main(["report", "--results", str(tmp_path)]) == 0
        assert pd.read_csv(tmp_path / "tables" / "leaderboard.csv")["forgetting"].isna().all()
        assert pd.read_csv(tmp_path / "tables" / "forgetting.csv")["windows"].tolist() == [2, 3]


class TestInput:
    @pytest.mark.parametrize(
        ("sample", "expected"),
        [
            ("short", "the text has 2 tokens; one window takes"),
            ("sampel.txt", "(nearest: '"),
            ("binary", "no text in UTF-8"),
        ],
    )
    @pytest.mark.parametrize("dry", [(), ("--dry-run",)])
    def test_refused(self, sample, expected, dry, model, folder, tmp_path, capsys) -> None:
        (folder / "short").write_text("the film")
        (folder / "binary").write_bytes(b"\xff\xfe\x00")
        assert run(model, folder, tmp_path / "r", "--forgetting", str(folder / sample), *dry) == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error
        assert error.startswith(f"error: --forgetting '{folder / sample}'")
        assert expected in error
        assert not (tmp_path / "r").exists()

    def test_a_file_is_known_by_its_whole_path(self, model, folder, tmp_path, monkeypatch, capsys) -> None:
        monkeypatch.chdir(folder)
        (folder / "wikitext").write_text("no sample")
        assert run(model, folder, tmp_path, "--forgetting", "sample.txt") == 0
        (record,) = RecordStore(tmp_path).read_all().records
        assert record.spec.place.forgetting == str(folder / "sample.txt")
        assert run(model, folder, tmp_path, "--forgetting", str(folder / "sample.txt")) == 0
        assert "text sample" not in capsys.readouterr().out
        parsed = place_of(cli._parser().parse_args(["run", "--forgetting", "wikitext"]))
        assert parsed.forgetting == "wikitext"

    @pytest.mark.parametrize("sample", ["~nobody-of-this-name/a.txt", "a" * 5000])
    def test_no_path_at_all_is_refused(self, sample, model, folder, tmp_path, capsys) -> None:
        assert run(model, folder, tmp_path / "r", "--forgetting", sample) == 2
        assert capsys.readouterr().err.startswith(f"error: --forgetting '{sample[:10]}")

    def test_a_task_without_a_language_model_has_no_number(self, folder, tmp_path) -> None:
        sample = ("--forgetting", str(folder / "sample.txt"))
        fixed = ("--executor", "serial", "--tracking-uri", "off", "--batches", "2", "--results", str(tmp_path))
        assert main(["run", "--methods", "lora", "--tasks", "digits", *sample, *fixed]) == 0
        (record,) = RecordStore(tmp_path).read_all().records
        assert record.forgetting is None
        assert record.status == "done"
