"""dEBORA's upper level in torch alone: s and the ranks by Frank-Wolfe (Algorithm 1, steps 3 to 7).

It knows no model. Whoever drives it gives it hypergradients, one a step, and cuts what it drops:

    search = Search(num_layers, rank, rules)
    while not search.identified:
        moved = search.step(hypergradient_at(search.s))
        cut(moved.dropped)
    cut(search.freeze())
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from methods.debora.math import frank_wolfe


@dataclass(frozen=True)
class Rules:
    """How the search moves. Ranges and meanings are those of the method's hyperparameters of the same names."""

    tau: float
    eps: float
    step_size: float
    step_rule: Literal["fixed", "diminishing", "backtracking"] = "fixed"
    momentum: float = 0.0
    tolerance: float = 0.0  # the paper's p: a simplex with a Frank-Wolfe gap of at most this stays where it is
    rho: float = 0.25
    trials: int = 4
    first_truncation: int | None = None  # steps before components are dropped; None: when the search is frozen
    face_steps: int | None = None  # steps with gaps within the tolerance and one active set that identify the face


class Objective(NamedTuple):
    """The upper level's loss on the batch of the hypergradient, which backtracking compares at trial points."""

    value: Tensor  # at the present s, a scalar
    at: Callable[[Tensor], Tensor]  # s of the live components, (n,), to the loss there, a scalar
    trials: int  # most evaluations that there is a budget for


class Moved(NamedTuple):
    """What became of one step."""

    history: dict[str, Any]
    dropped: list[list[bool]]  # a flag for each component that was live, by layer


