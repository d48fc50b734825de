"""`diff` of two runs and `export` of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import cli
from harness.commands.diff import differences
from harness.record.record import RunRecord
from harness.record.store import RecordStore
from harness.report.forms.card import model_card
from harness.spec import Place
from tests.support.report_records import boards, chosen, record, stored, trial


class TestDiff:
    def test_what_differs_and_nothing_else(self) -> None:
        first = record(ranks={"q": 3, "v": 5}, method_parameters={"rank": 8})
        second = record(ranks={"q": 4, "v": 5}, method_parameters={"rank": 4}, score=0.75)
        assert list(differences(first, second)) == [
            ("spec.method_parameters.rank", "8", "4"),
            ("score", "0.5", "0.75"),
            ("metrics.accuracy", "0.5", "0.75"),
            ("ranks.q", "3", "4"),
        ]
        assert list(differences(first, first)) == []

    def test_one_has_what_the_other_lacks(self) -> None:
        newer = record().environment.model_copy(update={"packages": {"torch": "2.13.0"}})
        assert next(differences(record(), record(environment=newer, error="a\nb" * 40))) == (
            "environment.packages.torch", "-", "2.13.0",
        )  # fmt: skip

    def test_command(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        first, second = record(), record(seed=1)
        stored(tmp_path, first, second)
        results = ["--results", str(tmp_path)]
        assert cli.main(["diff", first.run_id, second.run_id, *results]) == 0
        assert "spec.seed" in capsys.readouterr().out
        assert cli.main(["diff", first.run_id, first.run_id, *results]) == 0
        assert "the same spec" in capsys.readouterr().out
        assert cli.main(["diff", first.run_id, first.run_id[:-1] + "x", *results]) == 2
        assert f"Did you mean '{first.run_id}'?" in capsys.readouterr().err


def with_adapter(folder: Path) -> tuple[RecordStore, RunRecord]:
    run = record(ranks={"q": 3, "v": 5}, rows={"train": 90, "holdout": 10, "validation": 50},
                 place=Place(model="some/model"))  # fmt: skip
    store = stored(folder, record(seed=1, score=0.7, ranks={"q": 3, "v": 5}, place=Place(model="some/model")))
    draft = store.draft(run.run_id)
    (draft / "adapter").mkdir()
    (draft / "adapter" / "adapter_config.json").write_text("{}")
    store.write(run, [], draft)
    return store, run


class TestExport:
    def test_adapter_card_and_record(self, tmp_path: Path) -> None:
        store, run = with_adapter(tmp_path / "results")
        target = tmp_path / "card"
        assert cli.main(["export", run.run_id, "--to", str(target), "--results", str(store.results)]) == 0
        assert sorted(path.name for path in target.iterdir()) == ["README.md", "adapter_config.json", "record.json"]
        handed = RunRecord.parse((target / "record.json").read_bytes())
        assert handed.model_copy(update={"files": run.files}) == run
        assert set(handed.files) == {"README.md", "adapter_config.json"}
        card = (target / "README.md").read_text(encoding="utf-8")
        assert card.startswith('---\nbase_model: "some/model"\nlibrary_name: peft\n')
        for text in (run.spec.data_fingerprint, "| `q` | 3 |", "PeftModel.from_pretrained", "| accuracy | 0.5000 |"):
            assert text in card
        assert f"`{run.spec.method}` (version 1). Provenance: PEFT's. Hyperparameters:" in card
        # Two seeds, 0.5 and 0.7: 12.706 standard errors of 0.1.
        assert "over 2 seeds of this configuration: 0.600 ± 1.271" in card

    def test_card_of_a_chosen_setting_names_no_folder(self) -> None:
        trials = [trial(learning_rate=rate) for rate in (1e-3, 1e-2)]
        run = chosen(trials, 1e-2, place=Place(model="/home/somebody/models/minilm"))
        card = model_card(run, boards(*trials, run), ["adapter_config.json"], "PEFT's")
        assert "Chosen by 2 trials on the holdout: learning_rate." in card
        assert "- model: minilm," in card
        assert "somebody" not in card

    def test_damaged_record(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        store, run = with_adapter(tmp_path)
        (store.folder(run.run_id) / "record.json").write_text("{")
        assert cli.main(["export", run.run_id, "--to", str(tmp_path / "x"), "--results", str(tmp_path)]) == 2
        assert f"the record of run '{run.run_id}' in '{tmp_path}' is damaged" in capsys.readouterr().err

    def test_bad_input(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        store, run = with_adapter(tmp_path / "results")
        other = record(seed=1, place=Place(model="some/model")).run_id
        for arguments, message in (
            (["nosuchrun", "--to", str(tmp_path / "x")], "unknown run in"),
            ([other, "--to", str(tmp_path / "x")], "kept no adapter"),
            ([run.run_id, "--to", str(tmp_path)], "is there already"),
        ):
            assert cli.main(["export", *arguments, "--results", str(store.results)]) == 2
            assert message in capsys.readouterr().err
        assert not (tmp_path / "x").exists()
