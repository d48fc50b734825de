"""The planted-ranks script, on a seed or two: every row runs, and one that is known to find what was planted does."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[3] / "scripts" / "planted_ranks.py"
SCRIPT = runpy.run_path(str(PATH))
Planted, Run, solve = SCRIPT["Planted"], SCRIPT["Run"], SCRIPT["solve"]
ORACLES = [name for name in SCRIPT["SETTINGS"] if "(oracle)" in name]


def test_the_problem_is_a_change_of_known_rank():
    problem = Planted(3)
    assert sum(rank > 0 for rank in problem.ranks) == 3
    assert set(problem.ranks) <= {0, 1, 2, 3}
    batch = problem.collate(None, range(64), None)
    assert float(problem.loss(problem.network, batch, None)) == pytest.approx(1, rel=0.5)
    assert torch.equal(batch.labels, Planted(3).collate(None, range(64), None).labels)


def test_the_wide_problem_has_24_layers_of_which_5_are_changed():
    problem = Planted(0, SCRIPT["WIDE"])
    assert len(problem.ranks) == 24
    assert sum(rank > 0 for rank in problem.ranks) == 5
    assert 1 < problem.targets.std() < 10


def test_the_noise_is_in_the_labels_and_not_in_the_error():
    clean, noisy = Planted(1), Planted(1, noise=2.0)
    rows = range(4096)
    none = torch.zeros_like(clean.frozen)
    difference = noisy.collate(None, rows, None).labels - clean.collate(None, rows, None).labels
    assert float(difference.std()) == pytest.approx(2 * float((clean.targets - clean.output(none)).std()), rel=0.05)
    assert clean.error(none) == noisy.error(none) == pytest.approx(1)
    labels = noisy.collate(None, rows, None)
    assert float(noisy.loss(noisy.network, labels, None)) == pytest.approx(5, rel=0.1)


@pytest.mark.parametrize("name", SCRIPT["SETTINGS"])
def test_every_setting_runs(name):
    outcome = solve(Run(name, {}, 0, 60, noise=0.5))
    assert 0 <= outcome.total <= 24
    assert outcome.error < 2


@pytest.mark.parametrize("name", ORACLES)
def test_an_oracle_ends_with_as_many_components_as_are_planted(name):
    assert solve(Run(name, {}, 1, 40)).total == sum(Planted(1).ranks)


def test_implicit_finds_the_planted_ranks():
    outcome = solve(Run("matrix, recipe=paper, implicit", {}, 0))
    assert outcome.layers
    assert outcome.ranks
    assert outcome.effective
    assert outcome.error < 1e-3


def test_a_lora_loses_the_singular_values_that_do_not_count():
    outcome = solve(Run("lora, rounded", {}, 0, 1))  # after one update all are below 0.1
    assert outcome.total == 0
    assert outcome.error == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("3", [0, 1, 2]), ("40-42", [40, 41, 42]), ("3,", [3]), ("0,2,4-6", [0, 2, 4, 5, 6])],
)
def test_seeds_are_a_count_a_range_or_a_list(text, seeds):
    assert SCRIPT["seeds_of"](text) == seeds


def test_the_table_has_a_row_for_each_value_of_a_sweep_in_order(monkeypatch, capsys):
    given = ["--seeds", "4-5", "--batches", "5", "--settings", "lora, rounded", "--sweep", "rank=4,2", "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", ["planted_ranks.py", *given])
    SCRIPT["main"]()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    names, *counts, components, median, mean, _ = zip(*(re.split(r" *\| *", line)[1:-1] for line in lines), strict=True)
    assert names[2:] == ("lora, rounded[rank=4]", "lora, rounded[rank=2]")
    for row, rank in ((2, 4), (3, 2)):
        outcomes = [solve(Run("lora, rounded", {"rank": rank}, seed, 5)) for seed in (4, 5)]
        assert [column[row] for column in counts] == ["0 of 2"] * 3
        assert float(components[row]) == pytest.approx(sum(outcome.total for outcome in outcomes) / 2)
        assert float(median[row]) == pytest.approx(sum(outcome.error for outcome in outcomes) / 2, rel=0.01)
        assert median[row] == mean[row]


def test_a_process_of_its_own_gives_the_same(monkeypatch):
    monkeypatch.syspath_prepend(PATH.parent)
    script = importlib.import_module("planted_ranks")  # by a name that the process can import
    run = script.Run("lora, rounded", {}, 4, 5)
    [apart] = script.solved([run], 2)
    assert apart[:4] == script.solve(run)[:4]
    assert apart.error == pytest.approx(script.solve(run).error, rel=1e-4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--seeds", "5-3"], "argument --seeds: '5-3' is not allowed: give a count (20), a range (40-59)"),
        (["--noise", "-1"], "--noise -1.0 is not allowed: it is at least 0"),
        (["--sweep", "rank"], "--sweep 'rank' cannot be read: write parameter=value,value"),
        (["--settings", "lora, rounded", "--set", "rank=0"], "lora.rank = 0 is not allowed"),
    ],
)
def test_bad_input_is_one_line(given, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["planted_ranks.py", *given])
    with pytest.raises(SystemExit) as stopped:
        SCRIPT["main"]()
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
