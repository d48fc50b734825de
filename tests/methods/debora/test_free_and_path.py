"""The hypergradients that are ours: from the lower level's own batches, and along the way from 0 to s."""

from __future__ import annotations

import string

import pytest
import torch
from torch import nn

from harness.contracts.methods import a_run_interrupted_after_every_update_equals_the_uninterrupted_one
from harness.contracts.subject import Subject
from harness.errors import InputError
from methods.debora.math import manifolds
from methods.debora.math.hypergradient import radial
from methods.debora.method import Debora
from methods.debora.tuner.config import DeboraConfig
from methods.debora.tuner.convolution import DeboraConv2d
from methods.debora.tuner.layer import DeboraLinear
from methods.debora.upper_level import FreeGradient, HypergradientRule, upper_gradient
from tests.methods.debora.draws import normal
from tests.methods.debora.runs import adaptation_of, hypergradient, started, watch

EPS = 1e-3


def direct_gradient(run, rows) -> torch.Tensor:
    """d_s of the loss on these rows by autograd; gradients, budget and s are left as they are."""
    buffers = [layer.debora_s["default"] for layer in adaptation_of(run).layers.values() if layer.r["default"]]
    for s in buffers:
        s.requires_grad_()
    run.training.used -= 1
    found = torch.autograd.grad(run.training.loss(rows), buffers)
    for s in buffers:
        s.requires_grad_(False)
    return torch.cat(found)


@pytest.mark.parametrize("kind", ["euclidean", "oblique", "stiefel"])
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 4), (6, 5, 3, 3)], ids=str)
def test_every_mode_gives_the_derivative_in_s(generator, shape, kind):
    """With Euclidean gradients, on every manifold, of any smooth loss of the sum; Riemannian ones give 0."""
    s = (0.5 + torch.rand(3, generator=generator, dtype=torch.float64)).requires_grad_()
    factors = [manifolds.project(kind, normal(generator, n, 3)).requires_grad_() for n in shape]
    modes = string.ascii_lowercase[: len(shape)]
    psi = torch.einsum(f"{','.join(f'{mode}z' for mode in modes)},z->{modes}", *factors, s)
    loss = (normal(generator, *shape) * torch.sin(psi)).sum()
    grad_s, *grads = torch.autograd.grad(loss, [s, *factors])
    assert grad_s.abs().min() > 1e-2
    for factor, grad in zip(factors, grads, strict=True):
        torch.testing.assert_close(radial([factor], [grad]), s * grad_s)
        if kind != "euclidean":
            tangent = manifolds.project_tangent(kind, factor, grad)
            torch.testing.assert_close(radial([factor], [tangent]), torch.zeros_like(s))


def convolution() -> DeboraConv2d:
    torch.manual_seed(0)
    layer = DeboraConv2d(nn.Conv2d(3, 5, 3), "default", 4, DeboraConfig(target_modules=["x"]))
    for factor in layer.factors("default"):
        nn.init.normal_(factor)
    layer.debora_s["default"].copy_(torch.tensor([EPS, 0.5, EPS, 2.0]))
    return layer


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_of_a_convolution_it_is_exact_at_the_least_s(autocast):
    """To float32's precision, autocast or not: the first factor meets s before anything is rounded to bfloat16."""
    layer, free = convolution(), FreeGradient()
    s = layer.debora_s["default"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.tanh(layer(torch.randn(2, 3, 6, 6))).float().sum().backward()
    free.add([layer])
    torch.testing.assert_close(free.take(s.detach()), s.grad, rtol=1e-4, atol=1e-5)


def test_where_a_factor_is_zero_nothing_changes_with_s():
    layer, free = convolution(), FreeGradient()
    nn.init.zeros_(layer.debora_U["default"])
    layer(torch.randn(2, 3, 6, 6)).sum().backward()
    free.add([layer])
    assert torch.equal(free.take(layer.debora_s["default"]), torch.zeros(4))


def test_nothing_was_seen_nothing_is_known():
    with pytest.raises(ValueError, match="no batch was added"):
        FreeGradient().take(torch.ones(3))


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("geometry", ["matrix", "oblique", "stiefel"])
def test_in_the_loop_the_search_follows_the_mean_over_the_lower_batches(geometry, pieces):
    """Each batch's derivative in s before its update, in the basis that the warm-up ends with; clipping, projection,
    micro batches, penalty do not show."""
    penalty = 0.1 if geometry == "matrix" else 0
    settings = (
        f"recipe=ours,rank=4,T_max=3,n0=1,search_fraction=1,start_at=vertex,geometry={geometry},hypergradient=free"
    )
    settings += f",step_size=0.5,tau=4,eps=0.1,warm_up=0.2,factor_penalty={penalty}"
    run = started(settings, batches=15)
    run.training.train = run.training.train.model_copy(update={"micro_batches": pieces, "clip_norm": 1e-3})
    adaptation, seen, steps = adaptation_of(run), [], []
    draw, before_step = run.training.data.draw, adaptation.before_step

    def drawn(stream):
        assert stream == "all"
        run.rows = draw(stream)
        return run.rows

    def before(step):
        seen.append(direct_gradient(run, run.rows))
        before_step(step)

    def look(value):
        steps.append(value)
        torch.testing.assert_close(value, torch.stack(seen[-3:]).mean(0), rtol=1e-3, atol=1e-6)
        assert len(seen) == (3 if steps[1:] else 6)
        seen.clear()

    run.training.data.draw, adaptation.before_step = drawn, before
    watch(adaptation, look)
    run.training.run(lambda training: None)
    assert len(steps) == 4
    assert min(float(value.norm()) for value in steps[1:]) > 0
    assert run.training.index == run.training.used == 15  # every batch was an update
    assert run.training.data.drawn == {"all": 15, "lower": 0, "upper": 0}


@pytest.mark.parametrize("kind", ["free", "path"])
def test_a_run_resumes_exactly_between_two_upper_steps(kind, tmp_path):
    settings = f"rank=4,T_max=3,n0=0,step_size=0.1,hypergradient={kind},path_points=2"
    subject = Subject(f"debora[{settings}]", tmp_path)
    a_run_interrupted_after_every_update_equals_the_uninterrupted_one(subject)


class Toy:
    """Two adapted layers with a nonlinearity between them, in float64: data, step and model in one."""

    def __init__(self, generator) -> None:
        torch.manual_seed(0)
        self.layers = [
            DeboraLinear(nn.Linear(5, 5, dtype=torch.float64), "default", 3, DeboraConfig(target_modules=["x"]))
            for _ in range(2)
        ]
        self.inputs, self.targets = normal(generator, 2, 20, 5)
        for layer in self.layers:
            layer.base_layer.requires_grad_(False)
            for factor in layer.factors("default"):
                factor.data = 0.3 * normal(generator, 5, 3)
        self.drawn: list[str] = []
        self.model = nn.ModuleList(self.layers)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1.0)

    def loss(self) -> torch.Tensor:
        one, two = self.layers
        return (two(torch.tanh(one(self.inputs))) - self.targets).square().mean()

    def backward(self, batch) -> torch.Tensor:
        loss = self.loss()
        loss.backward()
        return loss.detach()

    def draw(self, stream: str) -> tuple[int, ...]:
        self.drawn.append(stream)
        return (0,)

    def path(self, points: int):
        rule = HypergradientRule("path", False, False, 0.0, 1, points)
        return upper_gradient(rule, self.layers, self, self, self.optimizer)


