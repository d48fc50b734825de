"""`advise`: it recommends what is shown to be good enough, and a worse one at most 5 % of the time."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from harness import cli
from harness.plan.sweep_file import read
from harness.report.evidence.advise import needed, non_inferior, of_examples, smallest
from harness.report.evidence.pattern import one_pattern
from methods.lora import Lora
from scripts.advise_coverage import Setting, errors, estimates
from tests.support.report_records import record, stored

ROWS = 400
MARGIN = 0.02


# The statistics


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("spread", [(0.01, 0.0, 0.3), (0.01, 0.3, 0.2), (0.03, 0.1, 0.1)])
def test_one_that_is_worse_by_the_margin_is_recommended_at_most_5_percent_of_the_time(seeds, spread):
    """Two configurations are the hardest case: no other one stands in the way of the worse."""
    setting = Setting((-MARGIN, 0.0), seeds, ROWS, *spread)
    wrong, _ = errors(setting, MARGIN, sweeps=600, seed=1)
    assert wrong <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 600)


@pytest.mark.parametrize(("means", "seeds"), [((-MARGIN, 0.0), 5), ((-MARGIN, 0.0), 3), ((-MARGIN,) * 3 + (0.0,), 5)])
def test_nor_where_few_examples_tell_them_apart(means, seeds):
    """Right or wrong, and alike on nearly all of few examples: a normal interval alone passes 5 to 9 %."""
    setting = Setting(means, seeds, 250, 0.005, 0.5, 0.0, binary=True, alike=0.97)
    wrong, _ = errors(setting, MARGIN, sweeps=400, seed=1)
    assert wrong <= 0.05


def test_of_many_bad_ones_none_is_recommended_because_it_was_lucky():
    setting = Setting((-MARGIN,) * 5 + (0.0,), 3, ROWS, 0.01, 0.0, 0.3)
    wrong, _ = errors(setting, MARGIN, sweeps=200, seed=2)
    assert wrong <= 0.05


def test_the_smallest_of_equally_good_ones_is_recommended_where_there_is_enough_data():
    setting = Setting((-0.2, 0.0, 0.0, 0.0), 5, ROWS, 0.002, 0.02, 0.05)
    x = setting.sweep(np.random.default_rng(0))
    assert smallest([1, 2, 3, 4], non_inferior(estimates(x), MARGIN)) == 1


def test_a_configuration_that_cannot_be_compared_is_not_shown():
    x = Setting((0.0, 0.0, 0.0), 5, ROWS, 0.001, 0.01, 0.02).sweep(np.random.default_rng(0))
    against = estimates(x)
    against[0][2] = None
    adjusted = non_inferior(against, MARGIN)
    assert adjusted[0] == 1
    assert smallest([1, 2, 3], adjusted) == 1


def test_equal_scores_without_any_spread_show_nothing():
    assert of_examples(np.zeros((3, 10))) is None


def test_one_hypothesis_is_false_so_that_two_configurations_need_no_correction():
    x = Setting((0.0, 0.0), 3, ROWS, 0.005, 0.05, 0.1).sweep(np.random.default_rng(3))
    against = estimates(x)
    assert non_inferior(against, MARGIN) == pytest.approx(
        [row[1 - c].p_above(-MARGIN) for c, row in enumerate(against)]
    )


def test_a_bound_and_its_p_value_belong_together():
    each = of_examples(Setting((0.0,), 3, ROWS, 0.005, 0.05, 0.1).sweep(np.random.default_rng(4))[0])
    for level in (0.3, 0.05, 0.004):
        assert each.p_above(each.mean - each.below(level)) == pytest.approx(level, rel=1e-6)
    assert each.p_above(each.mean + 0.1) == 1


def test_more_seeds_or_more_rows_are_what_would_show_it():
    of_seeds = of_examples(np.random.default_rng(5).normal(0, 0.02, (3, 1)) + np.zeros((3, ROWS)))
    assert needed([of_seeds], 0.03, 3, 2).seeds > 3
    random = np.random.default_rng(6)
    of_rows = of_examples(random.normal(0, 0.3, (1, 200)) + random.normal(0, 1e-3, (3, 200)))
    assert needed([of_rows], 0.02 - of_rows.mean, 3, 2).times_rows > 1
    assert needed([of_seeds], -of_seeds.mean - 0.001, 3, 2) is None


# Ranks of several seeds


def test_ranks_become_the_median_scaled_to_the_mean_total():
    assert one_pattern([{"a": 2, "b": 4}, {"a": 2, "b": 4}]) == {"a": 2, "b": 4}
    assert one_pattern([{"a": 1, "b": 4}, {"a": 2, "b": 4}, {"a": 9, "b": 4}]) == {
        "a": 3,
        "b": 4,
    }  # of a total of 8, no layer above its largest
    assert one_pattern([{"a": 1, "b": 2}, {"a": 2, "b": 1}]) == {"a": 2, "b": 1}  # medians of 1.5 up to 2, 4 down to 3
    assert one_pattern([{"a": 0, "b": 3}, {"b": 3}]) == {"a": 0, "b": 3}
    assert one_pattern([{"a": 3}, {"b": 3}, {"c": 3}]) == {"a": 1, "b": 1, "c": 1}
    assert one_pattern([{"a": 0}, {"a": 0}]) == {"a": 0}


# The command


def sweep(folder, shares, seeds=3, kept=True, task="digits", ranks=None, changed=None, **changes):
    """A store of runs of `lora` of these ranks, with a share of right answers on holdout and evaluation for each.
    `changed`: fields of a run's record, by rank and seed."""
    store = stored(folder)
    references = np.random.default_rng(5).integers(0, 2, ROWS)
    hard = np.random.default_rng(99).random(ROWS)
    for place, (rank, share) in enumerate(shares.items()):
        for seed in range(seeds):
            right = [
                0.98 * hard + 0.02 * np.random.default_rng([seed, place, split]).random(ROWS) < share
                for split in (0, 1)
            ]
            values = {
                "method_parameters": Lora(rank=rank).model_dump(mode="json"),
                "method_version": 2,
                "numbers": 100 * rank,
                "ranks": (ranks or {}).get(seed, {"block.0": rank, "block.1": rank}),
                "score": float(right[1].mean()),
                "holdout": {"accuracy": float(right[0].mean())},
                "rows": {"train": 9, "holdout": ROWS, "validation": ROWS},
            }
            made = record("lora", task, seed=seed, **(values | changes | (changed or {}).get((rank, seed), {})))
            arrays = {}
            for split, of_split in zip(("holdout", "validation"), right, strict=True):
                if kept or split != "holdout":
                    arrays[f"{split}/predictions"] = np.where(of_split, references, 1 - references)
                    arrays[f"{split}/references"] = references
            draft = store.draft(made.run_id)
            save_file(arrays, draft / "predictions.safetensors")
            store.write(made, [], draft)
    return store


