"""The bilevel recipe in the real loop, on a tiny BERT."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from harness.contracts.subject import Started
from harness.errors import Diverged, InputError
from harness.method import Backbone
from harness.run.streams import TrainingData
from harness.spec import TrainSpec
from methods.debora.method import Debora
from methods.debora.search import Rules
from tests.methods.debora.bert import tiny_backbone
from tests.methods.debora.runs import adaptation_of, hypergradient, numbers, started, watch


def slow_hypergradient(run: Started, rows: tuple[int, ...], kind: str) -> dict[str, list[float]]:
    """Theorem 4.1 entry by entry, or the direct term."""
    layers = adaptation_of(run).layers
    batch = run.task.collate(run.training.encoded, rows, None)
    leaves = []
    for layer in layers.values():
        layer.debora_s["default"].requires_grad_()
        leaves.append((layer.debora_U["default"], layer.debora_s["default"], layer.debora_V["default"]))
    loss = run.task.loss(run.adaptation.model, batch, None)
    found = {}
    for name, (U, s, V) in zip(layers, leaves, strict=True):
        dU, ds, dV = torch.autograd.grad(loss, (U, s, V), retain_graph=True)
        U, V = U.detach(), V.detach()
        s.requires_grad_(False)
        found[name] = ds.tolist()
        for i in range(len(s)) if kind == "closed_form" else ():
            radial = float(U[:, i] @ dU[:, i]) + float(V[:, i] @ dV[:, i])
            found[name][i] -= radial / float(s[i])
    return found


def last_upper_batch(run: Started) -> tuple[int, ...]:
    run.training.data.drawn["upper"] -= 1
    return run.training.data.draw("upper")


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("kind", ["closed_form", "direct"])
def test_in_the_loop_the_search_follows_the_upper_batchs_hypergradient(scope, kind):
    """Against a slow reference: the lower level's gradients stay out of it, and the layers get the search's s."""
    run = started(f"rank=4,T_max=2,n0=100,search_fraction=1,budget_scope={scope},hypergradient={kind}", batches=12)
    adaptation, norms = adaptation_of(run), []

    def look(value):
        own = slow_hypergradient(run, last_upper_batch(run), kind)
        expected = torch.tensor([x for values in own.values() for x in values])
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-6)
        norms.append(float(expected.norm()))

    watch(adaptation, look)
    while run.training.used < 12:
        run.training.update()
        assert torch.equal(torch.cat([s for _, s, _ in numbers(adaptation).values()]), adaptation.search.s)
    run.training.fetch()
    rows = [row for row in run.training.history if "hypergradient_norm" in row]
    assert len(rows) == len(norms) == 4
    assert [row["hypergradient_norm"] for row in rows] == pytest.approx(norms, rel=1e-3)
    assert len({tuple(row["s"]) for row in rows}) == 4


def test_the_methods_settings_reach_the_search():
    search = adaptation_of(
        started("rank=4,step_rule=diminishing,step_size=0.3,momentum=0.75,p=0.5,n0=7,face_steps=3,tau=8,eps=0.01")
    ).search
    assert search.rules == Rules(
        tau=8, eps=0.01, step_size=0.3, step_rule="diminishing", momentum=0.75, tolerance=0.5, first_truncation=7,
        face_steps=3, steps="away",
    )  # fmt: skip
    rules = adaptation_of(started("rank=4,step_rule=backtracking,rho=0.1,trials=9,hypergradient=direct")).search.rules
    assert (rules.step_rule, rules.rho, rules.trials) == ("backtracking", 0.1, 9)


def test_an_upper_step_moves_s_alone_and_leaves_no_gradient():
    run = started("rank=4,T_max=4,n0=100", batches=24)
    adaptation, data = adaptation_of(run), run.training.data
    draw, held = data.draw, {}

    def watched(stream):
        if stream == "upper":  # between the optimizer's step and the upper level's
            held["trained"] = {name: p.detach().clone() for name, p in adaptation.model.named_parameters()}
            held["moments"] = str(copy.deepcopy(adaptation.optimizer.state_dict()))
            held["s"], held["used"] = numbers(adaptation), run.training.used
        return draw(stream)

    data.draw = watched
    for _ in range(4):
        run.training.update()
    assert run.training.used == held["used"] + 1
    assert data.drawn == {"all": 0, "lower": 4, "upper": 1}
    for name, parameter in adaptation.model.named_parameters():
        assert torch.equal(parameter, held["trained"][name]), name
        assert parameter.grad is None
    assert str(adaptation.optimizer.state_dict()) == held["moments"]
    for name, layer in adaptation.layers.items():
        s = layer.debora_s["default"]
        assert not s.requires_grad
        assert s.grad is None
        assert not torch.equal(s, held["s"][name][1])


def test_the_closed_form_is_the_direct_gradient_turned_round():
    """Identity 1: the plain matrix variant without a term in the factors."""
    found = {}
    for kind in ("closed_form", "direct"):
        run = started(f"rank=4,T_max=100,hypergradient={kind}", 6)
        found[kind] = hypergradient(adaptation_of(run), run.training)
    assert found["direct"].norm() > 0
    torch.testing.assert_close(found["closed_form"], -found["direct"], rtol=1e-3, atol=1e-6)


def test_accumulation_gives_the_same_hypergradient():
    found = []
    for pieces in (1, 4):
        run = started("rank=4,T_max=100", 4)
        run.training.train = run.training.train.model_copy(update={"micro_batches": pieces})
        found.append(hypergradient(adaptation_of(run), run.training))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("scope", "simplices"), [("layer", 12), ("global", 1)])
@pytest.mark.parametrize("where", ["interior", "vertex"])
def test_where_s_starts(scope, simplices, where):
    adaptation = adaptation_of(started(f"rank=4,eps=0.01,budget_scope={scope},start_at={where}"))
    components = 48 // simplices
    s = torch.cat([s for _, s, _ in numbers(adaptation).values()])
    expected = 0.01 + (16 / components if where == "interior" else 0.0)
    torch.testing.assert_close(s, torch.full((48,), expected))


def test_s_is_feasible_all_along_and_the_lower_level_does_not_touch_it():
    run = started("rank=4,T_max=3,n0=2,step_size=0.4,tau=5,eps=0.1,search_fraction=1", batches=40)
    adaptation = adaptation_of(run)
    while run.training.used < 40:
        before = torch.cat([s for _, s, _ in numbers(adaptation).values()])
        upper = run.training.data.drawn["upper"]
        run.training.update()
        for _, s, _ in numbers(adaptation).values():
            assert (s >= 0.1).all()
            assert s.sum() <= 5 + 0.1 * len(s) + 1e-5
        if run.training.data.drawn["upper"] == upper:
            assert torch.equal(torch.cat([s for _, s, _ in numbers(adaptation).values()]), before)
    assert run.training.data.drawn["upper"] == 10


def test_both_halves_then_everything():
    run = started("rank=4,T_max=2,search_fraction=0.5", batches=24)
    adaptation = adaptation_of(run)
    streams = []
    while run.training.used < 24:
        streams.append((adaptation.stream, run.training.used))
        run.training.update()
        if adaptation.stream == "all":
            frozen = numbers(adaptation)
            break
    assert run.training.used == 12
    assert run.training.data.drawn == {"all": 0, "lower": 8, "upper": 4}
    run.training.run(lambda training: None)
    assert run.training.data.drawn == {"all": 12, "lower": 8, "upper": 4}
    after = numbers(adaptation)
    assert all(torch.equal(after[name][1], s) for name, (_, s, _) in frozen.items())
    assert any(not torch.equal(after[name][0], U) for name, (U, _, _) in frozen.items())


def test_the_last_batch_is_not_asked_for_twice():
    run = started("rank=4,T_max=3,search_fraction=1", batches=7)
    run.training.run(lambda training: None)
    assert run.training.data.drawn == {"all": 0, "lower": 6, "upper": 1}


def test_a_hypergradient_that_is_not_finite_is_a_divergence():
    run = started("rank=4,T_max=2", 3)
    nn.init.constant_(next(iter(adaptation_of(run).layers.values())).debora_U["default"], torch.nan)
    with pytest.raises(Diverged, match="hypergradient is not finite at update 3"):
        run.training.update()


def test_the_module_imports_without_torch():
    code = "import sys, methods.debora.method; print(sorted({'torch', 'peft', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_layers_that_cannot_be_adapted_are_a_reason_and_wrong_values_an_error():
    linear = tiny_backbone("meta")
    assert Debora().unsupported(linear) is None
    parts = {"conv": nn.Conv2d(8, 16, 3), "groups": nn.Conv2d(8, 8, 3, groups=2), "other": nn.Conv1d(8, 8, 3)}
    mixed = Backbone(nn.ModuleDict(parts), head=(), layers=tuple(parts))
    assert Debora(rank=2, target_modules=("conv",)).unsupported(mixed) is None
    assert "'groups' is a convolution in 2 groups" in (Debora(rank=2).unsupported(mixed) or "")
    reason = Debora(rank=2, target_modules=("other",)).unsupported(mixed)
    assert reason == "layer 'other' is a Conv1d, neither linear nor nn.Conv2d"
    with pytest.raises(InputError, match="rank = 9 is above the 8 channels of layer 'conv'"):
        Debora(rank=9, geometry="stiefel", target_modules=("conv",)).unsupported(mixed)
    with pytest.raises(InputError, match="1 training rows: two halves need at least 2"):
        Debora(rank=2).start(linear, TrainSpec(batches=9), TrainingData(1, 4, 0), None)
    with pytest.raises(InputError, match="rank = 17"):
        Debora(rank=17).unsupported(linear)
    with pytest.raises(InputError, match="Did you mean 'query'"):
        Debora(target_modules=("querry",)).unsupported(linear)
    with pytest.raises(InputError, match=r"eps \* components = 24 should be at most tau = 16"):
        Debora(eps=0.25, tau=16).unsupported(linear)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tau": 0}, "tau"),
        ({"eps": 3, "rank": 8, "tau": 16}, r"eps \* rank = 24 should be at most tau = 16"),
        ({"T_max": 0}, "T_max"),
        ({"step_size": 1.5}, "step_size"),
        ({"hypergradient": "exact"}, "closed_form"),
        ({"geometry": "sphere"}, "oblique"),
        ({"geometry": "stiefel", "start_at": "interior"}, "start_at = vertex"),
        ({"geometry": "oblique", "rank": 7}, "rank = 7 should be even"),
        ({"step_rule": "backtracking", "hypergradient": "closed_form"}, "no direction of descent at fixed factors"),
        ({"step_rule": "backtracking", "hypergradient": "implicit", "geometry": "oblique"}, "no direction of descent"),
        ({"step_rule": "backtracking", "hypergradient": "direct", "momentum": 0.5}, "need not descend on the batch"),
        ({"momentum": 1}, "momentum"),
        ({"damping": -1}, "damping"),
        ({"iterations": 0}, "iterations"),
        ({"search_fraction": 0}, "search_fraction"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        Debora.of(values, owner="debora")


def test_only_the_targeted_layers_are_adapted():
    """Also where one layer's name is the end of another's."""
    module = nn.ModuleDict({"fc": nn.Linear(4, 4), "block": nn.ModuleDict({"fc": nn.Linear(4, 4)})})
    backbone = Backbone(module, head=(), layers=("fc",))
    adaptation = Debora(rank=2).start(backbone, TrainSpec(batches=9), TrainingData(8, 4, 0), None)
    assert adaptation.ranks() == {"fc": 2}
    assert type(module["block"]["fc"]) is nn.Linear
