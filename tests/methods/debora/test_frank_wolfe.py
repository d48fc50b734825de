"""The Frank-Wolfe steps against slow, obvious references, in float64."""

from __future__ import annotations

import pytest
import torch

from methods.debora.math import frank_wolfe
from tests.methods.debora.draws import normal

TAU, EPS = 3.0, 0.1


def random_weights(generator, simplices, components):
    """Points of the simplex with about a third of the weights exactly 0."""
    weights = torch.rand(simplices, components + 1, generator=generator, dtype=torch.float64)
    weights = weights * (torch.rand(weights.shape, generator=generator) > 0.3)
    weights[:, 0] += 0.1
    return weights / weights.sum(-1, keepdim=True)


def vertices(components):
    """eps*1 and eps*1 + tau e_i, as rows."""
    corners = torch.full((components + 1, components), EPS, dtype=torch.float64)
    corners[1:] += TAU * torch.eye(components, dtype=torch.float64)
    return corners


def everything(weights):
    return torch.ones_like(weights[:, 1:], dtype=torch.bool)


def project(point):
    """Nearest point of S_eps by sorting (Held, Wolfe and Crowder's rule for the sum, clipping below it)."""
    shifted = point - EPS
    clipped = shifted.clamp(min=0)
    if clipped.sum() <= TAU:
        return clipped + EPS
    ordered = shifted.sort(descending=True).values
    excess = (ordered.cumsum(0) - TAU) / torch.arange(1, len(ordered) + 1)
    threshold = excess[(ordered > excess).nonzero().max()]
    return (shifted - threshold).clamp(min=0) + EPS


def minimise(weights, hessian, linear, count, steps="away"):
    """Frank-Wolfe with exact line search on 1/2 s'Qs - c's; yields (weights, gap) before each of `count` steps."""
    alive = everything(weights)
    for _ in range(count):
        s = frank_wolfe.points(weights, TAU, EPS)
        gradient = (hessian @ s[..., None])[..., 0] - linear
        direction = frank_wolfe.choose_direction(weights, gradient, alive, TAU, steps)
        yield weights, direction.gap
        d = TAU * direction.vector[:, 1:]
        curvature = (d * (hessian @ d[..., None])[..., 0]).sum(-1)
        best = direction.slope / curvature.clamp(min=1e-300)
        weights = frank_wolfe.take_step(weights, direction, best, 1e-13).weights


def test_points_and_weights_are_inverse(generator):
    weights = random_weights(generator, 5, 4)
    s = frank_wolfe.points(weights, TAU, EPS)
    torch.testing.assert_close(s, weights @ vertices(4))
    torch.testing.assert_close(frank_wolfe.vertex_weights(s, TAU, EPS), weights)
    assert (s[weights[:, 1:] == 0] == EPS).all()


def test_oracle_away_vertex_and_gaps_against_all_vertices(generator):
    weights = random_weights(generator, 50, 6)
    gradient = normal(generator, 50, 6)
    gradient[:5] = gradient[:5].abs()  # the oracle's answer is eps*1
    alive = everything(weights)
    oracle = frank_wolfe.linear_minimization_oracle(gradient, alive)
    away = frank_wolfe.away_vertex(weights, gradient)
    gap = frank_wolfe.frank_wolfe_gap(weights, gradient, alive, TAU)
    away_gap = frank_wolfe.away_gap(weights, gradient, TAU)
    assert (oracle[:5] == 0).all()
    corners = vertices(6)
    for b in range(50):
        s, g = frank_wolfe.points(weights, TAU, EPS)[b], gradient[b]
        values = [float(g @ corner) for corner in corners]
        assert oracle[b] == min(range(7), key=lambda j: values[j])
        active = [j for j in range(7) if weights[b, j] > 0]
        assert away[b] == max(active, key=lambda j: values[j])
        torch.testing.assert_close(gap[b], -(g @ (corners[oracle[b]] - s)))
        torch.testing.assert_close(away_gap[b], -(g @ (s - corners[away[b]])))


def test_gaps_are_never_negative(generator):
    weights = random_weights(generator, 2000, 5).float()
    weights[:, 0] = 0
    weights = weights / weights.sum(-1, keepdim=True)
    # Nearly equal entries, far from 0: here a difference of two inner products would round to either sign.
    gradient = -1e4 + 1e-3 * normal(generator, 2000, 5).float()
    assert (frank_wolfe.frank_wolfe_gap(weights, gradient, everything(weights), TAU) >= 0).all()
    assert (frank_wolfe.away_gap(weights, gradient, TAU) >= 0).all()
    assert ((weights[:, 1:] * gradient).sum(-1) < gradient.amin(-1)).any()


