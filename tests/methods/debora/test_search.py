"""The search alone, on gradients and objectives of a few numbers: no model, no data, no loop."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch

from methods.debora.search import Objective, Rules, Search

TAU, EPS = 5.0, 0.1


def slow_frank_wolfe(s: list[float], g: list[float], tau: float, eps: float, size: float) -> list[float]:
    """Algorithm 1, steps 3 to 6, for one simplex, over a list of all vertices."""
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
    if -dot(g, h) >= -dot(g, b):
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
@pytest.mark.parametrize("step_rule", ["fixed", "diminishing"])
@pytest.mark.parametrize("momentum", [0.0, 0.75])
def test_steps_against_a_slow_reference(interior, one_simplex, step_rule, momentum):
    search = Search(3, 4, rules(step_rule=step_rule, momentum=momentum), one_simplex=one_simplex, interior=interior)
    size = 12 if one_simplex else 4
    seen: list[list[float]] = []
    for n, gradient in enumerate(gradients(9, 12)):
        s, g = search.s.tolist(), gradient.tolist()
        seen.append(g)
        powers = [momentum ** (n - i) for i in range(n + 1)]
        average = [
            sum(w * x for w, x in zip(powers, own, strict=True)) / sum(powers) for own in zip(*seen, strict=True)
        ]
        step = 0.3 if step_rule == "fixed" else 0.3 * 2 / (n + 2)
        expected: list[float] = []
        for first in range(0, 12, size):
            own = slice(first, first + size)
            expected += slow_frank_wolfe(s[own], average[own], TAU, EPS, step)
        moved = search.step(gradient)
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


def objective(search: Search, target: torch.Tensor, trials: int, counted: list[int]) -> Objective:
    def loss(s: torch.Tensor) -> torch.Tensor:
        counted.append(1)
        return 4 * (s - target[search.live]).square().sum()

    at_s = 4 * (search.s - target[search.live]).square().sum()
    return Objective(at_s, loss, trials)


@pytest.mark.parametrize("trials", [1, 3, 9])
def test_backtracking_descends_and_keeps_to_its_trials(trials):
    target = torch.tensor([3.0, 0.0, 2.0, 0.0, 1.0, 0.5])
    search = Search(2, 3, rules(step_rule="backtracking", step_size=1.0, trials=4))
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


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.5}, {"step_rule": "backtracking"}])
def test_a_resumed_search_goes_on_as_it_would_have(settings):
    """Through a state that is restored after every step, truncations included."""
    made = rules(first_truncation=1, face_steps=4, tolerance=0.3, **settings)
    target = torch.tensor([3.0, 0.0, 2.0, 0.0, 1.0, 0.5])
    whole, resumed = Search(2, 3, made), Search(2, 3, made)
    for noise in gradients(12, 6):
        for search in (whole, resumed):
            live = search.live
            search.step(search.s - target[live] + 0.1 * noise[live], objective(search, target, 4, []))
        state = resumed.state_dict()
        resumed = Search(2, 3, made)
        resumed.load_state_dict(state)
        assert resumed.ranks == whole.ranks
        assert torch.equal(resumed.s, whole.s)
        assert (resumed.steps, resumed.stable_steps, resumed.identified) == (
            whole.steps,
            whole.stable_steps,
            whole.identified,
        )
    assert sum(whole.ranks) < 6
    assert whole.freeze() == resumed.freeze()


def test_it_imports_torch_and_nothing_of_a_model_or_a_harness():
    code = "import sys, methods.debora.search; print({name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'torch'" in done.stdout
    assert not any(f"'{name}'" in done.stdout for name in ("peft", "transformers", "harness", "pydantic"))
