"""When the upper level moves, in plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

# Upper-level steps of a search. One that takes batches from the lower level's has to be rare; a step drops about one
# component of a simplex, and none comes back, so that these leave a mean rank of about 2 from rank 8 (docs/debora.md).
UPPER_STEPS = 45
FREE_UPPER_STEPS = 400  # of steps that take no batch


@dataclass(frozen=True)
class Schedule:
    """The search's share of a run of `budget` batches.

    T_max:           lower-level updates before each upper-level step; None: what gives the search 45 such steps, or 400
                     where they take no batch.
    search_fraction: share of the budget after which s is frozen at latest.
    batches_a_step:  fewest batches that one upper-level step takes, 0 of `free`.
    warm_up:         share of the budget before the lower updates that lead to the first upper-level step.
    """

    T_max: int | None
    search_fraction: float
    batches_a_step: int
    warm_up: float = 0.0

    def lower_updates(self, budget: int) -> int:
        """Lower-level updates before each upper-level step, at least 1."""
        steps = UPPER_STEPS if self.batches_a_step else FREE_UPPER_STEPS
        each = round((self.search_fraction - self.warm_up) * budget / steps)  # batches
        return self.T_max or max(1, each - self.batches_a_step)

    def first_updates(self, budget: int) -> int:
        """Lower-level updates of the warm-up: each of them is a batch."""
        return round(self.warm_up * budget)

    def is_due(self, updates: int, used: int, budget: int) -> bool:
        """Whether an upper-level step comes after so many updates, and fits into what is left of the budget."""
        since = updates - self.first_updates(budget)
        return since > 0 and since % self.lower_updates(budget) == 0 and used + self.batches_a_step <= budget

    def is_over(self, used: int, budget: int) -> bool:
        """Whether the search has used its share."""
        return used >= self.search_fraction * budget

    def progress(self, used: int, budget: int) -> float:
        """The share of the search after the warm-up that is over, in [0, 1)."""
        first, last = self.warm_up * budget, self.search_fraction * budget
        return min(max(0.0, (used - first) / max(1.0, last - first)), 1 - 1e-6)

    def upper_steps(self, budget: int) -> int:
        """Most upper-level steps that there is time for: of steps that take more batches than they must, fewer."""
        updates, used, steps = self.lower_updates(budget), self.first_updates(budget), 0
        while not self.is_over(used, budget):
            used += updates
            if used + self.batches_a_step > budget:
                break
            if self.is_over(used - 1, budget):  # the search ended before the last of these updates
                break
            used += self.batches_a_step
            steps += 1
        return steps


def batches_a_step(hypergradient: str, step_rule: str, path_points: int) -> int:
    """Fewest batches that one upper-level step takes."""
    if hypergradient == "free":
        return 0  # the lower level's own batches give it
    if hypergradient == "path":
        return path_points
    if hypergradient == "implicit":
        return 4  # f1, the lower level's gradient, one product with the Hessian, the mixed derivative
    return 2 if step_rule == "backtracking" else 1
