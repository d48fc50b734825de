"""The manifolds against their definitions and against geoopt, in float64; the optimizer that keeps to them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from methods.debora.math import manifolds
from methods.debora.optimizer import manifold_adamw
from methods.shared.optimizer_state import keep
from tests.methods.debora.draws import normal

CONSTRAINED = ["oblique", "stiefel"]
SHAPES = [(7, 3), (4, 4), (2, 6, 3), (5, 1)]


def tangent_residual(manifold, point, vector):
    """What should be 0 for a tangent vector, written out."""
    product = point.mT @ vector
    return product.diagonal(dim1=-2, dim2=-1) if manifold == "oblique" else product + product.mT


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("manifold", CONSTRAINED)
def test_projections_are_feasible_idempotent_and_nearest(generator, manifold, shape):
    matrix = normal(generator, *shape)
    point = manifolds.project(manifold, matrix)
    assert manifolds.distance_to(manifold, point).max() < 1e-12
    torch.testing.assert_close(manifolds.project(manifold, point), point)
    near = (matrix - point).square().sum((-2, -1))
    for _ in range(20):
        other = manifolds.retract(manifold, point, 0.1 * normal(generator, *shape))
        assert (near <= (matrix - other).square().sum((-2, -1)) + 1e-12).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("manifold", CONSTRAINED)
def test_tangent_projections_are_orthogonal_projections(generator, manifold, shape):
    point = manifolds.project(manifold, normal(generator, *shape))
    vector, other = normal(generator, *shape), normal(generator, *shape)
    tangent = manifolds.project_tangent(manifold, point, vector)
    assert tangent_residual(manifold, point, tangent).abs().max() < 1e-12
    torch.testing.assert_close(manifolds.project_tangent(manifold, point, tangent), tangent)
    # Self-adjoint, so that what is left is orthogonal to every tangent vector; and without a radial part.
    others = manifolds.project_tangent(manifold, point, other)
    torch.testing.assert_close((tangent * other).sum((-2, -1)), (vector * others).sum((-2, -1)))
    assert (point * tangent).sum(-2).abs().max() < 1e-12


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("manifold", CONSTRAINED)
def test_retractions_are_feasible_and_right_to_first_order(generator, manifold, shape):
    point = manifolds.project(manifold, normal(generator, *shape))
    torch.testing.assert_close(manifolds.retract(manifold, point, torch.zeros_like(point)), point)
    tangent = manifolds.project_tangent(manifold, point, normal(generator, *shape))
    errors = []
    for size in (1e-2, 1e-3):
        moved = manifolds.retract(manifold, point, size * tangent)
        assert manifolds.distance_to(manifold, moved).max() < 1e-12
        errors.append((moved - point - size * tangent).norm())
    assert errors[1] < 0.02 * errors[0]  # of second order: a hundredth


@pytest.mark.parametrize("shape", [(7, 3), (2, 6, 3)], ids=str)
def test_stiefel_equals_geoopt(generator, shape):
    geoopt = pytest.importorskip("geoopt")
    oracle = geoopt.EuclideanStiefel()
    matrix, vector = normal(generator, *shape), normal(generator, *shape)
    point = manifolds.project("stiefel", matrix)
    torch.testing.assert_close(point, oracle.projx(matrix))
    tangent = manifolds.project_tangent("stiefel", point, vector)
    torch.testing.assert_close(tangent, oracle.proju(point, vector))
    torch.testing.assert_close(manifolds.retract("stiefel", point, tangent), oracle.retr(point, tangent))


@pytest.mark.parametrize("manifold", CONSTRAINED)
def test_a_batch_equals_each_alone_and_deleting_columns_keeps_the_constraint(generator, manifold):
    matrix, vector = normal(generator, 3, 6, 4), normal(generator, 3, 6, 4)
    point = manifolds.project(manifold, matrix)
    moved = manifolds.retract(manifold, point, manifolds.project_tangent(manifold, point, vector))
    for b in range(3):
        alone = manifolds.project(manifold, matrix[b])
        torch.testing.assert_close(alone, point[b])
        step = manifolds.project_tangent(manifold, alone, vector[b])
        torch.testing.assert_close(manifolds.retract(manifold, alone, step), moved[b])
    assert manifolds.distance_to(manifold, moved[..., [0, 3]]).max() < 1e-12
    assert manifolds.distance_to(manifold, 1.1 * moved).min() > 0.1


def test_the_euclidean_one_is_everything(generator):
    point, vector = normal(generator, 4, 2), normal(generator, 4, 2)
    assert manifolds.project("euclidean", point) is point
    assert manifolds.project_tangent("euclidean", point, vector) is vector
    assert torch.equal(manifolds.retract("euclidean", point, vector), point + vector)
    assert manifolds.distance_to("euclidean", point) == 0


@pytest.mark.parametrize("manifold", ["euclidean", *CONSTRAINED])
def test_no_columns_are_no_trouble(manifold):
    empty = torch.zeros(5, 0)
    assert manifolds.project(manifold, empty).shape == (5, 0)
    assert manifolds.retract(manifold, empty, empty).shape == (5, 0)
    assert manifolds.project_tangent(manifold, empty, empty).shape == (5, 0)
    assert manifolds.distance_to(manifold, empty) == 0


def test_more_columns_than_rows_are_refused():
    with pytest.raises(ValueError, match="4 columns of length 3 cannot be orthonormal"):
        manifolds.project("stiefel", torch.ones(3, 4))
    with pytest.raises(ValueError, match="has at most 3"):
        manifolds.retract("stiefel", torch.ones(3, 4), torch.ones(3, 4))


def trained(generator, kind, steps, learning_rate=0.05):
    """Factors on a manifold (two of one shape, one of another), a free matrix, and the optimizer after some steps."""
    shapes = [(6, 3), (6, 3), (5, 2)]
    factors = [nn.Parameter(manifolds.project(kind, normal(generator, *shape))) for shape in shapes]
    free = nn.Parameter(normal(generator, 4, 4))
    model = nn.ParameterList([*factors, free])
    optimizer = manifold_adamw(model, [(factor, kind) for factor in factors], learning_rate, 0.1)
    targets = [manifolds.project(kind, normal(generator, *shape)) for shape in shapes] + [normal(generator, 4, 4)]
    for _ in range(steps):
        optimizer.zero_grad()
        sum(((p - target) ** 2).sum() for p, target in zip(model, targets, strict=True)).backward()
        optimizer.project_gradients()
        for factor in factors:
            assert tangent_residual(kind, factor.detach(), factor.grad).abs().max() < 1e-12
        optimizer.step()
    return factors, free, targets, optimizer


@pytest.mark.parametrize("kind", CONSTRAINED)
def test_the_optimizer_stays_on_the_manifold_and_goes_downhill(generator, kind):
    factors, free, targets, optimizer = trained(generator, kind, 400)
    for factor, target in zip(factors, targets[:-1], strict=True):
        assert manifolds.distance_to(kind, factor.detach()) < 1e-12
        gradient = manifolds.project_tangent(kind, factor.detach(), 2 * (factor.detach() - target))
        assert gradient.norm() < 0.05  # a critical point
    assert (free.detach() - targets[-1]).norm() < 0.1 * targets[-1].norm()
    decays = {group.get("manifold"): group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {None: 0.1, kind: 0.0}


def test_unconstrained_it_is_adamw(generator):
    start = nn.ParameterList([nn.Parameter(normal(generator, 4, 3)), nn.Parameter(normal(generator, 3))])
    ends = []
    for make in (
        lambda model: manifold_adamw(model, [(model[0], "euclidean")], 0.01, 0.1),
        lambda model: torch.optim.AdamW(
            [{"params": [model[0]], "weight_decay": 0.1}, {"params": [model[1]], "weight_decay": 0.0}], lr=0.01
        ),
    ):
        model = copy.deepcopy(start)
        optimizer = make(model)
        for _ in range(5):
            optimizer.zero_grad()
            sum((p**3).sum() for p in model).backward()
            optimizer.step()
        ends.append([p.detach() for p in model])
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


@pytest.mark.parametrize("kind", CONSTRAINED)
def test_columns_go_with_their_moments(generator, kind):
    factors, _, _, optimizer = trained(generator, kind, 3)
    kept, parameter = torch.tensor([2, 0]), factors[0]
    moments = optimizer.state[parameter]["exp_avg"].clone()
    keep(parameter, kept, 1, optimizer)
    assert torch.equal(optimizer.state[parameter]["exp_avg"], moments[:, kept])
    optimizer.zero_grad()
    (parameter**3).sum().backward()
    optimizer.project_gradients()
    optimizer.step()
    assert parameter.shape == (6, 2)
    assert manifolds.distance_to(kind, parameter.detach()) < 1e-12
