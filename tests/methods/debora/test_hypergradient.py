"""The closed form against autograd's own second derivatives, in float64."""

from __future__ import annotations

import string

import pytest
import torch

from methods.debora.math.hypergradient import closed_form, direct

RANK = 3


def psi(factors, s):
    """sum_i s_i u_i^(1) (x) ... (x) u_i^(d), by einsum."""
    modes = string.ascii_lowercase[: len(factors)]
    return torch.einsum(f"{','.join(f'{mode}z' for mode in modes)},z->{modes}", *factors, s)


@pytest.fixture
def problem(request):
    """Factors of the given shape, s, and a loss for each level that is linear in Psi."""
    shape = request.param
    generator = torch.Generator().manual_seed(sum(shape))
    factors = [torch.randn(n, RANK, generator=generator, dtype=torch.float64, requires_grad=True) for n in shape]
    s = (0.3 + torch.rand(RANK, generator=generator, dtype=torch.float64)).requires_grad_()
    lower, upper = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return factors, s, lower, upper


def system(factors, s, lower):
    """H = d_B^2 f2 and J = d_s d_B f2 for f2 = <lower, Psi>, with B flattened."""
    sizes = [factor.numel() for factor in factors]

    def loss(flat, values):
        parts = [part.view_as(factor) for part, factor in zip(flat.split(sizes), factors, strict=True)]
        return (lower * psi(parts, values)).sum()

    flat = torch.cat([factor.detach().flatten() for factor in factors])
    hessians = torch.autograd.functional.hessian(loss, (flat, s.detach()))
    return hessians[0][0], hessians[0][1]


def response(factors, s):
    """d_s B*, (numbers of B, r): d_{s_i} u_i^(k) = -u_i^(k) / ((d-1) s_i), every other entry 0."""
    parts = [torch.diag_embed(-factor.detach() / ((len(factors) - 1) * s.detach())) for factor in factors]
    return torch.cat([part.flatten(0, 1) for part in parts])


def upper_gradients(factors, s, upper):
    loss = (upper * psi(factors, s)).sum() + 0.1 * (psi(factors, s) ** 2).sum()
    grad_s, *factor_grads = torch.autograd.grad(loss, [s, *factors])
    return grad_s, factor_grads


ANY_SHAPE = [(5, 5), (7, 4), (5, 5, 5), (7, 4, 3), (6, 5, 3, 3), (3, 2, 2, 2)]
INVERTIBLE = [(5, 5), (5, 5, 5), (6, 5, 3, 3)]


@pytest.mark.parametrize("problem", ANY_SHAPE, indirect=True, ids=str)
def test_the_response_solves_the_lower_levels_system(problem):
    factors, s, lower, _ = problem
    hessian, mixed = system(factors, s, lower)
    residual = hessian @ response(factors, s) + mixed
    assert residual.abs().max() < 1e-12 * mixed.abs().max()


@pytest.mark.parametrize("problem", ANY_SHAPE, indirect=True, ids=str)
def test_closed_form_is_the_hypergradient_of_that_response(problem):
    factors, s, _, upper = problem
    grad_s, factor_grads = upper_gradients(factors, s, upper)
    flat = torch.cat([grad.flatten() for grad in factor_grads])
    torch.testing.assert_close(closed_form(grad_s, factors, factor_grads, s), grad_s + response(factors, s).T @ flat)


@pytest.mark.parametrize("problem", INVERTIBLE, indirect=True, ids=str)
def test_closed_form_equals_a_solve_where_the_system_is_invertible(problem):
    factors, s, lower, upper = problem
    hessian, mixed = system(factors, s, lower)
    grad_s, factor_grads = upper_gradients(factors, s, upper)
    flat = torch.cat([grad.flatten() for grad in factor_grads])
    exact = grad_s - mixed.T @ torch.linalg.solve(hessian, flat)
    torch.testing.assert_close(closed_form(grad_s, factors, factor_grads, s), exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("problem", ANY_SHAPE, indirect=True, ids=str)
def test_unconstrained_and_through_psi_alone_it_is_the_direct_gradient_turned_round(problem):
    factors, s, _, upper = problem
    grad_s, factor_grads = upper_gradients(factors, s, upper)
    found = closed_form(grad_s, factors, factor_grads, s)
    torch.testing.assert_close(found, -direct(grad_s) / (len(factors) - 1))


@pytest.mark.parametrize("problem", [(5, 5), (7, 4, 3)], indirect=True, ids=str)
def test_a_term_in_the_factors_alone_breaks_that_identity(problem):
    """Which is why G is computed from its definition."""
    factors, s, _, upper = problem
    grad_s, factor_grads = upper_gradients(factors, s, upper)
    decayed = [grad + 0.1 * factor.detach() for grad, factor in zip(factor_grads, factors, strict=True)]
    d = len(factors)
    extra = 0.1 * sum((factor.detach() ** 2).sum(0) for factor in factors) / ((d - 1) * s.detach())
    torch.testing.assert_close(closed_form(grad_s, factors, decayed, s), -grad_s / (d - 1) - extra)


@pytest.mark.parametrize("problem", ANY_SHAPE, indirect=True, ids=str)
def test_gradients_without_a_radial_part_leave_the_direct_term(problem):
    factors, s, _, upper = problem
    unit = [(factor / factor.norm(dim=0)).detach().requires_grad_() for factor in factors]
    grad_s, factor_grads = upper_gradients(unit, s, upper)
    tangent = [g - u * (u * g).sum(0) for g, u in zip(factor_grads, unit, strict=True)]
    torch.testing.assert_close(closed_form(grad_s, unit, tangent, s), direct(grad_s))
    assert (closed_form(grad_s, unit, factor_grads, s) - grad_s).abs().max() > 0.1


def test_leading_dimensions_are_a_batch():
    generator = torch.Generator().manual_seed(0)
    grad_s, s = torch.rand(2, 4, RANK, generator=generator)
    factors, grads = ([torch.rand(4, n, RANK, generator=generator) for n in (6, 5, 2)] for _ in range(2))
    together = closed_form(grad_s, factors, grads, s)
    for b in range(4):
        alone = closed_form(grad_s[b], [f[b] for f in factors], [g[b] for g in grads], s[b])
        torch.testing.assert_close(together[b], alone)


def test_rank_zero_is_an_empty_gradient():
    empty = torch.zeros(0)
    factors = [torch.zeros(5, 0), torch.zeros(4, 0)]
    assert closed_form(empty, factors, factors, empty).shape == (0,)


def test_one_factor_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        closed_form(torch.ones(1), [torch.ones(3, 1)], [torch.ones(3, 1)], torch.ones(1))