def test_the_path_adds_up_to_what_the_components_contribute(generator):
    """Along s it is the loss at s less the loss at 0, up to the midpoint rule's error, which falls as points^-2."""
    toy = Toy(generator)
    s = [layer.debora_s["default"] for layer in toy.layers]
    before = [values.clone() for values in s]
    with torch.no_grad():
        here = float(toy.loss())
        torch._foreach_zero_(s)
        contributed = here - float(toy.loss())
        torch._foreach_copy_(s, before)
    errors = [float(toy.path(points).value @ torch.cat(before)) - contributed for points in (8, 16, 32)]
    assert abs(contributed) > 0.1
    assert abs(errors[-1]) < 1e-2 * abs(contributed)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.03)
    assert all(torch.equal(now, then) for now, then in zip(s, before, strict=True))
    assert not any(values.requires_grad for values in s)
    assert all(p.grad is None for p in toy.model.parameters())
    assert toy.drawn == ["upper"] * 56


def test_the_path_of_one_point_is_the_derivative_half_way(generator):
    toy = Toy(generator)
    s = [layer.debora_s["default"] for layer in toy.layers]
    found = toy.path(1)
    for values in s:
        values.mul_(0.5).requires_grad_()
    loss = toy.loss()
    torch.testing.assert_close(found.value, torch.cat(torch.autograd.grad(loss, s)))
    torch.testing.assert_close(found.loss, loss.detach())


def test_s_is_put_back_where_a_batch_of_the_path_fails(generator):
    toy = Toy(generator)
    before = toy.layers[0].debora_s["default"].clone()
    toy.backward = lambda batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        toy.path(2)
    assert torch.equal(toy.layers[0].debora_s["default"], before)
    assert not toy.layers[0].debora_s["default"].requires_grad


def test_each_point_takes_its_own_batch():
    """The mean of the derivatives at (j - 1/2) / q of s, on the upper half's batches in their order."""
    run = started("rank=2,T_max=100,hypergradient=path,path_points=3", 6)
    adaptation, data = adaptation_of(run), run.training.data
    s = [layer.debora_s["default"] for layer in adaptation.layers.values()]
    before, expected = [values.clone() for values in s], []
    for share in (1 / 6, 3 / 6, 5 / 6):
        torch._foreach_copy_(s, torch._foreach_mul(before, share))
        expected.append(direct_gradient(run, data.draw("upper")))
    torch._foreach_copy_(s, before)
    data.drawn["upper"] = 0
    used = run.training.used
    torch.testing.assert_close(hypergradient(adaptation, run.training), torch.stack(expected).mean(0))
    assert (run.training.used, data.drawn["upper"]) == (used + 3, 3)


def test_the_last_batches_of_a_budget_are_not_exceeded_by_the_path():
    run = started("rank=2,hypergradient=path,path_points=5,T_max=2,search_fraction=1", batches=18)
    run.training.run(lambda training: None)
    assert run.training.used == 18
    assert run.training.data.drawn == {"all": 0, "lower": 8, "upper": 10}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hypergradient": "free", "step_rule": "backtracking"}, "hypergradient = free has no batch"),
        ({"hypergradient": "path", "step_rule": "backtracking"}, "hypergradient = path .* no direction of descent"),
        ({"path_points": 0}, "path_points"),
    ],
)
def test_what_does_not_fit_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        Debora.of(values, owner="debora")
