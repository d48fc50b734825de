"""When upper-level steps come, in plain numbers: what is foretold is what a loop does."""

from __future__ import annotations

import pytest

from methods.debora.schedule import UPPER_STEPS, Schedule, batches_a_step


def walked(schedule: Schedule, budget: int) -> int:
    """Upper-level steps of a training loop that makes one update a batch and asks after each."""
    used = updates = steps = 0
    while used < budget:
        used += 1
        updates += 1
        if schedule.is_due(updates, used, budget):
            used += schedule.batches_a_step
            steps += 1
        if schedule.is_over(used, budget):
            break
    assert used <= budget
    return steps


@pytest.mark.parametrize("batches", [0, 1, 2, 4])
@pytest.mark.parametrize("search_fraction", [0.05, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("T_max", [1, 3, 7, 40, None])
def test_the_foretold_number_of_steps_is_a_loops(T_max, search_fraction, batches):
    schedule = Schedule(T_max, search_fraction, batches)
    for budget in (*range(1, 120), 400, 1500, 4001):
        assert schedule.upper_steps(budget) == walked(schedule, budget), budget


def test_unset_it_gives_the_search_its_steps_whatever_the_budget():
    schedule = Schedule(None, 0.3, 1)
    assert [schedule.upper_steps(budget) for budget in (600, 1500, 36000)] == [UPPER_STEPS] * 3


@pytest.mark.parametrize(
    ("hypergradient", "step_rule", "batches"),
    [
        ("direct", "fixed", 1),
        ("closed_form", "diminishing", 1),
        ("direct", "backtracking", 2),
        ("implicit", "fixed", 4),
        ("path", "fixed", 7),
        ("free", "fixed", 0),
    ],
)
def test_what_a_step_takes_at_least(hypergradient, step_rule, batches):
    assert batches_a_step(hypergradient, step_rule, path_points=7) == batches
