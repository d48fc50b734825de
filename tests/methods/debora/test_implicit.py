"""The solve that the closed form avoids: MINRES, the lower level's system, and how far the closed form is from it."""

from __future__ import annotations

import pytest
import torch
from scipy.sparse.linalg import minres as scipy_minres

from harness.method import Indices
from methods.debora.math import manifolds
from methods.debora.math.hypergradient import closed_form, implicit, minres
from methods.debora.upper_level import LowerSystem, upper_gradient
from tests.methods.debora.draws import normal
from tests.methods.debora.runs import adaptation_of, started

SIZES, RANK = (5, 4), 3


def symmetric(generator, n):
    matrix = normal(generator, n, n)
    return matrix + matrix.T


@pytest.mark.parametrize("products", [1, 2, 3, 7])
def test_minres_equals_scipys_at_every_step(generator, products):
    matrix, right = symmetric(generator, 12), normal(generator, 12)
    found = minres(lambda v: matrix @ v, right, products)
    expected, _ = scipy_minres(matrix.numpy(), right.numpy(), rtol=1e-15, maxiter=products)
    torch.testing.assert_close(found.value, torch.from_numpy(expected))
    assert found.products == products
    assert found.residual == pytest.approx(float((matrix @ found.value - right).norm() / right.norm()))


def test_minres_solves_an_indefinite_system(generator):
    matrix, right = symmetric(generator, 20), normal(generator, 20)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    assert eigenvalues[0] < 0 < eigenvalues[-1]
    found = minres(lambda v: matrix @ v, right, 60, 1e-11)
    torch.testing.assert_close(found.value, torch.linalg.solve(matrix, right))
    assert found.products < 30


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_minres_on_a_singular_system_ends_near_the_least_residual(generator, dtype):
    """Also where the right side has a part that no solution reaches, it does not run away."""
    factor = normal(generator, 20, 5).to(dtype)
    matrix = factor @ torch.diag(torch.tensor([1.0, -2, 3, 4, -0.5], dtype=dtype)) @ factor.T
    for right in (matrix @ normal(generator, 20).to(dtype), normal(generator, 20).to(dtype)):
        found = minres(lambda v: matrix @ v, right, 50, 1e-6)
        least = torch.linalg.lstsq(matrix, right[:, None], driver="gelsd").solution[:, 0]
        residual = (matrix @ least - right).norm() / right.norm()
        assert found.residual <= residual + 1e-3
        assert found.value.norm() < 10 * right.norm()


def test_minres_of_nothing_is_nothing():
    found = minres(lambda v: v, torch.zeros(4), 5)
    assert torch.equal(found.value, torch.zeros(4))
    assert (found.residual, found.products) == (0.0, 0)


def test_minres_reports_a_product_that_is_not_finite():
    found = minres(lambda v: v * torch.nan, torch.ones(4), 5)
    assert found.residual != found.residual
    assert found.products == 1


class Bilinear:
    """f2 = <M, Psi> + K/2 |Psi - T|^2 + decay/2 |B|^2 with d = 2, and f1 of another M; B flattened."""

    def __init__(self, generator, curvature: float, decay: float, sizes=SIZES) -> None:
        self.sizes, self.curvature, self.decay = sizes, curvature, decay
        self.lower, self.upper, self.target = normal(generator, 3, *sizes)
        self.flat = normal(generator, sum(sizes) * RANK)
        self.s = 0.5 + torch.rand(RANK, generator=generator, dtype=torch.float64)

    def factors(self, flat):
        U, V = flat.split([size * RANK for size in self.sizes])
        return U.view(-1, RANK), V.view(-1, RANK)

    def psi(self, flat, s):
        U, V = self.factors(flat)
        return (U * s) @ V.T

    def f2(self, flat, s):
        psi = self.psi(flat, s)
        bend = self.curvature / 2 * (psi - self.target).square().sum()
        return (self.lower * psi).sum() + bend + self.decay / 2 * flat.square().sum()

    def f1(self, flat, s):
        psi = self.psi(flat, s)
        return (self.upper * psi).sum() + 0.1 * psi.square().sum()

    def gradients(self):
        flat, s = self.flat.requires_grad_(), self.s.requires_grad_()
        grads = torch.autograd.grad(self.f1(flat, s), (s, flat))
        self.flat, self.s = flat.detach(), s.detach()
        return grads

    def system(self):
        """(H, J^T): d_B^2 f2 and (d_s d_B f2)^T."""
        hessians = torch.autograd.functional.hessian(self.f2, (self.flat, self.s))
        return hessians[0][0], hessians[1][0]

    def exact(self):
        grad_s, grad_flat = self.gradients()
        hessian, mixed = self.system()
        return grad_s - mixed @ torch.linalg.solve(hessian, grad_flat)

    def closed(self):
        grad_s, grad_flat = self.gradients()
        return closed_form(grad_s, self.factors(self.flat), self.factors(grad_flat), self.s)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_implicit_is_the_exact_solve_with_decay(generator, damping):
    problem = Bilinear(generator, curvature=0.5, decay=0.1)
    grad_s, grad_flat = problem.gradients()
    hessian, mixed = problem.system()
    found, solution = implicit(
        grad_s, grad_flat, lambda v: hessian @ v, lambda v: mixed @ v, damping, iterations=200, tolerance=1e-13
    )
    damped = hessian + damping * torch.eye(len(hessian), dtype=hessian.dtype)
    expected = grad_s - mixed @ torch.linalg.solve(damped, grad_flat)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert solution.residual < 1e-12
    if damping == 0:
        torch.testing.assert_close(found, problem.exact(), rtol=1e-9, atol=1e-9)


