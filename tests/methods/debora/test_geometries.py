"""Every geometry and hypergradient in the real loop: feasible, resumable, recorded, and frozen in time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from harness.contracts.methods import (
    a_run_interrupted_after_every_update_equals_the_uninterrupted_one,
    counts_are_right,
    loss_falls_on_a_batch_that_can_be_memorised,
    only_the_intended_parameters_train,
    the_same_seed_gives_the_same_record,
)
from harness.contracts.subject import Subject, start
from harness.errors import Diverged
from harness.method import Backbone
from harness.run.streams import TrainingData
from harness.run.training import Training
from harness.spec import TrainSpec
from harness.task import Batch
from methods.debora.math import frank_wolfe, manifolds
from methods.debora.method import Debora
from methods.debora.schedule import FREE_UPPER_STEPS, UPPER_STEPS
from tests.methods.debora.bert import tiny_backbone
from tests.methods.debora.runs import (
    RECIPES,
    adaptation_of,
    dense,
    empty,
    hypergradient,
    logits,
    logits_without_adapter,
    numbers,
    started,
)

FAST = "recipe=paper,rank=4,T_max=2,step_size=0.5,search_fraction=0.8"
FIXED = f"{FAST},step_rule=fixed"
SETTINGS = {
    "oblique": f"{FIXED},geometry=oblique,n0=1",
    "oblique-vertex": f"{FIXED},geometry=oblique,start_at=vertex,n0=4,budget_scope=global",
    "stiefel": f"{FIXED},geometry=stiefel,n0=4",
    "backtracking": f"{FAST},n0=1,geometry=oblique,step_rule=backtracking,budget_scope=global",
    "implicit": f"{FIXED},n0=1,hypergradient=implicit,iterations=2",
    "implicit-stiefel": f"{FIXED},geometry=stiefel,hypergradient=implicit,iterations=2,n0=2",
    "face": f"{FIXED},hypergradient=direct,p=10,face_steps=2",
    "ours": f"{RECIPES['ours']},components=40",
    "ours-path-oblique": f"{RECIPES['ours']},geometry=oblique,hypergradient=path,path_points=2,components=20",
    "ours-stiefel": f"{RECIPES['ours']},geometry=stiefel,adapter_parameters=600",
}


@pytest.mark.parametrize(
    "contract",
    [
        a_run_interrupted_after_every_update_equals_the_uninterrupted_one,
        the_same_seed_gives_the_same_record,
        counts_are_right,
        only_the_intended_parameters_train,
    ],
    ids=lambda contract: contract.__name__,
)
@pytest.mark.parametrize("name", SETTINGS)
def test_contracts(name, contract, tmp_path):
    contract(Subject(f"debora[{SETTINGS[name]}]", tmp_path, batches=36))


@pytest.mark.parametrize("geometry", ["oblique", "stiefel"])
@pytest.mark.parametrize(
    "recipe",
    ["recipe=paper,step_rule=fixed,step_size=0.2,tau=4,T_max=5", "step_size=0.02,T_max=2"],
    ids=["paper", "ours"],
)
def test_the_loss_falls_on_a_manifold(recipe, geometry, tmp_path):
    settings = f"{recipe},geometry={geometry},rank=4,learning_rate=0.01"
    loss_falls_on_a_batch_that_can_be_memorised(Subject(f"debora[{settings}]", tmp_path))


@pytest.mark.parametrize("geometry", ["oblique", "stiefel"])
@pytest.mark.parametrize("recipe", ["recipe=paper,tau=16,step_size=0.5", "recipe=ours,step_size=0.05,fold=false"])
def test_factors_are_feasible_after_every_update(recipe, geometry):
    run = started(f"{recipe},geometry={geometry},rank=4,T_max=3,n0=4,learning_rate=0.03", batches=150)
    adaptation, ranks = adaptation_of(run), set()
    first = numbers(adaptation)
    while run.training.used < 150:
        run.training.update()
        for layer in adaptation.layers.values():
            ranks.add(layer.r["default"])
            for factor, manifold in zip(layer.factors("default"), layer.manifolds("default"), strict=True):
                assert manifold == geometry
                assert manifolds.distance_to(manifold, factor.detach()) < 5e-6
    assert len(ranks) > 1
    moved = [
        float((numbers(adaptation)[name][0] - U).abs().max())
        for name, (U, _, _) in first.items()
        if adaptation.ranks()[name] == 4
    ]
    assert not moved or max(moved) > 0.01


@pytest.mark.parametrize(("geometry", "bound"), [("oblique", 4.0), ("stiefel", 2.0)])
def test_at_the_vertex_the_update_is_the_eps_shift(geometry, bound):
    run = started(f"geometry={geometry},rank=4,eps=0.01,start_at=vertex")
    for parts in numbers(adaptation_of(run)).values():
        assert 0 < dense(parts).norm() <= 0.01 * bound * (1 + 1e-5)
    assert (logits(run) - logits_without_adapter(run)).abs().max() < 0.1


def test_oblique_starts_in_the_interior_without_a_change():
    run = started("geometry=oblique,rank=4,budget_scope=global")
    assert all(float(s.min()) > 0.3 for _, s, _ in numbers(adaptation_of(run)).values())
    torch.testing.assert_close(logits(run), logits_without_adapter(run), rtol=0, atol=1e-6)


def test_on_a_manifold_every_closed_form_is_the_direct_term():
    found = {}
    for kind in ("closed_form", "direct"):
        run = started(f"geometry=oblique,rank=4,hypergradient={kind},T_max=100", 4)
        found[kind] = hypergradient(adaptation_of(run), run.training)
    assert torch.equal(found["closed_form"], found["direct"])


def test_backtracking_keeps_what_it_promised_and_counts_its_trials():
    run = started(
        "geometry=oblique,rank=4,step_rule=backtracking,T_max=4,trials=6,budget_scope=global,search_fraction=1",
        batches=100,
    )
    adaptation, seen = adaptation_of(run), []
    search, training, step = adaptation.search, run.training, adaptation.search.step

    def watched(value, objective, progress):
        weights, live, used = search.weights, search.live, training.used
        moved = step(value, objective, progress)
        assert training.used - used == moved.history["trials"]
        alive = torch.zeros(48, dtype=torch.bool)
        alive[live] = True
        direction = frank_wolfe.choose_direction(weights, search.gradient, alive[None], 16.0)
        training.budget += 2  # for the test
        start, end = (objective.at(frank_wolfe.points(w, 16.0, 1e-3)[0, live]) for w in (weights, search.weights))
        training.used, training.budget = training.used - 2, training.budget - 2
        torch.testing.assert_close(start, objective.value)  # the same random numbers, the same loss
        promised = 0.25 * (moved.history["step_size"] * direction.slope).sum()
        assert end <= start - promised
        seen.append(float(promised))
        return moved

    search.step = watched
    adaptation.model.train()  # with dropout
    run.training.run(lambda training: None)
    assert run.training.used == 100
    assert sum(promised > 0 for promised in seen) > 3
    assert {row["trials"] for row in run.training.history if "trials" in row} <= set(range(7))


@pytest.mark.parametrize("name", ["oblique", "stiefel", "backtracking", "implicit", "implicit-stiefel"])
def test_a_hypergradient_that_is_not_finite_is_a_divergence(name):
    run = started(SETTINGS[name], 3, batches=60)
    nn.init.constant_(next(iter(adaptation_of(run).layers.values())).factors("default")[0], torch.nan)
    with pytest.raises(Diverged, match="hypergradient is not finite at update 3"):
        run.training.update()


@pytest.mark.parametrize(
    "settings",
    [
        f"recipe={recipe},geometry={geometry},hypergradient={kind}"
        for recipe, geometry, kind in (
            ("paper", "oblique", "closed_form"),
            ("paper", "stiefel", "implicit"),
            ("ours", "matrix", "free"),
            ("ours", "oblique", "free"),
            ("ours", "stiefel", "path"),
        )
    ],
)
def test_training_goes_on_where_every_component_is_gone(settings, tmp_path):
    run = started(
        settings + ",rank=4,step_rule=fixed,steps=away,momentum=0,T_max=100,n0=0,step_size=1,warm_up=0.3", 3, batches=30
    )
    adaptation = adaptation_of(run)
    empty(adaptation)
    assert set(adaptation.ranks().values()) == {0}
    run.training.run(lambda training: None)
    assert set(adaptation.ranks().values()) == {0}
    assert adaptation.adapter_parameters() == 0
    adaptation.export(tmp_path)


def test_without_a_head_and_with_every_component_gone_a_run_still_ends():
    module = nn.Sequential(nn.Linear(4, 4))
    data = TrainingData(8, 4, 0)
    method = Debora(rank=2, T_max=9, n0=0, steps="away", step_rule="fixed", step_size=1, momentum=0)
    train = TrainSpec(batches=12)
    adaptation = method.start(Backbone(module, (), ("0",)), train, data, None)

    class Task:
        def collate(self, encoded, rows, generator):
            return Batch({"input": torch.ones(len(rows), 4)}, torch.zeros(len(rows)))

        def loss(self, model, batch, generator):
            return model(**batch.inputs).square().mean()

    training = Training(adaptation, Task(), None, data, train, torch.device("cpu"), 12)
    training.update()
    empty(adaptation)
    training.run(lambda training: None)
    assert adaptation.stream == "all"
    assert training.used == 12


def test_the_face_is_frozen_once_it_is_identified():
    run = started("rank=4,T_max=2,p=1e9,face_steps=3,n0=100", batches=60)
    run.training.run(lambda training: None)
    rows = [row for row in run.training.history if "gap" in row]
    assert len(rows) == 3  # every gap is small: nothing moves, and three steps are enough
    assert run.training.data.drawn == {"all": 60 - 9, "lower": 6, "upper": 3}
    run = started("rank=4,T_max=2,p=0,face_steps=3,n0=100", batches=60)
    run.training.run(lambda training: None)
    assert sum("gap" in row for row in run.training.history) == 10


def test_the_end_of_the_search_removes_what_never_got_weight():
    run = started("rank=4,T_max=2,geometry=stiefel,budget_scope=global,step_size=0.3", batches=24)
    adaptation = adaptation_of(run)
    while adaptation.stream == "lower":
        assert sum(adaptation.ranks().values()) == 48
        run.training.update()
    assert 0 < sum(adaptation.ranks().values()) <= 4
    assert all((s > 1e-3).all() for _, s, _ in numbers(adaptation).values())
    run.training.fetch()
    last = run.training.history[-1]
    assert last["rank"] == sum(adaptation.ranks().values()) == sum(last["ranks"]) == len(last["s"])
    assert last["jump"] > 0


def test_the_history_has_ranks_and_s_of_every_layer():
    run = started("rank=4,T_max=2,n0=0,step_size=0.5", batches=40)
    run.training.run(lambda training: None)
    rows = [row for row in run.training.history if "gap" in row]
    assert rows
    for row in rows:
        assert len(row["ranks"]) == 12
        assert sum(row["ranks"]) == row["rank"] == len(row["s"])
        assert sum(s > 1e-3 for s in row["s"]) <= row["rank"]
    s = torch.cat([s for _, s, _ in numbers(adaptation_of(run)).values()])
    assert rows[-1]["s"] == pytest.approx(s.tolist())


def test_the_history_ends_with_the_s_that_is_folded():
    run = started("recipe=ours,rank=4,step_size=0.03,n0=0", batches=40)
    run.training.run(lambda training: None)
    rows = [row for row in run.training.history if "s" in row]
    assert len(rows) > 3
    assert len(set(rows[-1]["s"])) > 1
    assert rows[-1]["ranks"] == list(run.adaptation.ranks().values())
    s = torch.cat([s for _, s, _ in numbers(adaptation_of(run)).values()])
    assert len(set(s.tolist())) == 1


@pytest.mark.parametrize("paper", [False, True])
def test_a_convolutions_closed_form_has_the_coefficient_that_was_asked_for(paper):
    """d = 4: G = -d_s f1 / 3 exactly, and with the paper's coefficient 1 it is d_s f1 - 4 d_s f1."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 6, 3))
    method = Debora(recipe="paper", rank=2, paper_coefficient=paper)
    adaptation = method.start(Backbone(module, (), ("0",)), TrainSpec(batches=9), TrainingData(8, 4, 0), None)
    layer = adaptation.layers["0"]
    for factor in layer.factors("default"):
        nn.init.normal_(factor)

    class Step:
        def backward(self, batch):
            loss = adaptation.model(torch.ones(2, 3, 5, 5)).square().mean()
            loss.backward()
            direct.append(layer.debora_s["default"].grad.clone())
            return loss.detach()

    direct: list[torch.Tensor] = []
    found = hypergradient(adaptation, Step())
    torch.testing.assert_close(found, direct[0] * (-3 if paper else -1 / 3), rtol=1e-3, atol=1e-4)


