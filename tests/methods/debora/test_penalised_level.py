"""What a penalty lambda/2 sum_k |U^(k)|^2 on the factors makes of s: the penalty on sizes, and its hypergradient."""

from __future__ import annotations

import pytest
import torch

from methods.debora.math.hypergradient import direct
from tests.methods.debora.draws import normal

PENALTY, TAU = 0.3, 2.5


def minimise(variables, value):
    """The least value that L-BFGS finds, the variables at it."""
    optimizer = torch.optim.LBFGS(
        variables, max_iter=2000, tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = value()
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(value().detach())


@pytest.mark.parametrize("d", [2, 3, 4])
def test_over_the_simplex_it_is_a_penalty_on_the_sizes(generator, d):
    """Of components of size sigma_i = s_i prod_k |u_i^(k)|, over s with sum tau and all norms:
    lambda d/2 tau^(-2/d) (sum_i sigma_i^(2/(d+2)))^((d+2)/d), at equal norms and s in proportion to sigma^(2/(d+2)).
    For d = 2 that is (lambda / tau) (sum_i sqrt sigma_i)^2."""
    sigma = 0.2 + 2 * torch.rand(4, generator=generator, dtype=torch.float64)
    logits, log_norms = (normal(generator, *shape).requires_grad_() for shape in ((4,), (d - 1, 4)))

    def parts():
        s = TAU * logits.softmax(0)
        last = (sigma / s).log() - log_norms.sum(0)  # the norm that gives the component its size
        return s, torch.cat([log_norms, last[None]]).exp()

    found = minimise([logits, log_norms], lambda: PENALTY / 2 * parts()[1].square().sum())
    roots = sigma ** (2 / (d + 2))
    assert found == pytest.approx(float(PENALTY * d / 2 * TAU ** (-2 / d) * roots.sum() ** ((d + 2) / d)), rel=1e-10)
    s, norms = (part.detach() for part in parts())
    torch.testing.assert_close(s, TAU * roots / roots.sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norms, norms[:1].expand(d, -1), rtol=1e-5, atol=1e-5)
    if d == 2:
        assert found == pytest.approx(float(PENALTY / TAU * sigma.sqrt().sum() ** 2), rel=1e-10)


@pytest.mark.parametrize("d", [2, 3])
def test_at_a_minimum_of_the_penalised_level_direct_is_its_hypergradient(generator, d):
    """Where f1 and f2 agree, the penalty in both: -lambda |u_i^(k)|^2 / s_i for every k, and by differences."""
    shape, s = (5, 4, 3)[:d], torch.tensor([1.3, 0.8], dtype=torch.float64)
    target, equation = 2 * normal(generator, *shape), ("ar,br,r->ab", "ar,br,cr,r->abc")[d - 2]
    factors = [normal(generator, n, 2).requires_grad_() for n in shape]

    def value(s):
        data = (torch.einsum(equation, *factors, s) - target).square().sum() / 2
        return data + PENALTY / 2 * sum(factor.square().sum() for factor in factors)

    def least(s):
        return minimise(factors, lambda: value(s))

    differences = []
    for step in 1e-3 * torch.eye(2, dtype=torch.float64):
        differences.append((least(s + step) - least(s - step)) / 2e-3)
    least(s)
    leaf = s.clone().requires_grad_()
    found = direct(torch.autograd.grad(value(leaf), leaf)[0])
    assert found.abs().min() > 1e-2
    for factor in factors:
        torch.testing.assert_close(found, -PENALTY * factor.detach().square().sum(0) / s, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found, torch.tensor(differences, dtype=torch.float64), rtol=1e-4, atol=1e-6)
