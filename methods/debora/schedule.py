"""What a plan can reach: upper-level steps in the search, and components that they can add or drop."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from methods.debora.method import Debora


def least_upper_batches(method: Debora) -> int:
    """Fewest batches that one upper-level step takes."""
    if method.hypergradient == "implicit":
        return 4  # f1, the lower level's gradient, one product with the Hessian, the mixed derivative
    return 2 if method.step_rule == "backtracking" else 1


def upper_steps(method: Debora, budget: int) -> int:
    """Most upper-level steps that a budget in batches leaves time for: of `implicit` and backtracking the shortest."""
    cost, updates, used, steps = least_upper_batches(method), method.lower_updates(budget), 0, 0
    while used < method.search_fraction * budget:
        used += updates
        if used + cost > budget or used - updates + 1 > budget:
            break
        if used - 1 >= method.search_fraction * budget:  # the search ended before the last of these updates
            break
        used += cost
        steps += 1
    return steps


def lines(method: Debora, num_layers: int, budget: int) -> list[str]:
    """The reach in words, for a dry run."""
    steps = upper_steps(method, budget)
    layerwise = method.budget_scope == "layer"
    components = method.rank if layerwise else method.rank * num_layers
    where = f"each of {num_layers} simplices" if layerwise else f"the one simplex of {num_layers} layers"
    batches = min(budget, round(method.search_fraction * budget))
    found = [f"at most {steps} upper-level steps in {batches} of {budget} batches"]
    if method.start_point == "vertex":
        found.append(f"at most {min(steps, components)} of the {components} components of {where} can get weight")
    elif method.step_size == 1 or method.step_rule == "backtracking":
        found.append(f"a step may empty {where} but for one of its {components} components")
    else:
        found.append(f"at least {max(0, components - steps)} of the {components} components of {where} stay")
    if method.first_truncation is not None and method.first_truncation >= steps:
        found.append(f"n0 = {method.first_truncation}: nothing is removed before the search ends")
    return found