def advised(folder, capsys, *options):
    code = cli.main(["advise", "--results", str(folder), *options])
    printed = capsys.readouterr()
    return code, " ".join(printed.out.split()), printed.err


def test_the_smallest_that_is_good_enough_with_its_evidence_and_its_files(tmp_path, capsys):
    sweep(tmp_path, {1: 0.6, 2: 0.8, 4: 0.8, 8: 0.8}, seeds=5)
    code, text, _ = advised(tmp_path, capsys, "--margin", "0.05")
    assert code == 0
    assert "digits (accuracy): lora[rank=2], 200 adapter parameters" in text
    assert "less than 0.05 worse than each of the 3 others" in text
    assert "5 seeds and 400 examples" in text
    assert "evaluation: 0." in text
    assert "as it was measured" in text
    config = json.loads((tmp_path / "advice" / "digits.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 16.0)
    assert config["rank_pattern"] == {}
    again = read(tmp_path / "advice" / "digits.toml")
    assert again["methods"] == ["lora[rank=2]"]
    assert again["seeds"] == [0, 1, 2, 3, 4]
    assert again["train"] == {"batches": 100}


def test_it_is_chosen_on_the_holdout_and_not_on_the_evaluation(tmp_path, capsys):
    bad = {"score": 0.1, "metrics": {"accuracy": 0.1}}
    sweep(tmp_path, {2: 0.8, 8: 0.8}, seeds=5, changed={(2, seed): bad for seed in range(5)})
    _, text, _ = advised(tmp_path, capsys, "--margin", "0.05")
    assert "digits (accuracy): lora[rank=2], 200 adapter parameters" in text
    assert "evaluation: 0.100" in text


def test_nothing_is_advised_where_nothing_is_shown(tmp_path, capsys):
    sweep(tmp_path, {2: 0.8, 4: 0.803, 8: 0.806}, seeds=2)
    code, text, _ = advised(tmp_path, capsys, "--margin", "0.0001")
    assert code == 0
    assert "no advice. Of 3 configurations none is shown to be within the margin" in text
    assert not (tmp_path / "advice").exists()


def test_equal_predictions_are_named_as_what_cannot_be_compared(tmp_path, capsys):
    same = {"score": 0.5, "holdout": {"accuracy": 0.5}}
    sweep(tmp_path, {2: 0.8, 8: 0.8}, kept=False, **same)
    _, text, _ = advised(tmp_path, capsys, "--margin", "0.05")
    assert "no advice" in text
    assert "cannot be compared: lora and lora[rank=2] (the same difference at every seed)" in text


def test_an_older_advice_does_not_stay_when_nothing_is_advised(tmp_path, capsys):
    sweep(tmp_path, {2: 0.8, 8: 0.8}, seeds=5)
    advised(tmp_path, capsys, "--margin", "0.05")
    assert (tmp_path / "advice" / "digits.json").exists()
    advised(tmp_path, capsys, "--margin", "0.00001")
    assert not list((tmp_path / "advice").iterdir())


def test_records_without_the_holdouts_predictions_are_judged_on_seeds_alone(tmp_path, capsys):
    sweep(tmp_path, {2: 0.8, 8: 0.8}, seeds=5, kept=False)
    code, text, err = advised(tmp_path, capsys, "--margin", "0.05")
    assert code == 0
    assert "5 seeds alone: the holdout's predictions were not kept, so nothing is said of other examples" in text
    assert err == ""


def test_one_seed_is_refused_with_what_to_do(tmp_path, capsys):
    sweep(tmp_path, {2: 0.8, 8: 0.8}, seeds=1)
    code, text, err = advised(tmp_path, capsys)
    assert (code, text) == (2, "")
    assert err.startswith("error: digits: one seed cannot tell")
    assert "--seeds 3" in err
    assert len(err.splitlines()) == 1


def test_runs_that_never_scored_the_holdout_are_refused(tmp_path, capsys):
    sweep(tmp_path, {2: 0.8, 8: 0.8}, holdout={})
    code, _, err = advised(tmp_path, capsys)
    assert code == 2
    assert "--holdout-points 1" in err


@pytest.mark.parametrize("margin", ["0", "-1", "nan", "inf", "much"])
def test_a_margin_that_is_none_is_refused(tmp_path, capsys, margin):
    sweep(tmp_path, {2: 0.8, 8: 0.8})
    code, _, err = advised(tmp_path, capsys, f"--margin={margin}")
    assert code == 2
    assert f"--margin '{margin}' is not allowed: give a number above 0" in err


def test_a_configuration_with_a_failed_run_is_no_candidate(tmp_path, capsys):
    failed = {"status": "diverged", "score": None, "metrics": {}, "holdout": {}}
    sweep(tmp_path, {2: 0.8, 8: 0.8}, seeds=5, changed={(2, 0): failed})
    _, text, _ = advised(tmp_path, capsys, "--margin", "0.05")
    assert "digits (accuracy): lora, 800 adapter parameters" in text
    assert "no candidate (1 of its runs gave no score): lora[rank=2]" in text


def test_ranks_that_differ_by_seed_are_one_pattern_to_be_confirmed(tmp_path, capsys):
    ranks = {0: {"block.0": 1, "block.1": 3}, 1: {"block.0": 1, "block.1": 3}, 2: {"block.0": 3, "block.1": 1}}
    sweep(tmp_path, {2: 0.8, 8: 0.8}, ranks=ranks)
    _, text, _ = advised(tmp_path, capsys, "--margin", "0.1")
    assert "to be confirmed: a LoRA of these ranks (each layer's median over 3 runs, scaled to the mean total)" in text
    assert f"python -m harness run --config {tmp_path}/advice/digits.toml --results {tmp_path}" in text
    config = json.loads((tmp_path / "advice" / "digits.json").read_text())
    assert config["r"] == 3
    assert config["rank_pattern"] == {r"^block\.0": 1}
    assert config["alpha_pattern"] == {r"^block\.0": 8.0}  # the scale 16 / 2 of every layer
    assert config["lora_alpha"] == 24.0
    assert read(tmp_path / "advice" / "digits.toml")["methods"] == [
        'lora[rank=2,rank_pattern={"block.0"=1,"block.1"=3}]'
    ]


def test_a_method_without_a_lora_gets_its_own_configuration(tmp_path, capsys):
    sweep(tmp_path, {2: 0.8, 8: 0.8}, seeds=5, ranks={seed: {} for seed in range(5)})
    _, text, _ = advised(tmp_path, capsys, "--margin", "0.05")
    assert "no LoRA: its own configuration is" in text
    assert not (tmp_path / "advice" / "digits.json").exists()
    assert read(tmp_path / "advice" / "digits.toml")["methods"] == ["lora[rank=2]"]


def test_several_tasks_have_advices_of_their_own_and_one_over_them(tmp_path, capsys):
    for task in ("digits", "synthetic"):
        sweep(tmp_path, {2: 0.8, 8: 0.8}, seeds=5, task=task)
    _, text, _ = advised(tmp_path, capsys, "--margin", "0.05")
    assert "over 2 tasks (mean of digits, synthetic): lora[rank=2]" in text
    assert {path.name for path in (tmp_path / "advice").iterdir()} == {
        f"{name}.{end}" for name in ("digits", "synthetic", "over-tasks") for end in ("json", "toml")
    }
    assert read(tmp_path / "advice" / "over-tasks.toml")["tasks"] == ["digits", "synthetic"]
    code, _, err = advised(tmp_path, capsys, "--margin", "0.05", "--to", str(tmp_path / "mine.json"))
    assert code == 2
    assert "there are 3 advices: choose one with --tasks" in err
    code, _, _ = advised(tmp_path, capsys, "--margin", "0.05", "--to", str(tmp_path / "mine.json"), "--tasks", "digits")
    assert code == 0
    assert (tmp_path / "mine.json").exists()
    assert (tmp_path / "mine.toml").exists()


def test_a_file_for_peft_does_not_end_in_toml(tmp_path, capsys):
    sweep(tmp_path, {2: 0.8, 8: 0.8})
    code, _, err = advised(tmp_path, capsys, "--to", str(tmp_path / "mine.toml"))
    assert code == 2
    assert "in JSON" in err


def test_damaged_predictions_are_told(tmp_path, capsys):
    store = sweep(tmp_path, {2: 0.8, 8: 0.8}, seeds=5)
    first = store.records()[0]
    (store.folder(first.run_id) / "predictions.safetensors").write_bytes(b"no such file")
    code, _, err = advised(tmp_path, capsys, "--margin", "0.05")
    assert code == 0
    assert f"The predictions of run {first.run_id} cannot be used" in err