def test_the_direction_is_the_steeper_of_the_two(generator):
    weights, gradient = random_weights(generator, 200, 5), normal(generator, 200, 5)
    alive = everything(weights)
    direction = frank_wolfe.choose_direction(weights, gradient, alive, TAU)
    gap = frank_wolfe.frank_wolfe_gap(weights, gradient, alive, TAU)
    away_gap = frank_wolfe.away_gap(weights, gradient, TAU)
    assert torch.equal(direction.away, away_gap > gap)
    assert 0 < direction.away.sum() < 200
    s = frank_wolfe.points(weights, TAU, EPS)
    for b in range(200):
        corner = vertices(5)[direction.vertex[b]]
        d = s[b] - corner if direction.away[b] else corner - s[b]
        torch.testing.assert_close(direction.slope[b], -(gradient[b] @ d))
        torch.testing.assert_close(TAU * direction.vector[b, 1:], d)
        w = weights[b, direction.vertex[b]]
        expected = w / (1 - w) if direction.away[b] else torch.ones_like(w)
        torch.testing.assert_close(direction.max_step[b], expected)


def test_a_pairwise_direction_leads_from_the_worst_active_vertex_to_the_best_of_all(generator):
    weights, gradient = random_weights(generator, 200, 5), normal(generator, 200, 5)
    alive, corners = everything(weights), vertices(5)
    direction = frank_wolfe.choose_direction(weights, gradient, alive, TAU, "pairwise")
    torch.testing.assert_close(direction.gap, frank_wolfe.frank_wolfe_gap(weights, gradient, alive, TAU))
    other = normal(generator, 200, 5)
    for b in range(200):
        values = (corners @ gradient[b]).tolist()
        z = min(range(6), key=values.__getitem__)
        y = max((j for j in range(6) if weights[b, j] > 0), key=values.__getitem__)
        d = corners[z] - corners[y]
        assert direction.vertex[b] == y
        torch.testing.assert_close(TAU * direction.vector[b, 1:], d)
        torch.testing.assert_close(direction.slope[b], -(gradient[b] @ d))
        torch.testing.assert_close(direction.max_step[b], weights[b, y])
        torch.testing.assert_close(frank_wolfe.slope_along(direction, other, TAU)[b], -(other[b] @ d))
        torch.testing.assert_close(frank_wolfe.squared_length(direction, TAU)[b], d @ d)
    assert (direction.slope >= direction.gap).all()


@pytest.mark.parametrize("step_size", [0.05, 0.4, 1.0])
def test_a_pairwise_step_moves_weight_from_one_vertex_to_another(generator, step_size):
    weights, gradient = random_weights(generator, 400, 5), normal(generator, 400, 5)
    direction = frank_wolfe.choose_direction(weights, gradient, everything(weights), TAU, "pairwise")
    taken = frank_wolfe.take_step(weights, direction, step_size)
    entering = frank_wolfe.linear_minimization_oracle(gradient, everything(weights))
    kinds = {"drop": 0, "swap": 0, "to eps*1": 0, "still": 0}
    for b in range(400):
        y, z = int(direction.vertex[b]), int(entering[b])
        expected, moved = weights[b].clone(), min(step_size, float(weights[b, y]))
        expected[z] += moved
        expected[y] -= moved
        torch.testing.assert_close(taken.weights[b], expected)
        empties = y != z and float(weights[b, y]) <= step_size
        assert taken.drop[b] == (taken.weights[b, y] == 0) == empties
        assert taken.away[b] == (y != z and not empties)
        assert taken.swap[b] == (empties and weights[b, z] == 0)
        kinds["drop"] += empties
        kinds["swap"] += int(taken.swap[b])
        kinds["to eps*1"] += z == 0
        kinds["still"] += y == z
    assert kinds["to eps*1"]
    assert kinds["drop"] > kinds["swap"] > 0 or step_size < 0.1


