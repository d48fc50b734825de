"""The penalty on the factors while s is searched for: what it adds, how large it is, and when."""

from __future__ import annotations

import copy

import pytest
import torch

from harness.method import Backbone
from harness.registry import make_method
from harness.run.streams import TrainingData
from harness.spec import TrainSpec
from tests.methods.debora.runs import adaptation_of, numbers, started
from tests.support.network import Network

# Six updates of warm-up, twelve batches of search.
SETTINGS = "recipe=ours,rank=4,T_max=2,n0=0,warm_up=0.25,search_fraction=0.5"


def factors_of(run) -> list[torch.nn.Parameter]:
    return [factor for layer in adaptation_of(run).layers.values() for factor in layer.factors("default")]


def norm(tensors) -> float:
    return float(torch.stack([tensor.detach().norm() for tensor in tensors]).norm())


def watched(run, times: float = 1.0) -> list[dict]:
    """What each later update's `before_step` does to the gradients, of a loss that is so many times as large."""
    seen, before_step, model = [], run.adaptation.before_step, run.adaptation.model
    run.training.train = run.training.train.model_copy(update={"clip_norm": 0.0})
    loss = run.task.loss
    run.training.task = copy.copy(run.task)
    object.__setattr__(run.training.task, "loss", lambda *given: times * loss(*given))

    def before(step):
        trained = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
        plain = {name: p.grad.clone() for name, p in trained}
        gradients = [factor.grad.clone() for factor in factors_of(run)]
        before_step(step)
        added = {name: p.grad - plain[name] for name, p in trained}
        seen.append(
            {"gradients": gradients, "added": added, "factors": {name: p.detach().clone() for name, p in trained}}
        )

    run.adaptation.before_step = before
    return seen


def lambda_of(run) -> float:
    run.training.fetch()
    (value,) = [row["factor_penalty"] for row in run.training.history if "factor_penalty" in row]
    return value


@pytest.mark.parametrize("share", [0.3, 0.06])
def test_lambda_is_such_that_its_gradient_is_a_share_of_the_losss(share):
    """Of the norm of the mean in the warm-up, with the factors as they are at its end; nothing is added until then. A
    basis of shorter columns, which they then go to, has no part in it."""
    run, rotated = started(f"{SETTINGS},penalty_share={share},cut_by=s"), started(f"{SETTINGS},penalty_share={share}")
    seen = watched(run)
    for _ in range(6):
        run.training.update()
        rotated.training.update()
    assert not any(added.any() for row in seen for added in row["added"].values())
    mean = norm([torch.stack(own).mean(0) for own in zip(*(row["gradients"] for row in seen), strict=True)])
    assert lambda_of(run) == pytest.approx(share * mean / norm(factors_of(run)), rel=1e-4)
    assert norm(factors_of(rotated)) < 0.9 * norm(factors_of(run))
    assert lambda_of(rotated) == pytest.approx(lambda_of(run))


def test_lambda_follows_the_scale_of_the_loss():
    found = []
    for times in (1.0, 10.0):
        run = started(SETTINGS + ",learning_rate=1e-7,cut_by=s")  # so that both go the same way
        watched(run, times)
        for _ in range(6):
            run.training.update()
        found.append(lambda_of(run))
    assert found[0] > 0
    assert found[1] == pytest.approx(10 * found[0], rel=1e-3)


@pytest.mark.parametrize("given", ["", "factor_penalty=0.05"], ids=["by the rule", "given"])
def test_while_it_searches_each_factor_is_pulled_towards_0_and_nothing_else(given):
    run = started(f"{SETTINGS},{given}" if given else SETTINGS, batches=24)
    seen = watched(run)
    run.training.run(lambda training: None)
    strength = lambda_of(run)
    assert strength == pytest.approx(0.05) or not given
    counted = {True: 0, False: 0}
    for update, row in enumerate(seen):
        searches = update < 12 and (update >= 6 or bool(given))
        for name, added in row["added"].items():
            expected = strength * row["factors"][name] if searches and "debora_" in name else torch.zeros_like(added)
            torch.testing.assert_close(added, expected, rtol=1e-3, atol=1e-6)
            counted[bool(expected.any())] += 1
    assert min(counted.values()) > 24  # the factors of 12 layers; and the head, and what comes after the search


def test_on_a_manifold_and_in_the_paper_there_is_none():
    for settings in (SETTINGS + ",geometry=oblique", "rank=4,T_max=2,search_fraction=1"):
        run = started(settings, batches=12)
        run.training.run(lambda training: None)
        assert lambda_of(run) == 0


def test_a_head_alone_has_none():
    """With every component gone there is nothing to pull."""
    run = started(SETTINGS, 2)
    adaptation = adaptation_of(run)
    adaptation.cut(adaptation.search.drop([True] * 48))
    run.training.run(lambda training: None)
    assert adaptation.stream == "all"
    assert not any(s.numel() for _, s, _ in numbers(adaptation).values())


@pytest.mark.parametrize(
    ("layers", "given", "expected"),
    [
        (("linear",), {}, None),  # by the rule, when the warm-up is over
        (("convolution", "linear"), {}, 0.0),
        (("convolution", "linear"), {"factor_penalty": 0.02}, 0.02),
    ],
)
def test_kernels_of_more_than_two_factors_have_a_penalty_only_where_it_is_given(layers, given, expected):
    backbone = Backbone(Network(), head=("head",), layers=layers)
    method = make_method("debora", {"rank": 2} | given)
    run = method.start(backbone, TrainSpec(batches=12), TrainingData(24, 8, 0), torch.Generator())
    assert run.penalty_on_factors.strength == expected
