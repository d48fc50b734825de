"""s folded into the factors, which are free after it; and the penalty on free factors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from methods.debora.math import manifolds
from methods.debora.optimizer import ManifoldAdamW, manifold_adamw
from methods.debora.penalty import FactorPenalty
from methods.debora.tuner.config import DeboraConfig
from methods.debora.tuner.convolution import DeboraConv2d
from methods.debora.tuner.layer import DeboraLayer, DeboraLinear
from methods.shared.peft_names import ADAPTER
from tests.methods.debora.runs import FAST, adaptation_of, logits, started

GEOMETRIES = ["matrix", "oblique", "stiefel"]
DECAY = 0.1


class Net(nn.Module):
    """One adapted layer, d = 2 or 4, in float64, and a head of one matrix."""

    def __init__(self, modes: int, geometry: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = DeboraConfig(target_modules=["x"], geometry=geometry, start="vertex")
        if modes == 2:
            self.adapted: DeboraLayer = DeboraLinear(nn.Linear(6, 5).double().requires_grad_(False), ADAPTER, 3, config)
        else:
            self.adapted = DeboraConv2d(nn.Conv2d(6, 5, 3).double().requires_grad_(False), ADAPTER, 3, config)
        for factor, manifold in self.constrained():
            with torch.no_grad():
                factor.copy_(manifolds.project(manifold, torch.randn_like(factor)))
        self.adapted.debora_s[ADAPTER].copy_(torch.tensor([0.02, 0.7, 3.0]))
        self.head = nn.Linear(5, 2, bias=False).double()
        self.x = torch.randn(4, 6) if modes == 2 else torch.randn(4, 6, 5, 5)

    def constrained(self):
        return list(zip(self.adapted.factors(ADAPTER), self.adapted.manifolds(ADAPTER), strict=True))

    def forward(self) -> torch.Tensor:
        y = self.adapted(self.x.double())
        return self.head(y if y.dim() == 2 else y.mean((2, 3)))


def backward(net: Net, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    net().tanh().sum().backward()


def trained(modes: int, geometry: str, updates: int = 3) -> tuple[Net, ManifoldAdamW]:
    net = Net(modes, geometry)
    optimizer = manifold_adamw(net, net.constrained(), 0.01, DECAY)
    for _ in range(updates):
        backward(net, optimizer)
        optimizer.project_gradients()
        optimizer.step()
    return net, optimizer


def moments(net: Net, optimizer: torch.optim.Optimizer) -> list[tuple[torch.Tensor, ...]]:
    states = (optimizer.state[factor] for factor in net.adapted.factors(ADAPTER))
    return [(state["exp_avg"].clone(), state["exp_avg_sq"].clone(), state["step"].clone()) for state in states]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("modes", [2, 4])
def test_folding_leaves_the_function_and_makes_s_equal(modes, geometry):
    net, optimizer = trained(modes, geometry)
    output, update = net(), net.adapted.get_delta_weight(ADAPTER)
    before = [factor.detach().norm(dim=0) for factor in net.adapted.factors(ADAPTER)]
    net.adapted.fold(ADAPTER, 1.5, optimizer)
    torch.testing.assert_close(net(), output)
    torch.testing.assert_close(net.adapted.get_delta_weight(ADAPTER), update)
    assert net.adapted.debora_s[ADAPTER].tolist() == [1.5] * 3
    assert net.adapted.manifolds(ADAPTER) == ("euclidean",) * modes
    grown = [f.detach().norm(dim=0) / norm for f, norm in zip(net.adapted.factors(ADAPTER), before, strict=True)]
    for one in grown:  # every mode takes the same share
        torch.testing.assert_close(one, grown[0])


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("modes", [2, 4])
def test_gradients_and_moments_follow_the_chain_rule(modes, geometry):
    """Autograd's gradient after folding is the old one's image, and so are the moments, by the same factor."""
    net, optimizer = trained(modes, geometry)
    backward(net, optimizer)
    old = [factor.grad.clone() for factor in net.adapted.factors(ADAPTER)]
    before = moments(net, optimizer)
    net.adapted.fold(ADAPTER, 1.5, optimizer)
    carried = [factor.grad.clone() for factor in net.adapted.factors(ADAPTER)]
    backward(net, optimizer)
    for factor, gradient, image in zip(net.adapted.factors(ADAPTER), old, carried, strict=True):
        torch.testing.assert_close(image, factor.grad)
        assert not torch.allclose(image, gradient)
    for gradient, image, (mean, square, steps), after in zip(
        old, carried, before, moments(net, optimizer), strict=True
    ):
        ratio = image / gradient
        torch.testing.assert_close(after[0], mean * ratio)
        torch.testing.assert_close(after[1], square * ratio**2)
        assert torch.equal(after[2], steps)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("modes", [2, 4])
def test_training_goes_on_as_plain_adamw(modes, geometry):
    net, optimizer = trained(modes, geometry)
    net.adapted.fold(ADAPTER, 1.5, optimizer)
    optimizer.release(DECAY)
    twin = copy.deepcopy(net)
    plain = torch.optim.AdamW(twin.parameters(), 0.01, weight_decay=DECAY)
    for own, other in zip(net.parameters(), twin.parameters(), strict=True):
        if own in optimizer.state:
            plain.state[other] = copy.deepcopy(optimizer.state[own])
    for _ in range(3):
        for model, its in ((net, optimizer), (twin, plain)):
            backward(model, its)
            if its is optimizer:
                optimizer.project_gradients()
            its.step()
    for own, other in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, other)
    if geometry != "matrix":
        assert all(
            manifolds.distance_to(geometry, factor.detach()) > 0.01 for factor in net.adapted.factors(ADAPTER)[:2]
        )


def test_a_layer_without_components_folds_to_itself():
    net, optimizer = trained(2, "stiefel")
    net.adapted.keep_columns(ADAPTER, torch.tensor([], dtype=torch.int64), optimizer)
    output = net()
    net.adapted.fold(ADAPTER, 1.5, optimizer)
    optimizer.release(DECAY)
    assert torch.equal(net(), output)
    backward(net, optimizer)
    optimizer.step()


def fold(adaptation) -> None:
    for layer in adaptation.layers.values():
        layer.fold(ADAPTER, 2.0, adaptation.optimizer)
    adaptation.optimizer.release(DECAY)


@pytest.mark.parametrize("geometry", ["oblique", "stiefel"])
def test_a_checkpoint_from_after_folding_resumes_exactly(geometry):
    settings = f"{FAST},geometry={geometry},fold=false"  # the run does not do it itself
    run = started(settings, 14)
    adaptation = adaptation_of(run)
    assert adaptation.stream == "all"
    fold(adaptation)
    run.training.update()
    state = copy.deepcopy(run.training.state_dict())
    other = started(settings)
    other.training.load_state_dict(state)
    for layer in adaptation_of(other).layers.values():
        layer.release(ADAPTER)
    for _ in range(3):
        run.training.update()
        other.training.update()
    assert torch.equal(logits(other), logits(run))
    groups = adaptation_of(other).optimizer.param_groups
    assert not any("manifold" in group for group in groups)
    for (_, one), (_, two) in zip(
        adaptation.model.named_parameters(), adaptation_of(other).model.named_parameters(), strict=True
    ):
        assert torch.equal(one, two)


@pytest.mark.parametrize("modes", [2, 4])
def test_the_penalty_is_its_explicit_form_under_autograd(modes):
    net, optimizer = trained(modes, "matrix")
    factors, strength = net.adapted.factors(ADAPTER), 0.3
    backward(net, optimizer)
    before = [factor.grad.clone() for factor in factors]
    head = net.head.weight.grad.clone()
    units = net.adapted.units()
    assert (len(set(units)) > 1) == (modes == 4)  # a kernel's small factors are longer at the start
    penalty = strength / 2 * sum((factor / unit).square().sum() for factor, unit in zip(factors, units, strict=True))
    expected = [a + b for a, b in zip(before, torch.autograd.grad(penalty, factors), strict=True)]
    FactorPenalty(factors, units, strength, 0.0).add()
    for factor, gradient in zip(factors, expected, strict=True):
        torch.testing.assert_close(factor.grad, gradient)
    assert torch.equal(net.head.weight.grad, head)