def test_a_pairwise_step_rests_where_the_worst_active_vertex_is_the_best():
    weights = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
    gradient = torch.tensor([[-1.0, 0.0], [1.0, 2.0], [-1.0, -1.0]])
    direction = frank_wolfe.choose_direction(weights, gradient, everything(weights), TAU, "pairwise")
    taken = frank_wolfe.take_step(weights, direction, 0.3)
    assert torch.equal(taken.weights, weights)
    assert not (taken.away | taken.drop | taken.swap).any()
    assert (direction.slope == 0).all()
    assert frank_wolfe.curvature_for(direction, TAU, 0.1) == 0


def test_a_pairwise_drop_leaves_exactly_zero_in_float32(generator):
    weights, gradient = random_weights(generator, 4000, 5).float(), normal(generator, 4000, 5).float()
    direction = frank_wolfe.choose_direction(weights, gradient, everything(weights), TAU, "pairwise")
    taken = frank_wolfe.take_step(weights, direction, 1e9)
    moves = direction.slope > 0
    assert torch.equal(taken.drop, moves)
    assert moves.sum() > 1000
    assert (taken.weights.gather(-1, direction.vertex[:, None])[moves] == 0).all()
    idle = (direction.vector == 0) & (weights == 0)
    assert (taken.weights[idle] == 0).all()


def test_what_is_given_back_has_weight_and_the_rest_keeps_its_proportions():
    before = torch.tensor([[0.0, 0.25, 0.5, 0.25], [0.1, 0.2, 0.3, 0.4]])
    gradient = torch.tensor([[1.0, 0.0, -1.0], [1.0, 0.0, -1.0]])
    direction = frank_wolfe.choose_direction(before, gradient, everything(before), TAU, "pairwise")
    taken = frank_wolfe.take_step(before, direction, 1.0)
    kept = torch.tensor([[False, True, False, False], [False] * 4])
    given = frank_wolfe.give_back(taken, before, kept)
    torch.testing.assert_close(given.weights[0], torch.tensor([0.0, 0.2, 0.4, 0.4]))
    assert torch.equal(given.weights[1], taken.weights[1])
    assert taken.drop.tolist() == [True, True]
    assert given.drop.tolist() == [False, True]


def test_slopes_are_level_when_their_mean_is_within_its_standard_error():
    slopes = torch.tensor([1.0, 3.0, 2.0, 6.0])
    error = float(slopes.std()) / 2
    assert frank_wolfe.is_level(slopes, 3.0 - error + 1e-3)
    assert not frank_wolfe.is_level(slopes, 3.0 - error - 1e-3)
    assert not frank_wolfe.is_level(slopes[:0], 1e9)
    assert frank_wolfe.is_level(slopes[:1], 1.0)
    assert not frank_wolfe.is_level(slopes[:1], 0.9)
    assert not frank_wolfe.is_level(torch.tensor([torch.nan, 1.0]), 1e9)


@pytest.mark.parametrize("step_size", [0.05, 0.4, 1.0])
def test_a_step_moves_along_the_direction_and_stays_feasible(generator, step_size):
    weights, gradient = random_weights(generator, 300, 5), normal(generator, 300, 5)
    direction = frank_wolfe.choose_direction(weights, gradient, everything(weights), TAU)
    taken = frank_wolfe.take_step(weights, direction, step_size)
    assert (taken.weights >= 0).all()
    torch.testing.assert_close(taken.weights.sum(-1), torch.ones(300, dtype=torch.float64))
    assert (taken.step_size <= direction.max_step).all()
    s, moved = frank_wolfe.points(weights, TAU, EPS), frank_wolfe.points(taken.weights, TAU, EPS)
    assert (moved >= EPS).all()
    assert (moved.sum(-1) <= TAU + 5 * EPS + 1e-12).all()
    corner = vertices(5)[direction.vertex]
    d = torch.where(direction.away[:, None], s - corner, corner - s)
    alpha = direction.max_step.clamp(max=step_size)
    torch.testing.assert_close(moved, s + alpha[:, None] * d)
    torch.testing.assert_close(taken.step_size, alpha)
    assert torch.equal(taken.drop, direction.away & (direction.max_step <= step_size))
    assert torch.equal(taken.away | taken.drop, direction.away)
    emptied = taken.weights.gather(-1, direction.vertex[:, None])[:, 0] == 0
    assert torch.equal(emptied, taken.drop)
    assert taken.drop.any()


