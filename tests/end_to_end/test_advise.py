"""`advise` from a sweep to a configuration that PEFT loads, and the sweep that confirms it."""

import json

import pytest
from peft import LoraConfig, get_peft_model

from harness.cli import main
from harness.contracts.subject import task_of
from harness.record.store import RecordStore


def run(tmp_path, *extra):
    where = ["--executor", "serial", "--tracking-uri", "off", "--results", str(tmp_path)]
    return main(["run", "--tasks", "digits", "--batches", "12", "--seeds", "2", *where, *extra])


def test_a_sweep_its_advice_and_stock_peft(tmp_path, capsys):
    assert run(tmp_path, "--methods", "lora[rank=2,learning_rate=0.05],lora[rank=4]") == 0
    capsys.readouterr()
    file = tmp_path / "peft" / "adapter_config.json"
    assert main(["advise", "--results", str(tmp_path), "--margin", "100", "--to", str(file)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "digits (accuracy): lora[learning_rate=0.05,rank=2]" in text
    assert "2 seeds and 143 examples" in text
    of_two = next(r for r in RecordStore(tmp_path).records() if r.spec.method_parameters["rank"] == 2)
    for config in (LoraConfig(**json.loads(file.read_text())), LoraConfig.from_pretrained(str(file.parent))):
        peft = get_peft_model(task_of("digits").backbone(None).module, config)
        assert peft.get_nb_trainable_parameters()[0] == of_two.parameters.adapter_final
    assert (
        main(
            [
                "run",
                "--config",
                str(file.with_suffix(".toml")),
                "--results",
                str(tmp_path),
                "--executor",
                "serial",
                "--tracking-uri",
                "off",
            ]
        )
        == 0
    )
    assert "2 runs: 2 finished before, 0 to do" in capsys.readouterr().out  # the very runs that were measured


def test_ranks_that_were_searched_are_trained_as_a_lora_to_confirm_them(tmp_path, capsys):
    methods = "pruned_lora[rank=4,keep=0.5,selection=random,learning_rate=0.05],lora[rank=4]"
    assert run(tmp_path, "--methods", methods) == 0
    capsys.readouterr()
    assert main(["advise", "--results", str(tmp_path), "--margin", "100"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "to be confirmed: a LoRA of these ranks" in text
    before = RecordStore(tmp_path).run_ids()
    sweep = tmp_path / "advice" / "digits.toml"
    assert (
        main(
            ["run", "--config", str(sweep), "--results", str(tmp_path), "--executor", "serial", "--tracking-uri", "off"]
        )
        == 0
    )
    capsys.readouterr()
    config = LoraConfig(**json.loads(sweep.with_suffix(".json").read_text()))
    peft = get_peft_model(task_of("digits").backbone(None).module, config)
    trained = [each for each in RecordStore(tmp_path).records() if each.run_id not in before]
    assert [each.spec.method for each in trained] == ["lora", "lora"]
    assert {each.parameters.adapter_final for each in trained} == {peft.get_nb_trainable_parameters()[0]}


def test_one_seed_ends_with_one_line_and_2(tmp_path, capsys):
    assert run(tmp_path, "--methods", "lora[rank=2],lora[rank=4]", "--seeds", "1") == 0
    capsys.readouterr()
    assert main(["advise", "--results", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "one seed cannot tell" in printed.err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as end:
        main(["advise", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "chosen on the holdout" in text
    assert "at most 5 %" in text
    assert "python -m harness advise --margin 0.01" in text