SCHEDULES = ["T_max=3", "T_max=7,search_fraction=1", "T_max=4,search_fraction=0.3", "T_max=40", "warm_up=0.2", ""]


@pytest.mark.parametrize("batches", [7, 50])
@pytest.mark.parametrize("settings", SCHEDULES)
@pytest.mark.parametrize(
    "recipe",
    [
        "recipe=paper",
        "hypergradient=free",
        "hypergradient=path,path_points=3",
        "hypergradient=direct",
        "hypergradient=implicit,iterations=1",
    ],
)
def test_the_dry_runs_number_of_upper_steps_is_the_runs(recipe, settings, batches):
    text = ",".join(part for part in (recipe, settings, "rank=2,n0=1000,step_size=0.01") if part)
    run = start(Subject(f"debora[{text}]", Path(), batches=batches))
    run.training.run(lambda training: None)
    train = TrainSpec(batches=batches, warmup=0.0)
    notes = run.method.notes(tiny_backbone("meta"), train, 100)
    steps = sum("gap" in row for row in run.training.history)
    assert notes[0].startswith(f"at most {steps} upper-level steps in ")


@pytest.mark.parametrize("batches", [3000, 36000])
def test_the_search_has_its_upper_steps_whatever_the_budget(batches):
    for method, expected in ((Debora(recipe="paper"), UPPER_STEPS), (Debora(), FREE_UPPER_STEPS)):
        train = TrainSpec(batches=batches)
        assert method.schedule(train).upper_steps(batches) == pytest.approx(expected, rel=0.2)
        assert Debora(recipe=method.recipe, T_max=5).schedule(train).lower_updates(batches) == 5


