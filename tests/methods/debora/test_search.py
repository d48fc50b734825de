"""The search alone, on gradients and objectives of a few numbers: no model, no data, no loop."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch

from methods.debora.search import Objective, Rules, Search

TAU, EPS = 5.0, 0.1


def slow_frank_wolfe(
    s: list[float], g: list[float], tau: float, eps: float, size: float, steps: str = "away"
) -> list[float]:
    """Algorithm 1, steps 3 to 6, for one simplex, over a list of all vertices; or the pairwise step."""
    r = len(s)
    corners = [[eps] * r] + [[eps + tau * (i == j) for i in range(r)] for j in range(r)]
    weights = [(x - eps) / tau for x in s]
    weights = [1 - sum(weights), *weights]

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    z = min(corners, key=lambda corner: dot(g, corner))
    carrying = [j for j in range(r + 1) if weights[j] > 1e-5]
    away = max(carrying, key=lambda j: dot(g, corners[j]))
    h = [a - b for a, b in zip(z, s, strict=True)]
    b = [a - c for a, c in zip(s, corners[away], strict=True)]
    if steps == "pairwise":
        d, limit = [x + y for x, y in zip(h, b, strict=True)], weights[away]
    elif -dot(g, h) >= -dot(g, b):
        d, limit = h, 1.0
    else:
        d, limit = b, weights[away] / (1 - weights[away])
    return [x + min(size, limit) * y for x, y in zip(s, d, strict=True)]


def rules(**changes) -> Rules:
    return Rules(**{"tau": TAU, "eps": EPS, "step_size": 0.3} | changes)


def gradients(count: int, size: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("interior", [True, False])
@pytest.mark.parametrize("one_simplex", [True, False])
@pytest.mark.parametrize("step_rule", ["fixed", "linear", "diminishing"])
@pytest.mark.parametrize("momentum", [0.0, 0.75])
@pytest.mark.parametrize("steps", ["away", "pairwise"])
def test_steps_against_a_slow_reference(interior, one_simplex, step_rule, momentum, steps):
    made = rules(step_rule=step_rule, momentum=momentum, steps=steps)
    search = Search(3, 4, made, one_simplex=one_simplex, interior=interior)
    size = 12 if one_simplex else 4
    seen: list[list[float]] = []
    for n, gradient in enumerate(gradients(9, 12)):
        s, g = search.s.tolist(), gradient.tolist()
        seen.append(g)
        powers = [momentum ** (n - i) for i in range(n + 1)]
        average = [
            sum(w * x for w, x in zip(powers, own, strict=True)) / sum(powers) for own in zip(*seen, strict=True)
        ]
        step = 0.3 * {"fixed": 1, "linear": 1 - n / 9, "diminishing": 2 / (n + 2)}[step_rule]
        expected: list[float] = []
        for first in range(0, 12, size):
            own = slice(first, first + size)
            expected += slow_frank_wolfe(s[own], average[own], TAU, EPS, step, steps)
        moved = search.step(gradient, progress=n / 9)
        assert search.s.tolist() == pytest.approx(expected, abs=1e-5)
        assert float(moved.history["hypergradient_norm"]) == pytest.approx(float(torch.tensor(average).norm()))
        assert moved.dropped == [[False] * 4] * 3
    assert search.steps == 9


@pytest.mark.parametrize("one_simplex", [True, False])
@pytest.mark.parametrize("interior", [True, False])
def test_where_s_starts(one_simplex, interior):
    search = Search(3, 4, rules(), one_simplex=one_simplex, interior=interior)
    shared = TAU / (12 if one_simplex else 4) if interior else 0.0
    torch.testing.assert_close(search.s, torch.full((12,), EPS + shared))
    assert search.ranks == [4, 4, 4]


@pytest.mark.parametrize("one_simplex", [True, False])
def test_s_is_feasible_and_what_is_dropped_stays_away(one_simplex):
    search = Search(3, 4, rules(first_truncation=0), one_simplex=one_simplex)
    for gradient in gradients(20, 12):
        live = search.live
        before = len(live)
        moved = search.step(gradient[live])
        flags = [flag for own in moved.dropped for flag in own]
        assert len(flags) == before
        assert torch.equal(search.live, live[~torch.tensor(flags)])
        assert [own.count(False) for own in moved.dropped] == search.ranks
        assert sum(search.ranks) == len(search.live) == len(search.s)
        for own in [search.s] if one_simplex else search.s.split(search.ranks):
            assert (own > EPS).all()
            assert own.sum() <= TAU + EPS * len(own) + 1e-4
    assert 0 < len(search.live) < 12


def test_one_simplex_loses_at_most_one_component_a_step():
    search = Search(4, 3, rules(first_truncation=0), one_simplex=True)
    for gradient in gradients(30, 12):
        before = len(search.live)
        moved = search.step(gradient[search.live])
        assert before - len(search.live) in (0, float(moved.history["drop"]))
    assert len(search.live) < 12


def test_truncation_waits_for_its_step():
    search = Search(1, 3, rules(step_size=1.0, first_truncation=2))
    found = []
    for gradient in ([1.0, 1, -1], [1.0, 1, -1], [1.0, 1, -1]):
        search.step(torch.tensor(gradient)[search.live])
        found.append(search.ranks[0])
    assert found == [3, 3, 1]
    assert search.live.tolist() == [2]


def test_without_truncation_everything_waits_for_the_end():
    search = Search(2, 2, rules(step_size=1.0))
    search.step(torch.tensor([1.0, -1, 1, 1]))
    assert search.ranks == [2, 2]
    s = search.s
    assert search.freeze() == [[True, False], [True, True]]
    assert search.frozen
    assert search.ranks == [1, 0]
    assert search.s.tolist() == [s[1]]
    assert search.sizes()["ranks"] == [1, 0]
    assert search.sizes()["rank"] == 1


def test_a_hypergradient_that_is_positive_everywhere_takes_everything():
    search = Search(2, 3, rules(step_size=1.0, first_truncation=0))
    assert search.step(torch.ones(6)).dropped == [[True] * 3] * 2
    assert search.ranks == [0, 0]
    assert len(search.s) == 0
    assert search.freeze() == [[], []]


def test_components_can_be_dropped_from_outside():
    search = Search(2, 3, rules())
    assert search.drop([True, False, False, False, True, True]) == [[True, False, False], [False, True, True]]
    assert search.ranks == [2, 1]
    assert search.live.tolist() == [1, 2, 3]
    assert search.drop([False] * 3) == [[False, False], [False]]


def test_the_face_is_identified_when_gaps_are_small_and_the_active_set_stays():
    target = torch.tensor([3.0, 0.0, 2.0, 0.0])  # in the simplex's own face of two components
    search = Search(1, 4, rules(step_rule="diminishing", step_size=1.0, tolerance=0.5, face_steps=3))
    identified = []
    for _ in range(60):
        search.step(search.s - EPS - target)
        identified.append(search.identified)
        if search.identified:
            break
    assert identified[-1]
    assert len(identified) > 3
    assert search.stable_steps >= 3
    assert search.freeze() == [[False, True, False, True]]
    never = Search(1, 4, rules(step_rule="diminishing", step_size=1.0, tolerance=0.5))
    for _ in range(60):
        never.step(never.s - EPS - target)
    assert not never.identified


def nearest(point: torch.Tensor) -> torch.Tensor:
    """The point of one simplex nearest to `point`, by bisection on the shift that it takes."""
    low, high = point.min() - TAU, point.max()
    for _ in range(60):
        shift = (low + high) / 2
        low, high = (shift, high) if (point - EPS - shift).clamp(min=0).sum() > TAU else (low, shift)
    return (point - EPS - high.clamp(min=0)).clamp(min=0) + EPS


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize(("steps", "step_size"), [("pairwise", 0.005), ("away", 0.008)])
def test_noise_does_not_hide_the_face_nor_name_a_wrong_one(noise, steps, step_size):
    """1/2 |s - target|^2 with noisy gradients. A drop takes longer than `face_steps`, so that a stable active set alone
    would name the first one. The gap, a maximum over noise, never is 0."""
    target = torch.tensor([4.0, 3.0, 2.5, -2.0, -3.0, -2.0, -2.5, -4.0])
    made = rules(step_rule="linear", step_size=step_size, steps=steps, momentum=0.9, face_steps=15)
    stable = 0
    for seed in range(4):
        search = Search(1, 8, made)
        for n, drawn in enumerate(gradients(500, 8, seed)):
            moved = search.step(search.s - target + noise * drawn, progress=n / 500)
            assert float(moved.history["gap"]) > 0
            stable += search.stable_steps >= 15 and not search.identified
            if search.identified:
                break
        assert search.active == [True] * 3 + [False] * 5
        assert search.active == (nearest(target) > EPS).tolist()
    assert stable > 10


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_unbiased_slope_is_that_of_the_true_gradient_in_the_mean_and_the_gap_is_not(momentum):
    """No gradient but noise: there is nothing to gain. Steps too small to move anything."""
    search = Search(2, 4, rules(step_size=1e-9, momentum=momentum))
    rows = [search.step(gradient).history for gradient in gradients(400, 8)]
    assert "unbiased_slope" not in rows[0]
    slopes = torch.stack([row["unbiased_slope"] for row in rows[1:]])
    assert abs(float(slopes.mean())) < 3 * float(slopes.std()) / 399**0.5
    gaps = torch.stack([row["gap"] for row in rows[1:]])
    assert float(gaps.mean()) > 20 * float(gaps.std()) / 399**0.5


def test_the_average_begins_as_nearly_the_plain_mean():
    """The first hypergradients count alike, so that their noise averages out; it survives what is dropped."""
    search = Search(1, 50, rules(step_size=1e-9, momentum=0.9))
    given = gradients(5, 50)
    for gradient in given:
        search.step(gradient)
    weights = [0.9 ** (4 - n) * 0.1 / (1 - 0.9**5) for n in range(5)]
    expected = sum(w * gradient for w, gradient in zip(weights, given, strict=True))
    torch.testing.assert_close(search.gradient[0], expected)
    assert sum(w**2 for w in weights) < 0.21 < 0.46 < 0.9**8 + sum((0.1 * 0.9**n) ** 2 for n in range(4))
    search.drop([n % 2 == 0 for n in range(50)])
    search.step(torch.zeros(25))
    kept = expected[1::2] * 0.9 * (1 - 0.9**5) / (1 - 0.9**6)
    torch.testing.assert_close(search.gradient[0, 1::2], kept)


@pytest.mark.parametrize("steps", ["away", "pairwise"])
def test_short_steps_keep_the_curvature_of_the_first(steps):
    target = torch.tensor([3.0, -1.0, 2.0, -1.0, 1.0, 0.5])
    search = Search(2, 3, rules(step_rule="short", step_size=0.1, steps=steps))
    sizes, curvatures, empties = [], set(), 0.0
    for _ in range(80):
        before, gradient = search.s, search.s - target
        moved = search.step(gradient)
        curvatures.add(moved.history["curvature"])
        sizes.append(float(moved.history["step_size"]))
        empties += float(moved.history["drop"])
        length = (search.s - before).norm()
        # On 1/2 |s - target|^2 with a curvature above 1 no step goes beyond the least point along it.
        assert float((search.s - before) @ (search.s - target)) <= 1e-5 or length == 0
    assert len(curvatures) == 1
    assert curvatures.pop() > 1
    assert sizes[0] <= 0.1 + 1e-6
    assert max(sizes[-5:]) < sizes[0] / 2
    assert search.active[1] is search.active[3] is False
    assert empties > 0


def test_pairwise_swaps_are_told():
    search = Search(1, 3, rules(steps="pairwise", step_size=1.0))
    found = []
    for gradient in ([1.0, 0, -1], [0.0, 1, -1], [-1.0, 0, 1]):
        history = search.step(torch.tensor(gradient)).history
        found.append((float(history["drop"]), float(history["swap"])))
    assert found == [(1, 0), (1, 0), (1, 1)]
    assert search.active == [True, False, False]


def searched(target: int, gradient: list[float], **settings) -> Search:
    """A search of two layers with three components each, whose first step follows this gradient."""
    made = {"step_size": 1.0, "steps": "pairwise", "first_truncation": 0} | settings
    costs = made.pop("costs", None)
    search = Search(2, 3, rules(**made), costs=costs, target=target)
    assert not search.reached
    search.step(torch.tensor(gradient))
    return search


def test_a_step_lets_go_of_no_more_than_the_target_asks():
    """Each layer's simplex would drop one. The weaker is the one with the larger entry."""
    gradient = [1.0, 0, -1, 0, 2, -1]
    assert searched(3, gradient).ranks == [2, 2]
    reached = searched(5, gradient)
    assert reached.reached
    assert reached.ranks == [3, 2]
    assert reached.active == [True] * 5
    assert bool((reached.s > EPS).all())
    for own in reached.s.split([3, 2]):
        assert float((own - EPS).sum()) == pytest.approx(TAU)
    assert searched(5, [3.0, 0, -1, 0, 2, -1]).ranks == [2, 3]
    assert reached.freeze() == [[False] * 3, [False] * 2]


