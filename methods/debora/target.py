"""A target for the components that a search leaves, and what its steps can reach, in plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal


def given_back(
    emptied: Sequence[int], gradient: Sequence[float], costs: Sequence[int], others: int, most: int
) -> set[int]:
    """Which of the components that a step emptied should keep their weight, for a target of `most`.

    They are let go until what is left costs at most `most`, the largest entry of the gradient first, for that one's
    growth raises the loss most. The last component of all is never let go.

    emptied: positions in `gradient` and `costs`, which have an entry for each component. others: cost of those that
    have weight after the step.
    """
    kept = sorted(emptied, key=lambda component: -gradient[component])
    while kept and others + sum(costs[component] for component in kept) > most and (others or len(kept) > 1):
        kept.pop(0)
    return set(kept)


def cut_to(most: int, scores: Sequence[float], costs: Sequence[int]) -> list[bool]:
    """A flag for each component to be dropped, such that the others cost at most `most`.

    From the highest score down, each component stays that still fits beside those before it; one that is too dear is
    passed over, since a cheaper one may fit. The highest-scored stays where none fits. Of equal scores the first wins.
    """
    ordered = sorted(range(len(costs)), key=lambda component: -scores[component])
    stays, spent = set(), 0
    for component in ordered:
        if spent + costs[component] <= most:
            stays.add(component)
            spent += costs[component]
    stays = stays or set(ordered[:1])
    return [component not in stays for component in range(len(costs))]


def falling_share(step_rule: str, step: int, progress: float) -> float:
    """The share of `step_size` that step 0, 1, ... has. progress: share of the search that is over, in [0, 1).

    2 / (step + 2) is the standard rule of this family, which needs no constant of the problem.
    """
    return {"fixed": 1.0, "linear": 1 - progress, "diminishing": 2 / (step + 2)}[step_rule]


def largest_step_sizes(step_rule: str, step_size: float, steps: int) -> list[float]:
    """The largest size that each of `steps` steps of a search can have; infinite where the slope decides."""
    if step_rule in ("short", "backtracking"):
        return [math.inf] * steps
    return [step_size * falling_share(step_rule, step, step / steps) for step in range(steps)]


def reachable(components: int, step_sizes: Sequence[float], steps: Literal["away", "pairwise"] = "away") -> int:
    """A lower bound on the components with weight that steps of at most these sizes leave of one simplex, 0 to
    `components`, from the interior start with a weight of 1 / components each.

    A step takes weight from one component, at most its size. So with pairwise steps no more components can be emptied
    than there are disjoint groups of steps whose sizes sum to 1 / components. A step towards a vertex takes the share
    of its size from all others at once; for the bound, the t largest are such steps and all the others count too.
    """
    ordered = sorted(step_sizes, reverse=True)
    towards = len(ordered) if steps == "away" else 0
    emptied, weight = 0.0, 1 / components
    for t in range(towards + 1):
        if weight <= 0:  # a step of size 1 went to one vertex
            return 0
        emptied = max(emptied, sum(min(1.0, size / weight) for size in ordered[: len(ordered) - t]))
        weight *= 1 - min(1.0, ordered[t]) if t < len(ordered) else 1.0
    return max(0, components - math.floor(emptied + 1e-6))


def modes_with_factors(shape: Sequence[int]) -> list[int]:
    """The modes of a weight that have a factor. One of size 1 carries no direction and has none, unless fewer than two
    others are left: then the first two have."""
    needed = 2 if sum(size > 1 for size in shape) < 2 else 0
    return [mode for mode, size in enumerate(shape) if size > 1 or mode < needed]


def component_parameters(shape: Sequence[int]) -> int:
    """Parameters of one component of a weight of this shape, s not counted: a row of each factor."""
    return sum(shape[mode] for mode in modes_with_factors(shape))