def test_the_closed_forms_error_is_in_proportion_to_the_curvature(generator):
    errors = []
    for curvature in (1e-2, 1e-3, 1e-4):
        problem = Bilinear(torch.Generator().manual_seed(1), curvature, 0.0, sizes=(5, 5))
        errors.append(float((problem.closed() - problem.exact()).norm()))
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.5)
    flat = Bilinear(torch.Generator().manual_seed(1), 0.0, 0.0, sizes=(5, 5))
    torch.testing.assert_close(flat.closed(), flat.exact(), rtol=1e-9, atol=1e-9)


def test_without_decay_the_factors_absorb_every_change_of_s():
    """Identity 3: min over B of a loss of Psi is one number for every positive s, so the exact hypergradient is 0."""
    target = normal(torch.Generator().manual_seed(2), 4, 4)
    ends, gradients = [], []
    for s in ([1.0] * 4, [0.3, 2.0, 1.0, 0.7]):
        values = torch.tensor(s, dtype=torch.float64)
        left, singular, right = torch.linalg.svd(target)
        U, V = left * (singular / values).sqrt(), right.T * (singular / values).sqrt()  # a minimiser, in closed form
        U, V, values = (tensor.detach().requires_grad_() for tensor in (U, V, values))
        upper = (((U * values) @ V.T - 0.5 * target) ** 2).sum()
        ends.append(float(upper.detach()))
        grad_s, grad_U, grad_V = torch.autograd.grad(upper, (values, U, V))
        # How the minimiser follows s: d u_i / d s_i = -u_i / (2 s_i), and v_i likewise.
        follows = ((U * grad_U).sum(0) + (V * grad_V).sum(0)) / (2 * values)
        gradients.append(grad_s - follows)
    assert ends[0] == pytest.approx(ends[1])
    assert max(gradient.abs().max() for gradient in gradients) < 1e-12


@pytest.mark.parametrize("kind", ["oblique", "stiefel"])
def test_with_a_constant_gradient_the_constrained_optimum_does_not_move_with_s(kind):
    """Identity 2: so the hypergradient is the direct term. Stiefel: as long as the s are distinct."""
    lower = normal(torch.Generator().manual_seed(3), 6, 5)
    ends = []
    for s in (torch.tensor([3.0, 2.0, 1.0]), torch.tensor([3.3, 1.5, 0.9])):
        U, V = (manifolds.project(kind, normal(torch.Generator().manual_seed(n), n, 3)) for n in (6, 5))
        for _ in range(4000):  # Riemannian gradient descent on <lower, U diag(s) V^T>
            gradients = lower @ V * s, lower.T @ U * s
            U, V = (
                manifolds.retract(kind, point, -0.05 * manifolds.project_tangent(kind, point, gradient))
                for point, gradient in zip((U, V), gradients, strict=True)
            )
        ends.append(torch.einsum("ir,jr->rij", U, V))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-6)