class Search:
    """s of `num_layers` layers with `rank` components each, on a simplex each or on one, and what is left of them.

    weights:      vertex weights of the simplices, (B, C + 1): B layers of C = rank components, or one simplex of all.
    live:         positions of the live components, in layers x rank, flattened: (n,), ascending.
    ranks:        live components of every layer.
    steps:        steps made.
    stable_steps: steps since the active set, the vertices with weight, changed last.
    identified:   the face is identified: nothing is left to be found.
    frozen:       the search is over.
    curvature:    backtracking's estimate of M, 0 before the first step.
    gradient:     what the last step followed, like the weights without their first column.
    """

    def __init__(
        self,
        num_layers: int,
        rank: int,
        rules: Rules,
        *,
        one_simplex: bool = False,
        interior: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        """one_simplex: tau bounds all layers together. interior: s starts with tau shared out, else at eps."""
        self.rules = rules
        self.rank = rank
        self.ranks = [rank] * num_layers
        self.live = torch.arange(num_layers * rank, device=device)
        num_simplices, size = (1, num_layers * rank) if one_simplex else (num_layers, rank)
        self.weights = torch.full((num_simplices, size + 1), 1 / size if interior else 0.0, device=device)
        self.weights[:, 0] = 0.0 if interior else 1.0
        self.gradient = torch.zeros_like(self.weights[:, 1:])
        self.steps = self.stable_steps = 0
        self.curvature = 0.0
        self.identified = self.frozen = False

    @property
    def s(self) -> Tensor:
        """s of the live components, (n,)."""
        return self._s_at(self.weights)

    def step(self, hypergradient: Tensor, objective: Objective | None = None) -> Moved:
        """One Frank-Wolfe step along the hypergradient of the live components, (n,), or with `momentum` along the
        average so far; then, when it is time, components without weight are dropped.

        objective: for backtracking. The history has the Frank-Wolfe gap and the step size, means over the simplices;
        the shares of away and of drop steps; the components with weight; the norm of what was followed; of backtracking
        the trials and the curvature. Raises FloatingPointError where the hypergradient is not finite.
        """
        rules = self.rules
        gradient = self.gradient = self._averaged(hypergradient)
        direction = frank_wolfe.choose_direction(self.weights, gradient, self._alive(), rules.tau)
        taken, history = self._take(direction, objective)
        changed = ((taken.weights == 0) != (self.weights == 0)).any()
        # The one wait for the device in a step without trials.
        flags = [gradient.isfinite().all(), changed, (direction.gap <= rules.tolerance).all()]
        finite, changes, small, *weightless = torch.cat([torch.stack(flags), self._weightless(taken.weights)]).tolist()
        if not finite:
            raise FloatingPointError("the hypergradient is not finite")
        self.weights = taken.weights
        self.stable_steps = 0 if changes else self.stable_steps + 1
        self.identified = rules.face_steps is not None and small and self.stable_steps >= rules.face_steps
        history |= {
            "gap": direction.gap.mean(),
            "step_size": taken.step_size.mean(),
            "away": taken.away.float().mean(),
            "drop": taken.drop.float().mean(),
            "active_components": weightless.count(False),
            "hypergradient_norm": gradient.norm(),
        }
        truncates = rules.first_truncation is not None and self.steps >= rules.first_truncation
        self.steps += 1
        return Moved(history, self.drop(weightless if truncates else [False] * len(weightless)))

    def freeze(self) -> list[list[bool]]:
        """End the search: every component without weight is dropped, and s stays. Returns the flags of `drop`."""
        self.frozen = True
        return self.drop(self._weightless(self.weights).tolist())

    def drop(self, flags: Sequence[bool]) -> list[list[bool]]:
        """Remove live components for good, one flag for each in order. Returns the flags by layer."""
        remaining = iter(flags)
        by_layer = [[next(remaining) for _ in range(rank)] for rank in self.ranks]
        if any(flags):
            self.live = self.live[[position for position, flag in enumerate(flags) if not flag]]
            self.ranks = [own.count(False) for own in by_layer]
        return by_layer

    def sizes(self) -> dict[str, Any]:
        """For the history: the rank of all layers together, `ranks` in their order, and s in the same order."""
        return {"rank": len(self.live), "ranks": list(self.ranks), "s": self.s}

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact resume needs."""
        names = ("weights", "live", "gradient", "steps", "stable_steps", "curvature", "identified", "frozen")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, on a search that was made with the same arguments."""
        device = self.live.device
        for name, value in state.items():
            setattr(self, name, value.to(device, copy=True) if isinstance(value, Tensor) else value)
        self.ranks = torch.bincount(self.live // self.rank, minlength=len(self.ranks)).tolist()

    def _averaged(self, value: Tensor) -> Tensor:
        """The hypergradient over the simplices, averaged over the steps, with weights that fall by `momentum` a step;
        the first has full weight. (In the averaged Frank-Wolfe of Mokhtari et al., 2020, arXiv 1804.09554, the new
        one's weight falls over time as well.)"""
        if self.rules.momentum == 0 or self.steps == 0:
            return self._spread(value)
        before = self.gradient.flatten()[self.live]
        return self._spread(torch.lerp(before, value, 1 - self.rules.momentum))

    def _take(
        self, direction: frank_wolfe.Direction, objective: Objective | None
    ) -> tuple[frank_wolfe.StepTaken, dict[str, Any]]:
        """The step by the step rule, and what it adds to the history."""
        rules, weights = self.rules, self.weights
        if rules.step_rule != "backtracking":
            size = rules.step_size
            if rules.step_rule == "diminishing":
                size *= frank_wolfe.diminishing_step_size(self.steps)
            return frank_wolfe.take_step(weights, direction, size, rules.tolerance), {}
        if objective is None:
            raise ValueError("backtracking needs an objective")
        found = frank_wolfe.backtrack(
            weights,
            direction,
            rules.tau,
            lambda trial: objective.at(self._s_at(trial)),
            start=float(objective.value),
            # The first estimate is halved at once.
            curvature=self.curvature or 2 * frank_wolfe.curvature_for(weights, direction, rules.tau, rules.step_size),
            most=min(rules.trials, objective.trials),
            rho=rules.rho,
            tolerance=rules.tolerance,
        )
        self.curvature = found.curvature
        return found.taken, {"trials": found.trials, "curvature": found.curvature}

    def _s_at(self, weights: Tensor) -> Tensor:
        """s of the live components, (n,), at these weights."""
        return frank_wolfe.points(weights, self.rules.tau, self.rules.eps).flatten()[self.live]

    def _spread(self, values: Tensor) -> Tensor:
        """Values of the live components, (n,), over the simplices, (B, C), 0 for those removed."""
        whole = values.new_zeros(self.weights[:, 1:].numel())
        return whole.index_copy(0, self.live, values).view(self.weights.shape[0], -1)

    def _alive(self) -> Tensor:
        """Which components are left, (B, C) bool."""
        return self._spread(torch.ones_like(self.live, dtype=torch.bool))

    def _weightless(self, weights: Tensor) -> Tensor:
        """Which of the live components have no weight, (n,) bool."""
        return weights[:, 1:].flatten()[self.live] == 0