def test_a_full_step_to_one_vertex_stops_at_the_target():
    search = Search(1, 5, rules(step_size=1.0), target=3)
    search.step(torch.tensor([0.3, 0.1, -9.0, 0.2, 0.4]))
    assert search.reached
    assert search.active == [False, True, True, True, False]
    assert search.freeze() == [[True, False, False, False, True]]
    everything = Search(1, 3, rules(step_size=1.0), target=1)
    everything.step(torch.tensor([1.0, 3.0, 2.0]))
    assert everything.active == [True, False, False]


def test_the_target_counts_what_components_cost():
    gradient = [1.0, 0, -1, 0, 2, -1]
    assert searched(29, gradient, costs=[4, 6]).ranks == [3, 2]  # 30 before it, 24 after
    assert searched(22, gradient, costs=[4, 6]).ranks == [2, 2]  # 20
    assert searched(29, [3.0, 0, -1, 0, 2, -1], costs=[4, 6]).ranks == [2, 3]


@pytest.mark.parametrize("first_truncation", [None, 0, 6])
@pytest.mark.parametrize("one_simplex", [True, False])
@pytest.mark.parametrize("settings", [{"steps": "pairwise"}, {}, {"step_size": 1.0}, {"momentum": 0.8}])
def test_whatever_it_follows_the_search_ends_at_its_target(settings, one_simplex, first_truncation):
    costs = [3, 1, 2, 5]
    for seed in range(4):
        made = rules(first_truncation=first_truncation, **settings)
        search = Search(4, 3, made, one_simplex=one_simplex, costs=costs, target=14)
        for gradient in gradients(60, 12, seed):
            search.step(gradient[search.live])
            if search.reached:
                break
        assert (search.weights >= 0).all()
        torch.testing.assert_close(search.weights.sum(-1), torch.ones(len(search.weights)))
        search.freeze()
        spent = sum(cost * rank for cost, rank in zip(costs, search.ranks, strict=True))
        if search.reached:
            assert 14 - 5 < spent <= 14
        else:
            assert spent > 14
            search.cut_to_target(torch.arange(len(search.live)))
            assert 14 - 5 < sum(cost * rank for cost, rank in zip(costs, search.ranks, strict=True)) <= 14


