"""How a search ends: at its target, by a cut, and with s in the factors."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from peft import PeftModel

from methods.debora.math import manifolds
from tests.methods.debora.runs import adaptation_of, dense, logits, logits_without_adapter, numbers, started

SETTINGS = "recipe=ours,rank=4,T_max=1,n0=0,warm_up=0.1,search_fraction=0.6"


def rows_of(run) -> list[dict]:
    run.training.fetch()
    return [row for row in run.training.history if "rank" in row]


def until_the_end(run) -> None:
    while not adaptation_of(run).search.frozen:
        run.training.update()


@pytest.mark.parametrize("components", [46, 20, 5, 1])
@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        f"{SETTINGS},geometry=oblique",
        f"{SETTINGS},budget_scope=layer,step_size=0.2",
        f"{SETTINGS},hypergradient=direct,T_max=2,steps=away",
        "recipe=paper,rank=4,T_max=2,n0=3",
    ],
)
def test_so_many_components_are_left(settings, components):
    run = started(f"{settings},components={components}", batches=40)
    run.training.run(lambda training: None)
    last = rows_of(run)[-1]
    assert sum(run.adaptation.ranks().values()) == components == last["rank"] == sum(last["ranks"]) == len(last["s"])


def test_a_search_that_reaches_its_target_is_over_at_once_and_cuts_nothing():
    run = started(f"{SETTINGS},step_size=0.2,components=40", batches=60)
    run.training.run(lambda training: None)
    rows = rows_of(run)
    assert rows[-1]["rank"] == 40
    assert rows[-1]["batches"] < 36
    assert not any("cut" in row for row in rows)
    assert all(before["rank"] >= after["rank"] for before, after in pairwise(rows))


def test_one_that_does_not_says_what_it_cut():
    run = started(f"{SETTINGS},step_size=0.001,components=12", batches=40)
    run.training.run(lambda training: None)
    last = rows_of(run)[-1]
    assert last["batches"] == 24
    assert last["cut"] == 36
    assert last["jump"] > 0
    assert last["rank"] == 12


def test_from_a_vertex_no_more_than_the_target_stay():
    found = []
    for components in (3, 12, 48):
        settings = SETTINGS.replace(",n0=0", ",geometry=stiefel,step_size=0.02,momentum=0")
        run = started(f"{settings},components={components}", batches=60)
        run.training.run(lambda training: None)
        found.append(sum(run.adaptation.ranks().values()))
        assert 0 < found[-1] <= components
        assert rows_of(run)[-1]["batches"] == 36  # it is not over where nothing has weight yet
    assert found[0] == 3 < found[2]


@pytest.mark.parametrize("fold", ["true", "false"])
@pytest.mark.parametrize("target", [1000, 333, 50])
@pytest.mark.parametrize("step_size", [0.2, 0.001], ids=["reached", "cut"])
def test_so_many_parameters_are_not_exceeded_nor_missed_by_a_component(step_size, target, fold):
    """Layers of two sizes: what counts is what the adapter has after the search."""
    run = started(f"{SETTINGS},step_size={step_size},adapter_parameters={target},fold={fold}", batches=40)
    run.training.run(lambda training: None)
    own = [sum(run.before.shape(name)) + (fold == "false") for name in run.adaptation.ranks()]
    assert len(set(own)) == 2
    parameters = run.adaptation.adapter_parameters()
    assert parameters == sum(rank * cost for rank, cost in zip(run.adaptation.ranks().values(), own, strict=True))
    assert target - max(own) < parameters <= target
    assert run.training.sizes.parameters().adapter_final == parameters


def test_the_cut_leaves_the_largest_singular_values_of_the_network():
    run = started(f"{SETTINGS},step_size=0.001,components=9,learning_rate=0.02,fold=false", batches=40)
    adaptation = adaptation_of(run)
    cut, before = adaptation.search.cut_to_target, {}

    def watched(scores):
        before.update({name: dense(parts) for name, parts in numbers(adaptation).items()})
        return cut(scores)

    adaptation.search.cut_to_target = watched
    until_the_end(run)
    values = {name: torch.linalg.svdvals(update)[:4] for name, update in before.items()}
    least = torch.cat(list(values.values())).sort(descending=True).values[8]
    ranks = {name: int((own >= least).sum()) for name, own in values.items()}
    assert adaptation.ranks() == ranks
    assert max(ranks.values()) > 1
    for name, parts in numbers(adaptation).items():
        X, sigma, Y = torch.linalg.svd(before[name])
        best = (X[:, : ranks[name]] * sigma[: ranks[name]]) @ Y[: ranks[name]]
        torch.testing.assert_close(dense(parts), best, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("recipe", ["recipe=paper", "recipe=ours,cut_by=s,fold=false"])
def test_the_papers_cut_leaves_the_largest_of_s(recipe):
    run = started(f"{recipe},rank=4,T_max=2,n0=100,hypergradient=direct,step_size=0.05,components=9", batches=26)
    until_the_end(run)
    *_, before, last = rows_of(run)
    assert "gap" not in last
    assert last["cut"] > 0
    assert sorted(last["s"]) == sorted(before["s"])[-9:]


# The end of the search ---------------------------------------------------------------------------------------------

GEOMETRIES = ["matrix", "oblique", "stiefel"]
FOLDING = f"{SETTINGS},step_size=0.1,learning_rate=0.01,components=30"


def pair(geometry: str, batches: int = 40) -> list:
    """Two runs after the last update of their search, with and without s in the factors."""
    runs = [started(f"{FOLDING},geometry={geometry},fold={fold}", batches=batches) for fold in ("true", "false")]
    for run in runs:
        until_the_end(run)
    return runs


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_letting_go_leaves_the_function(geometry):
    folded, kept = pair(geometry)
    assert folded.training.used == kept.training.used < 40
    assert (logits(kept) - logits_without_adapter(kept)).abs().max() > 1e-3
    torch.testing.assert_close(logits(folded), logits(kept), rtol=1e-4, atol=1e-5)
    assert folded.adaptation.ranks() == kept.adaptation.ranks()
    s, before = (torch.cat([s for _, s, _ in numbers(adaptation_of(run)).values()]) for run in (folded, kept))
    assert len(set(s.tolist())) == 1
    assert (s - before).abs().max() > 0.01


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_from_then_on_factors_are_free_or_stay_where_they_are(geometry):
    for run, free in zip(pair(geometry), (True, False), strict=True):
        adaptation = adaptation_of(run)
        s = torch.cat([s for _, s, _ in numbers(adaptation).values()])
        run.training.run(lambda training: None)
        assert torch.equal(torch.cat([s for _, s, _ in numbers(adaptation).values()]), s)
        kinds = {kind for layer in adaptation.layers.values() for kind in layer.manifolds("default")}
        assert kinds == {"euclidean" if free or geometry == "matrix" else geometry}
        decayed = {group["weight_decay"] for group in adaptation.optimizer.param_groups if "manifold" not in group}
        assert decayed <= {0.0, run.method.weight_decay}
        assert any("manifold" in group for group in adaptation.optimizer.param_groups) == (kinds != {"euclidean"})
        if geometry != "matrix":
            factors = [f.detach() for layer in adaptation.layers.values() for f in layer.factors("default")]
            away = max(manifolds.distance_to(geometry, factor) for factor in factors if factor.numel())
            assert (away > 1e-2) if free else (away < 1e-5)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_s_is_counted_no_more(geometry):
    folded, kept = pair(geometry)
    ranks = sum(kept.adaptation.ranks().values())
    assert kept.adaptation.adapter_parameters() - folded.adaptation.adapter_parameters() == ranks > 0
    for run in (folded, kept):
        run.training.run(lambda training: None)
        assert run.training.sizes.parameters().adapter_final == run.adaptation.adapter_parameters()


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_export_is_the_model(geometry, tmp_path):
    folded, _ = pair(geometry)
    folded.training.run(lambda training: None)
    folded.adaptation.export(tmp_path)
    expected = logits(folded)
    assert (expected - logits_without_adapter(folded)).abs().max() > 1e-3
    folded.adaptation.model = PeftModel.from_pretrained(folded.before.module, tmp_path).eval()
    torch.testing.assert_close(logits(folded), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_run_resumes_exactly_after_it(geometry):
    run, _ = pair(geometry)
    run.training.update()
    other = started(f"{FOLDING},geometry={geometry}", batches=40)
    other.training.load_state_dict(copy.deepcopy(run.training.state_dict()))
    for each in (run, other):
        each.training.run(lambda training: None)
    assert torch.equal(logits(other), logits(run))


def test_a_search_from_a_vertex_says_that_it_ended_below_its_target():
    def remarks(settings):
        run = started(f"recipe=ours,geometry=stiefel,rank=4,T_max=4,warm_up=0.1,{settings}", updates=24)
        return adaptation_of(run), adaptation_of(run).remarks()

    adaptation, said = remarks("components=10")
    assert sum(adaptation.ranks().values()) < 10
    assert said == ["the search ended below the target: from a vertex a step gives weight to one component at most"]
    assert remarks("components=1")[1] != said