def test_a_drop_step_leaves_exactly_zero_in_float32(generator):
    """1,000 random away steps at the cap, where w - alpha (1 - w) rounds to something else than 0."""
    weights, gradient = random_weights(generator, 4000, 5).float(), normal(generator, 4000, 5).float()
    direction = frank_wolfe.choose_direction(weights, gradient, everything(weights), TAU)
    taken = frank_wolfe.take_step(weights, direction, 1e9)
    assert taken.drop.sum() > 1000
    dropped = direction.vertex[taken.drop]
    assert (taken.weights[taken.drop].gather(-1, dropped[:, None]) == 0).all()
    component = taken.drop & (direction.vertex > 0)
    s = frank_wolfe.points(taken.weights, TAU, EPS)[component]
    assert (s.gather(-1, direction.vertex[component, None] - 1) == torch.tensor(EPS)).all()


def test_zero_weights_stay_exactly_zero(generator):
    weights, gradient = random_weights(generator, 300, 5).float(), normal(generator, 300, 5).float()
    direction = frank_wolfe.choose_direction(weights, gradient, everything(weights), TAU)
    taken = frank_wolfe.take_step(weights, direction, 0.1)
    others = torch.nn.functional.one_hot(direction.vertex, 6) == 0
    assert torch.equal((taken.weights == 0) & others, (weights == 0) & others)


def test_a_full_step_towards_a_vertex_arrives_there():
    weights = torch.full((1, 5), 0.2)
    gradient = torch.tensor([[0.0, -5.0, 1.0, 0.0]])
    direction = frank_wolfe.choose_direction(weights, gradient, everything(weights), TAU)
    taken = frank_wolfe.take_step(weights, direction, 1.0)
    assert taken.weights.tolist() == [[0.0, 0.0, 1.0, 0.0, 0.0]]
    again = frank_wolfe.choose_direction(taken.weights, gradient, everything(weights), TAU)
    assert again.gap.item() == 0
    assert torch.equal(frank_wolfe.take_step(taken.weights, again, 1.0).weights, taken.weights)


def test_the_stopping_rule_holds_for_each_simplex_alone(generator):
    weights, gradient = random_weights(generator, 400, 5).float(), normal(generator, 400, 5).float()
    direction = frank_wolfe.choose_direction(weights, gradient, everything(weights), TAU)
    tolerance = direction.gap.median()
    taken = frank_wolfe.take_step(weights, direction, 0.1, tolerance)
    stays = direction.gap <= tolerance
    assert stays.sum() == 200
    assert torch.equal(taken.weights[stays], weights[stays])
    assert (taken.step_size[stays] == 0).all()
    assert not (taken.away | taken.drop)[stays].any()
    assert (taken.step_size[~stays] > 0).all()


def test_removed_components_do_not_come_back(generator):
    weights = random_weights(generator, 60, 6)
    alive = torch.rand(60, 6, generator=generator) > 0.4
    weights[:, 1:] *= alive
    weights = weights / weights.sum(-1, keepdim=True)
    for _ in range(20):
        gradient = normal(generator, 60, 6) - 1
        direction = frank_wolfe.choose_direction(weights, gradient, alive, TAU)
        weights = frank_wolfe.take_step(weights, direction, 0.3).weights
        assert (weights[:, 1:][~alive] == 0).all()


def test_a_simplex_without_components_rests_at_its_only_vertex():
    weights = torch.tensor([[1.0, 0.0, 0.0]])
    alive = torch.zeros(1, 2, dtype=torch.bool)
    direction = frank_wolfe.choose_direction(weights, torch.zeros(1, 2), alive, TAU)
    taken = frank_wolfe.take_step(weights, direction, 1.0)
    assert direction.gap.item() == 0
    assert torch.equal(taken.weights, weights)


def test_a_batch_of_simplices_equals_each_alone(generator):
    weights, gradient = random_weights(generator, 30, 5), normal(generator, 30, 5)
    alive = everything(weights)
    together = frank_wolfe.take_step(weights, frank_wolfe.choose_direction(weights, gradient, alive, TAU), 0.2, 0.5)
    for b in range(30):
        one = slice(b, b + 1)
        direction = frank_wolfe.choose_direction(weights[one], gradient[one], alive[one], TAU)
        alone = frank_wolfe.take_step(weights[one], direction, 0.2, 0.5)
        for field, expected in zip(alone, together, strict=True):
            assert torch.equal(field, expected[one])