def test_from_a_vertex_the_target_is_only_cut_to():
    search = Search(1, 4, rules(step_size=0.2), interior=False, target=2)
    assert not search.reached
    for gradient in ([-1.0, 0, 0, 0], [0.0, -1, 0, 0], [0.0, 0, -1, 0]):
        search.step(torch.tensor(gradient))
        assert not search.reached
    assert search.freeze() == [[False, False, False, True]]
    assert search.over_target
    assert search.cut_to_target(search.s) == [[True, False, False]]
    assert not search.over_target
    assert search.cut_to_target(search.s) == [[False, False]]


def test_what_is_dropped_from_outside_leaves_the_others_where_they_are():
    search = Search(2, 3, rules(step_size=0.1))
    search.step(gradients(1, 6)[0])
    s = search.s
    search.drop([True, False, False, False, True, True])
    assert torch.equal(search.s, s[1:4])
    torch.testing.assert_close(search.weights.sum(-1), torch.ones(2))
    for gradient in gradients(20, 3):
        search.step(gradient)
    assert len(search.s) == 3
    assert (search.weights[:, 1:].flatten() > 0).nonzero().flatten().tolist() == search.live[search.active].tolist()


def test_s_can_be_given_anew_within_its_budget():
    search = Search(2, 3, rules(step_size=0.1, momentum=0.5))
    search.step(gradients(1, 6)[0])
    search.drop([True] + [False] * 5)
    given = torch.tensor([EPS, EPS + 2.0, EPS + 1.0, EPS, EPS + 4.0])
    search.set_s(given)
    torch.testing.assert_close(search.s, given)
    assert search.active == [False, True, True, False, True]
    torch.testing.assert_close(search.weights[:, 0], torch.tensor([0.6, 0.0]))
    assert search.freeze() == [[True, False], [False, True, False]]
    for wrong in ([EPS + 6.0, EPS, EPS], [EPS, 0.05, EPS], [torch.nan, EPS, EPS]):
        with pytest.raises(ValueError, match="outside its simplices"):
            search.set_s(torch.tensor(wrong))


