"""A target for the components left, and what steps can reach, on plain numbers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from methods.debora.search import Rules, Search
from methods.debora.target import component_parameters, cut_to, given_back, largest_step_sizes, reachable


@pytest.mark.parametrize(
    ("most", "kept"), [(10, {1, 2, 3}), (5, {1, 2, 3}), (4, {1, 3}), (3, {1}), (2, set()), (1, set()), (0, set())]
)
def test_the_largest_entries_are_let_go_first_and_no_more_than_asked(most, kept):
    costs, gradient = [1, 2, 1, 1], [9.0, -1.0, 5.0, 2.0]
    assert given_back([1, 2, 3], gradient, costs, 1, most) == kept


def test_the_last_component_of_all_is_never_let_go():
    assert given_back([0, 1], [1.0, 2.0], [3, 3], 0, 1) == {0}


@pytest.mark.parametrize(
    ("most", "stays"), [(12, {0, 1, 2, 3}), (10, {0, 1, 3}), (8, {0, 1, 3}), (5, {1, 3}), (3, {1}), (2, {3}), (1, {3})]
)
def test_components_stay_by_score_while_they_fit(most, stays):
    flags = cut_to(most, [2.0, 3.0, 1.0, 0.0], [4, 3, 4, 1])
    assert {i for i, flag in enumerate(flags) if not flag} == stays


def test_of_equal_scores_the_first_stays():
    assert cut_to(2, [1.0, 1.0, 1.0], [1, 1, 1]) == [False, False, True]


def test_where_none_fits_the_best_stays():
    assert cut_to(1, [2.0, 3.0], [4, 3]) == [True, False]


def test_the_largest_step_sizes():
    assert largest_step_sizes("fixed", 0.1, 3) == [0.1] * 3
    assert largest_step_sizes("linear", 0.1, 4) == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert largest_step_sizes("diminishing", 0.5, 3) == pytest.approx([0.5, 1 / 3, 0.25])
    assert largest_step_sizes("short", 0.1, 2) == largest_step_sizes("backtracking", 0.1, 2) == [math.inf] * 2


def left(size: int, rule: str, step_size: float, steps: str, followed: list[torch.Tensor]) -> int:
    """Components with weight after a search on these hypergradients."""
    count = len(followed)
    search = Search(1, size, Rules(tau=1.0, eps=0.1, step_size=step_size, step_rule=rule, steps=steps))
    for n, gradient in enumerate(followed):
        search.step(gradient, progress=n / count)
    return sum(search.active)


@pytest.mark.parametrize("steps", ["away", "pairwise"])
@pytest.mark.parametrize(("rule", "step_size"), [("fixed", 0.2), ("fixed", 0.4), ("linear", 0.5), ("diminishing", 0.9)])
def test_no_search_leaves_fewer_than_what_is_reachable(steps, rule, step_size):
    """Every sequence of hypergradients that single out a component, and some that are drawn."""
    size, count = 3, 3
    bound = reachable(size, largest_step_sizes(rule, step_size, count), steps)
    singled = [sign * torch.eye(size)[i] for sign in (1, -1) for i in range(size)]
    fewest = min(left(size, rule, step_size, steps, list(each)) for each in itertools.product(singled, repeat=count))
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        fewest = min(fewest, left(size, rule, step_size, steps, list(torch.randn(count, size, generator=generator))))
    assert bound <= fewest


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize(("step_size", "count"), [(0.0625, 10), (0.1, 6), (0.3, 3), (1.0, 4)])
def test_pairwise_steps_that_empty_one_after_the_other_reach_it_where_the_sizes_fit(size, step_size, count):
    followed, removed = [], 0.0
    for _ in range(count):  # each component takes as many steps as it must
        gradient = torch.zeros(size)
        gradient[min(size - 1, int(removed))] = 1.0
        followed.append(gradient)
        removed += 1 / math.ceil(1 / size / step_size - 1e-9)
    found = left(size, "fixed", step_size, "pairwise", followed)
    bound = reachable(size, [step_size] * count, "pairwise")
    assert bound <= found
    if (1 / size / step_size) % 1 < 1e-9 or step_size >= 1 / size:
        assert found == bound


def test_what_is_reachable_in_numbers():
    assert reachable(8, [0.15] * 45) == 0
    assert reachable(96, [0.02] * 10) == 86
    assert reachable(96, [0.001] * 100, "pairwise") == 96 - 9
    assert reachable(10, [0.05] * 10, "pairwise") == 5
    assert reachable(10, [0.3] * 3, "pairwise") == 7
    assert reachable(10, [math.inf], "pairwise") == 9
    assert reachable(10, [1.0]) == 0  # a full step towards the vertex eps*1
    assert reachable(10, []) == reachable(10, [], "pairwise") == 10


@pytest.mark.parametrize(
    ("shape", "count"),
    [((8, 5), 13), ((8, 5, 3, 3), 19), ((8, 5, 1, 3), 16), ((8, 5, 1, 1), 13), ((8, 1), 9), ((1, 1, 3, 1), 5)],
)
def test_what_a_component_has_of_parameters(shape, count):
    assert component_parameters(shape) == count