@pytest.mark.parametrize("steps", ["away", "pairwise"])
@pytest.mark.parametrize("start", ["interior", "vertex"])
def test_projection_problems_reach_the_exact_solution_and_support(generator, start, steps):
    components, simplices = 8, 12
    target = 2 * normal(generator, simplices, components)
    weights = torch.zeros(simplices, components + 1, dtype=torch.float64)
    if start == "interior":
        weights[:, 1:] = 1 / components
    else:
        weights[:, 0] = 1
    hessian = torch.eye(components, dtype=torch.float64).expand(simplices, -1, -1)
    *_, (weights, gap) = minimise(weights, hessian, target, 300, steps)
    exact = torch.stack([project(point) for point in target])
    torch.testing.assert_close(frank_wolfe.points(weights, TAU, EPS), exact, rtol=0, atol=1e-6)
    assert torch.equal(weights[:, 1:] == 0, exact <= EPS)
    assert (gap < 1e-10).all()


@pytest.mark.parametrize("kind", ["away", "pairwise"])
def test_random_quadratics_reach_the_solution_of_projected_gradient(generator, kind):
    components, simplices = 6, 8
    factor = normal(generator, simplices, components, components)
    hessian = factor @ factor.mT / components + torch.eye(components, dtype=torch.float64)
    linear = 3 * normal(generator, simplices, components)
    start = torch.full((simplices, components + 1), 1 / (components + 1), dtype=torch.float64)
    steps = list(minimise(start, hessian, linear, 500, kind))
    assert all((weights >= 0).all() and (gap >= 0).all() for weights, gap in steps)
    weights = steps[-1][0]
    rate = 1 / torch.linalg.eigvalsh(hessian)[:, -1]
    exact = torch.full((simplices, components), EPS, dtype=torch.float64)
    for _ in range(200):
        gradient = (hessian @ exact[..., None])[..., 0] - linear
        exact = torch.stack([project(point) for point in exact - rate[:, None] * gradient])
    torch.testing.assert_close(frank_wolfe.points(weights, TAU, EPS), exact, rtol=0, atol=1e-6)
    assert torch.equal(weights[:, 1:] == 0, exact <= EPS + 1e-9)


def test_the_smallest_gap_falls_with_the_diminishing_rule(generator):
    components, simplices = 8, 10
    target = 2 * normal(generator, simplices, components)
    weights = torch.zeros(simplices, components + 1, dtype=torch.float64)
    weights[:, 0] = 1
    smallest = []
    for n in range(400):
        gradient = frank_wolfe.points(weights, TAU, EPS) - target
        direction = frank_wolfe.choose_direction(weights, gradient, everything(weights), TAU)
        smallest.append(direction.gap if n == 0 else torch.minimum(smallest[-1], direction.gap))
        weights = frank_wolfe.take_step(weights, direction, 2 / (n + 2)).weights
    diameter = 2 * TAU**2  # of the simplex, squared; the objective's curvature is 1
    for n in range(2, 400):
        assert (smallest[n] <= 27 * diameter / (4 * (n + 2))).all()  # Jaggi (2013), theorem 2, for towards steps alone
    assert (smallest[-1] < smallest[20] / 5).all()


def quadratic(hessian, linear):
    """1/2 s'Qs - c's of every simplex, summed, as a function of the weights."""

    def loss(weights):
        s = frank_wolfe.points(weights, TAU, EPS)
        return (0.5 * s * (hessian @ s[..., None])[..., 0] - linear * s).sum()

    return loss


def random_quadratic(generator, simplices, components):
    factor = normal(generator, simplices, components, components)
    hessian = factor @ factor.mT / components + torch.eye(components, dtype=torch.float64)
    return hessian, 3 * normal(generator, simplices, components)


def test_the_short_step_is_the_minimiser_where_the_bound_is_exact(generator):
    weights, gradient = random_weights(generator, 100, 5), normal(generator, 100, 5)
    direction = frank_wolfe.choose_direction(weights, gradient, everything(weights), TAU)
    squares = frank_wolfe.squared_length(direction, TAU)
    s = frank_wolfe.points(weights, TAU, EPS)
    corner = vertices(5)[direction.vertex]
    d = torch.where(direction.away[:, None], s - corner, corner - s)
    torch.testing.assert_close(squares, d.square().sum(-1))
    alpha = frank_wolfe.short_step_size(direction, squares, 7.0)
    # f(s + alpha d) = f(s) - alpha slope + 7/2 alpha^2 |d|^2 has no slope left there.
    torch.testing.assert_close(7.0 * alpha * squares, direction.slope)
    largest = frank_wolfe.curvature_for(direction, TAU, 0.2)
    assert float(frank_wolfe.short_step_size(direction, squares, largest).max()) == pytest.approx(0.2)