def objective(search: Search, target: torch.Tensor, trials: int, counted: list[int]) -> Objective:
    def loss(s: torch.Tensor) -> torch.Tensor:
        counted.append(1)
        return 4 * (s - target[search.live]).square().sum()

    at_s = 4 * (search.s - target[search.live]).square().sum()
    return Objective(at_s, loss, trials)


@pytest.mark.parametrize("steps", ["away", "pairwise"])
@pytest.mark.parametrize("trials", [1, 3, 9])
def test_backtracking_descends_and_keeps_to_its_trials(trials, steps):
    target = torch.tensor([3.0, 0.0, 2.0, 0.0, 1.0, 0.5])
    search = Search(2, 3, rules(step_rule="backtracking", step_size=1.0, trials=4, steps=steps))
    losses, made = [], []
    for _ in range(25):
        counted: list[int] = []
        given = objective(search, target, trials, counted)
        losses.append(float(given.value))
        moved = search.step(8 * (search.s - target), given)
        assert moved.history["trials"] == len(counted) <= min(trials, 4)
        made.append(len(counted))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]
    assert max(made) > 0
    assert search.curvature > 0
    with pytest.raises(ValueError, match="backtracking needs an objective"):
        search.step(torch.ones(6))


def test_a_hypergradient_that_is_not_finite_is_told():
    search = Search(1, 3, rules())
    s = search.s
    with pytest.raises(FloatingPointError, match="the hypergradient is not finite"):
        search.step(torch.tensor([1.0, torch.nan, 0.0]))
    assert torch.equal(search.s, s)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.5},
        {"step_rule": "backtracking"},
        {"step_rule": "short", "steps": "pairwise"},
        {"steps": "pairwise", "momentum": 0.9, "step_rule": "linear", "step_size": 0.05, "tolerance": 0.0},
    ],
)
def test_a_resumed_search_goes_on_as_it_would_have(settings):
    """Through a state that is restored after every step, truncations included."""
    made = rules(**({"first_truncation": 1, "face_steps": 4, "tolerance": 0.3} | settings))
    target = torch.tensor([3.0, 0.0, 2.0, 0.0, 1.0, 0.5])
    whole, resumed = (Search(2, 3, made, costs=[2, 3], target=5) for _ in range(2))
    ended = []
    for n, noise in enumerate(gradients(30, 6)):
        for search in (whole, resumed):
            live = search.live
            gradient = search.s - target[live] + 0.1 * noise[live]
            search.step(gradient, objective(search, target, 4, []), progress=n / 30)
        state = resumed.state_dict()
        resumed = Search(2, 3, made, costs=[2, 3], target=5)
        resumed.load_state_dict(state)
        assert resumed.ranks == whole.ranks
        assert torch.equal(resumed.s, whole.s)
        assert (resumed.steps, resumed.stable_steps, resumed.identified) == (
            whole.steps,
            whole.stable_steps,
            whole.identified,
        )
        assert (resumed.reached, resumed.active) == (whole.reached, whole.active)
        ended.append(whole.identified or whole.reached)
    assert any(ended)
    assert sum(whole.ranks) < 6
    assert whole.freeze() == resumed.freeze()


def test_it_imports_torch_and_nothing_of_a_model_or_a_harness():
    code = "import sys, methods.debora.search; print({name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'torch'" in done.stdout
    assert not any(f"'{name}'" in done.stdout for name in ("peft", "transformers", "harness", "pydantic"))
