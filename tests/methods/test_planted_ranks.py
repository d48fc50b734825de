"""The planted-ranks script, on a seed or two: every method runs or says why not, and one that is known to find what was
planted does."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.errors import Diverged, InputError
from harness.registry import METHODS, registered

with pytest.MonkeyPatch.context() as path:
    path.syspath_prepend(SCRIPTS := Path(__file__).parents[2] / "scripts")
    script: Any = importlib.import_module("planted_ranks")
Planted, Run, solve = script.Planted, script.Run, script.solve
ORACLES = [text for text in script.METHODS if "components=planted" in text]
NO_RESULT = {  # of a method that cannot work on this network
    "head": "the backbone has no head to train",
    "bitfit": "the backbone has no bias",
    "hadapter": "Network has no encoder layer of transformers'",
    "padapter": "Network has no encoder layer of transformers'",
    "plop": "all layers are of one module type",
    "flylora": "what is trained is no change of the layers' weights",
    "mora": "what is trained is no change of the layers' weights",
    "queryable_lora": "what is trained is no change of the layers' weights",
}
NEEDED = {"peft": "peft[type=lora]"}  # what has no default


def test_the_problem_is_a_change_of_known_rank():
    problem = Planted(3)
    assert sum(rank > 0 for rank in problem.ranks) == 3
    assert set(problem.ranks) <= {0, 1, 2, 3}
    batch = problem.collate(None, range(64), None)
    assert float(problem.loss(problem.network, batch, None)) == pytest.approx(1, rel=0.5)
    assert torch.equal(batch.labels, Planted(3).collate(None, range(64), None).labels)


def test_the_wide_problem_has_24_layers_of_which_5_are_changed():
    problem = Planted(0, script.WIDE)
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


def test_the_change_is_what_the_layers_compute():
    problem = Planted(0)
    assert problem.change().abs().max() < 1e-6
    first, second = problem.network.layers[:2]
    added = torch.randn(16, 16)
    first.weight += added  # its own weight, as a method that trains it does
    second.register_forward_hook(lambda layer, inputs, output: output + inputs[0] @ added.T)  # and an adapter beside it
    expected = torch.zeros_like(problem.frozen)
    expected[:2] = added
    torch.testing.assert_close(problem.change(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", registered(METHODS))
def test_every_method_runs_or_says_why_not(name):
    run = Run(NEEDED.get(name, name), {}, 0, 120, noise=0.5)  # as few batches as their schedules take
    outcome = solve(run)
    if name in NO_RESULT:
        assert NO_RESULT[name] in outcome
        return
    assert isinstance(outcome, script.Outcome), outcome
    assert 0 <= outcome.total <= 6 * 16
    assert outcome.error < 2
    assert outcome.before + outcome.updates + outcome.beside == run.batches
    assert outcome.updates > 0


@pytest.mark.parametrize("text", script.METHODS)
def test_every_row_runs(text):
    outcome = solve(Run(text, {}, 0, 60, noise=0.5))
    assert 0 <= outcome.total <= 24
    assert outcome.error < 2


@pytest.mark.parametrize("text", ORACLES)
def test_an_oracle_ends_with_as_many_components_as_are_planted(text):
    assert solve(Run(text, {}, 1, 40)).total == sum(Planted(1).ranks)


def test_implicit_finds_the_planted_ranks():
    [implicit] = [text for text in script.METHODS if "implicit" in text]
    outcome = solve(Run(implicit, {}, 0, 2000))
    assert outcome.layers
    assert outcome.ranks
    assert outcome.effective
    assert outcome.error < 1e-3


def test_a_lora_loses_the_singular_values_that_do_not_count():
    outcome = solve(Run("lora", {}, 0, 1))  # after one update all are below 0.1
    assert outcome.total == 0
    assert outcome.error == pytest.approx(1)


def test_a_method_is_given_what_it_has_of_the_common_parameters():
    problem = Planted(1)
    lora, matryoshka = (Run(name, {}, 1).method(problem) for name in ("lora", "matryoshka"))
    assert (lora.learning_rate, lora.rank, lora.alpha) == (0.01, 4, pytest.approx(8 / 3))
    assert (matryoshka.learning_rate, matryoshka.rank) == (0.01, 4)  # it has no alpha
    assert Run("adalora", {}, 1).method(problem).init_rank == 4
    assert Run("lora[r=2]", {}, 1).method(problem).rank == 2  # by PEFT's name, too
    assert Run("lora[r=2]", {"rank": 3}, 1).method(problem).rank == 3


@pytest.mark.parametrize(
    ("value", "known"),
    [
        ("planted", sum(Planted(1).ranks)),
        ("2*planted", 2 * sum(Planted(1).ranks)),
        ("planted_layers", 3),
        ("8/3*num_layers", 16),
        ("1/4*num_layers", 1.5),
        ("random", "random"),
        (0.5, 0.5),
    ],
)
def test_a_word_says_what_is_known_of_the_problem(value, known):
    told = Planted(1).told(value)
    assert told == known
    assert type(told) is type(known)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lora[rank=40]", "rank = 40 is above the smaller side of layer 'layers.0'"),
        ("lora[ranks=0123abc]", "'0123abc' names an earlier run, and there is none here"),
        ("lora[ranks_of=debora]", "ranks_of names another configuration, and there is none here"),
        ("eva", "eva reads at least 3 batches before the first update, and the budget is 3"),
    ],
)
def test_what_a_method_cannot_do_here_is_said(text, said, capsys):
    assert said in solve(Run(text, {}, 0, 3))
    assert capsys.readouterr().err == ""


def test_the_upper_stream_has_the_share_that_the_method_says(monkeypatch):
    problem, run = Planted(0), Run("lora", {}, 0, 1)
    method = run.method(problem)
    monkeypatch.setattr(type(method), "upper_share", 0.25)
    training, _ = script.trained(method, problem, run)
    rows = {row for _ in range(32) for row in training.data.draw("upper")}
    assert len(rows) == 4096 / 4


def test_batches_are_told_apart():
    read_first = solve(Run("gora[batches=7]", {}, 0, 40))
    assert (read_first.before, read_first.updates, read_first.beside) == (7, 33, 0)
    bilevel = solve(Run("debora[recipe=paper,T_max=5]", {}, 0, 40))
    assert bilevel.before == 0
    assert bilevel.beside > 0  # the upper level's


class Failing:
    """In the place of a loss that fails at the third batch."""

    def __init__(self, error: Exception) -> None:
        self.error, self.called = error, 0

    def __call__(self, model, batch, generator):
        self.called += 1
        if self.called == 3:
            raise self.error
        return model(**batch.inputs).square().mean()


@pytest.mark.parametrize(
    ("error", "said", "traced"),
    [
        (RuntimeError("no more memory"), "seed 5: RuntimeError: no more memory", True),
        (Diverged("the loss is nan"), "seed 5: the loss is nan", False),
        (InputError("too few rows"), "seed 5: too few rows", False),
    ],
)
def test_what_goes_wrong_is_said(error, said, traced, monkeypatch, capsys):
    failing = Failing(error)
    monkeypatch.setattr(Planted, "loss", lambda problem, *given: failing(*given))
    assert solve(Run("lora", {}, 5, 10)) == said
    assert ("Traceback" in capsys.readouterr().err) == traced


@pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias")
def test_a_model_that_is_no_network_with_other_weights_has_no_ranks_to_compare():
    assert "there are no ranks to compare" in solve(Run("peft[type=beft]", {}, 0, 5))  # it trains new biases


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("3", [0, 1, 2]),
        ("40-42", [40, 41, 42]),
        ("3,", [3]),
        ("0,2,4-6", [0, 2, 4, 5, 6]),
        ("0-1,60-61", [0, 1, 60, 61]),
    ],
)
def test_seeds_are_a_count_a_range_or_a_list(text, seeds):
    assert script.seeds_of(text) == seeds


def table_of(monkeypatch, capsys, *given: str) -> list[list[str]]:
    """The cells of the table's rows, the headers first."""
    monkeypatch.setattr(sys, "argv", ["planted_ranks.py", *given, "--jobs", "1"])
    script.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    headers, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return [headers, *rows]