class Recorded:
    """A step that counts, around the one of a training."""

    def __init__(self, training) -> None:
        self.training = training

    def __getattr__(self, name):
        return getattr(self.training, name)

    def loss(self, batch: Indices):
        self.lower_batch = batch
        return self.training.loss(batch)


@pytest.mark.parametrize("geometry", ["matrix", "oblique", "stiefel"])
def test_the_models_system_is_the_derivative_of_its_riemannian_gradient(geometry):
    """Products with H and J^T on a whole BERT against differences, in float64."""
    run = started(f"rank=2,geometry={geometry},hypergradient=implicit,tau=4,eps=0.5,start_at=vertex", 3, batches=200)
    adaptation = adaptation_of(run)
    adaptation.model.double()
    layers = list(adaptation.layers.values())
    generator = torch.Generator().manual_seed(4)
    rows = tuple(range(8))
    run.training.backward(rows)
    for layer in layers:
        layer.debora_s["default"].requires_grad_()
        for factor, manifold in zip(layer.factors("default"), layer.manifolds("default"), strict=True):
            if not factor.any():
                factor.data = 0.1 * normal(generator, *factor.shape)
            factor.data = manifolds.project(manifold, factor.data)
    system = LowerSystem(layers, run.training, rows)
    sizes = [factor.numel() for factor in system.factors]

    def tangent():
        parts = normal(generator, sum(sizes)).split(sizes)
        return system.project([part.view_as(factor) for part, factor in zip(parts, system.factors, strict=True)])

    one, two = tangent(), tangent()
    torch.testing.assert_close(two @ system.hessian(one), one @ system.hessian(two))
    base, size = [factor.detach().clone() for factor in system.factors], 1e-3

    def gradient_at(step):
        for factor, point, manifold, part in zip(
            system.factors, base, system.manifolds, (step * one).split(sizes), strict=True
        ):
            factor.data = manifolds.retract(manifold, point, part.view_as(factor))
        found = LowerSystem(layers, run.training, rows).gradient.detach()
        for factor, point in zip(system.factors, base, strict=True):
            factor.data = point.clone()
        return found

    difference = (gradient_at(size) - gradient_at(-size)) / (2 * size)
    parts = [part.view_as(factor) for part, factor in zip(difference.split(sizes), system.factors, strict=True)]
    expected = system.project(parts).detach()
    # Not closer: the task's loss is taken in float32.
    assert (system.hessian(one) - expected).norm() < 1e-3 * expected.norm()
    mixed, s = float(system.mixed(one)[1]), layers[0].debora_s["default"]
    changes = []
    for sign in (1, -1):
        with torch.no_grad():
            s[1] += sign * size
        changes.append(LowerSystem(layers, run.training, rows).gradient.detach() @ one.detach())
        with torch.no_grad():
            s[1] -= sign * size
    assert mixed == pytest.approx(float(changes[0] - changes[1]) / (2 * size), rel=1e-2)


@pytest.mark.parametrize("geometry", ["matrix", "oblique", "stiefel"])
def test_implicit_on_a_model_solves_its_system_and_counts_every_pass(geometry):
    iterations = 6
    run = started(
        f"rank=2,geometry={geometry},hypergradient=implicit,iterations={iterations},damping=0.5", 6, batches=60
    )
    adaptation, step = adaptation_of(run), Recorded(run.training)
    used = run.training.used
    layers = list(adaptation.layers.values())
    found = upper_gradient(adaptation.hypergradient, layers, step, run.training.data, adaptation.optimizer)
    assert used + 4 <= run.training.used <= used + 3 + iterations  # fewer where it has converged
    assert 0 < found.residual < 1e-3
    assert found.value.shape == (24,)
    assert found.value.isfinite().all()
    assert len(step.lower_batch) == 8
    assert all(p.grad is None for p in adaptation.model.parameters())
    assert not any(layer.debora_s["default"].requires_grad for layer in layers)


def test_the_last_batches_of_a_budget_are_not_exceeded_by_implicit():
    run = started("rank=2,hypergradient=implicit,T_max=2,search_fraction=1,iterations=50,warm_up=0", batches=8)
    run.training.run(lambda training: None)
    assert run.training.used == 8
    rows = [row for row in run.training.history if "residual" in row]
    assert len(rows) == 1
    assert rows[0]["batches"] <= 8