def test_at_a_vertex_that_is_the_oracles_the_short_step_is_zero():
    weights = torch.tensor([[0.0, 1.0, 0.0]])
    direction = frank_wolfe.choose_direction(weights, torch.tensor([[-1.0, 0.0]]), everything(weights), TAU)
    squares = frank_wolfe.squared_length(direction, TAU)
    assert frank_wolfe.short_step_size(direction, squares, 1.0).item() == 0
    assert frank_wolfe.curvature_for(direction, TAU, 0.1) == 0
    found = frank_wolfe.backtrack(weights, direction, TAU, lambda moved: moved.sum() / 0, 0.0, 0.0, 3)
    assert torch.equal(found.taken.weights, weights)
    assert found.trials == 0


@pytest.mark.parametrize("steps", ["away", "pairwise"])
@pytest.mark.parametrize("first", [1e-3, 1.0, 1e4])
def test_backtracking_reaches_the_exact_solution_from_any_first_estimate(generator, first, steps):
    components, simplices = 6, 4
    hessian, linear = random_quadratic(generator, simplices, components)
    loss = quadratic(hessian, linear)
    weights = torch.full((simplices, components + 1), 1 / (components + 1), dtype=torch.float64)
    curvature, previous = first, float(loss(weights))
    for _ in range(400):
        s = frank_wolfe.points(weights, TAU, EPS)
        gradient = (hessian @ s[..., None])[..., 0] - linear
        direction = frank_wolfe.choose_direction(weights, gradient, everything(weights), TAU, steps)
        if float(direction.gap.max()) < 1e-9:
            break
        found = frank_wolfe.backtrack(weights, direction, TAU, loss, previous, curvature, 30)
        promised = 0.25 * float((found.taken.step_size * direction.slope).sum())
        now = float(loss(found.taken.weights))
        assert now <= previous - promised + 1e-12
        assert promised > 0
        weights, curvature, previous = found.taken.weights, found.curvature, now
    # The estimate stays within what the rule needs: twice the largest eigenvalue, after the first few steps.
    assert curvature <= 2 * float(torch.linalg.eigvalsh(hessian).max())
    for b in range(simplices):
        *_, (exact, _) = minimise(weights[b : b + 1], hessian[b : b + 1], linear[b : b + 1], 300)
        torch.testing.assert_close(weights[b : b + 1], exact, rtol=0, atol=1e-4)


def test_backtracking_gives_up_on_a_direction_of_ascent(generator):
    """As with the plain closed form, whose direction ascends the loss at fixed factors."""
    hessian, linear = random_quadratic(generator, 1, 5)
    loss, trials = quadratic(hessian, linear), []
    weights = torch.full((1, 6), 1 / 6, dtype=torch.float64)
    s = frank_wolfe.points(weights, TAU, EPS)
    turned = linear - (hessian @ s[..., None])[..., 0]
    direction = frank_wolfe.choose_direction(weights, turned, everything(weights), TAU)

    def watched(moved):
        trials.append(loss(moved))
        return trials[-1]

    found = frank_wolfe.backtrack(weights, direction, TAU, watched, float(loss(weights)), 1.0, 5)
    assert torch.equal(found.taken.weights, weights)
    assert found.taken.step_size.item() == 0
    assert not (found.taken.away | found.taken.drop).any()
    assert (found.trials, len(trials), found.curvature) == (5, 5, 16.0)


def test_backtracking_drops_a_component_exactly():
    """Where the decrease is sufficient at the largest step away, the weight is 0 after it."""
    weights = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
    gradient = torch.tensor([[1.0, 0.1]], dtype=torch.float64)
    direction = frank_wolfe.choose_direction(weights, gradient, everything(weights), TAU)
    assert direction.away.item()

    def loss(moved):
        return (frank_wolfe.points(moved, TAU, EPS) * gradient).sum()

    found = frank_wolfe.backtrack(weights, direction, TAU, loss, float(loss(weights)), 1e-3, 4)
    assert found.taken.drop.item()
    assert found.taken.weights[0, 1] == 0
    assert found.trials == 1