def test_a_manifold_has_defaults_of_its_own():
    assert (Debora().learning_rate, Debora(geometry="stiefel").learning_rate) == (1e-3, 3e-3)
    assert Debora(geometry="stiefel", learning_rate=1e-3).learning_rate == 1e-3
    assert Debora(geometry="oblique").simplex_tau(12) == Debora().simplex_tau(12) / 2
    assert Debora(geometry="oblique", tau=4).simplex_tau(12) == 4
    assert Debora(geometry="oblique").factor_penalty == 0
    assert Debora.of({"geometry": "oblique"}, "debora").learning_rate == 3e-3
    targets = Debora.of({"geometry": "oblique", "target_modules": ["query"]}, "debora").target_modules
    assert targets == ("query",)


def test_a_dry_run_says_what_is_reachable():
    backbone = tiny_backbone("meta")
    train = TrainSpec(batches=220)
    paper = {"recipe": "paper", "rank": 4, "step_rule": "fixed", "step_size": 0.15}

    def notes(**values):
        return Debora(**paper | values).notes(backbone, train, 100)

    interior = notes(budget_scope="global", T_max=10, search_fraction=0.5, step_size=0.02)
    assert interior[0] == "at most 10 upper-level steps in 110 of 220 batches"
    assert interior[1] == "at least 39 of the 48 components of the one simplex of 12 layers stay"
    assert notes()[1] == "the steps may empty each of 12 simplices but for one of its 4 components"
    vertex = notes(geometry="stiefel")
    assert vertex[1] == "at most 4 of the 4 components of each of 12 simplices can get weight"
    assert notes(n0=40)[2] == "n0 = 40: nothing is removed before the search ends"
    target = notes(components=7)
    assert target[2] == (
        "target: 7 components of 48 components; what the steps leave beyond it is cut by s when the search ends"
    )
    assert Debora(rank=4, adapter_parameters=500).notes(backbone, train, 100)[2] == (
        "target: 500 parameters of 48 components; what the steps leave beyond it is cut by size when the search ends"
    )