def test_the_table_has_a_row_for_each_value_of_a_sweep_in_order(monkeypatch, capsys):
    given = ["--seeds", "4-5", "--batches", "5", "--methods", "lora", "--sweep", "rank=4,2"]
    headers, *rows = table_of(monkeypatch, capsys, *given)
    assert headers[-1] == "CPU s"
    assert [row[0] for row in rows] == ["lora[rank=4]", "lora[rank=2]"]
    for (_, *counts, components, median, mean, batches, _), rank in zip(rows, (4, 2), strict=True):
        outcomes = [solve(Run("lora", {"rank": rank}, seed, 5)) for seed in (4, 5)]
        assert counts == ["0 of 2"] * 3
        assert float(components) == pytest.approx(sum(outcome.total for outcome in outcomes) / 2)
        assert float(median) == pytest.approx(sum(outcome.error for outcome in outcomes) / 2, rel=0.01)
        assert median == mean
        assert batches == "0 + 5 + 0"


def test_a_row_without_a_result_says_why(monkeypatch, capsys):
    headers, lora, head, large = table_of(
        monkeypatch, capsys, "--seeds", "1-2", "--batches", "3", "--methods", "lora,head,eva[rank=16]"
    )
    assert headers[-1] == "remark"
    assert lora[-1] == ""
    assert head == ["head", *[""] * 8, "no result on 2 of 2; seed 1: the backbone has no head to train"]
    assert "seed 1: rank = 16 and rho = 2 let a layer have 32 components" in large[-1]


def test_a_seed_without_a_result_counts_as_one_where_nothing_is_found():
    found = script.Outcome(True, True, True, 5, 0.5, 0, 3, 0, 1.0)
    name, *counts, components, median, mean, batches, seconds, remark = script.row_of("lora", [found, "seed 7: no"])
    assert counts == ["1 of 2"] * 3
    assert (name, components, median, mean, batches, seconds) == ("lora", 5, 0.5, 0.5, "0 + 3 + 0", 1.0)
    assert remark == "no result on 1 of 2; seed 7: no"


def test_a_process_of_its_own_gives_the_same(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)  # where the process looks for the script
    run = Run("lora", {}, 4, 5)
    [apart] = script.solved([run], 2)
    assert apart[:4] == solve(run)[:4]
    assert apart.error == pytest.approx(solve(run).error, rel=1e-4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--seeds", "5-3"], "argument --seeds: '5-3' is not allowed: give a count (20), a range (40-59)"),
        (["--noise", "-1"], "--noise -1.0 is not allowed: it is at least 0"),
        (["--sweep", "rank"], "--sweep 'rank' cannot be read: write parameter=value,value"),
        (["--methods", "lora", "--set", "rank=0"], "lora.rank = 0 is not allowed"),
        (["--methods", "lora[rank=4"], "'lora[rank=4' has an unbalanced bracket"),
        (["--methods", "lora,lara"], "unknown method 'lara'"),
        (["--methods", "lora[rnk=2]"], "unknown parameter of lora 'rnk'"),
    ],
)
def test_bad_input_is_one_line(given, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["planted_ranks.py", *given])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
