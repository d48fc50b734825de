"""dEBORA's upper level in torch alone: s and the ranks by Frank-Wolfe (Algorithm 1, steps 3 to 7).

It knows no model. Whoever drives it gives it hypergradients, one a step, and cuts what it drops:

    search = Search(num_layers, rank, rules)
    while not (search.identified or search.reached):
        moved = search.step(hypergradient_at(search.s))
        cut(moved.dropped)
    cut(search.freeze())
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from methods.debora.math import frank_wolfe
from methods.debora.target import cut_to, falling_share, given_back


@dataclass(frozen=True)
class Rules:
    """How the search moves. Ranges and meanings are those of the method's hyperparameters of the same names."""

    tau: float
    eps: float
    step_size: float
    step_rule: Literal["fixed", "linear", "diminishing", "short", "backtracking"] = "fixed"
    momentum: float = 0.0
    tolerance: float = 0.0  # the paper's p: a simplex with a Frank-Wolfe gap of at most this stays where it is
    rho: float = 0.25
    trials: int = 4
    first_truncation: int | None = None  # steps before components are dropped; None: when the search is frozen
    face_steps: int | None = None  # steps with one active set and no slope beyond noise that identify the face
    steps: Literal["away", "pairwise"] = "away"


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
    active:       which of them have weight, n bools.
    ranks:        live components of every layer.
    costs:        what each of them costs, n ints.
    target:       most cost of all components left, or None. No step goes further below than it must.
    steps:        steps made.
    stable_steps: steps since the active set, the vertices with weight, changed last.
    identified:   the face is identified: nothing is left to be found.
    frozen:       the search is over.
    curvature:    M of short steps, or backtracking's estimate of it; 0 before the first step.
    gradient:     what the last step followed, like the weights without their first column.
    slopes:       the unbiased slopes of the last `face_steps` (or 1) steps, oldest first.
    """

    def __init__(
        self,
        num_layers: int,
        rank: int,
        rules: Rules,
        *,
        one_simplex: bool = False,
        interior: bool = True,
        costs: Sequence[int] | None = None,
        target: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """one_simplex: tau bounds all layers together. interior: s starts with tau shared out, else at eps. costs: of a
        component of each layer; 1 unless given."""
        self.rules = rules
        self.rank = rank
        self.ranks = [rank] * num_layers
        self.costs = [cost for cost in costs or [1] * num_layers for _ in range(rank)]
        self.target, self.interior = target, interior
        self.live = torch.arange(num_layers * rank, device=device)
        self.active = [interior] * (num_layers * rank)
        num_simplices, size = (1, num_layers * rank) if one_simplex else (num_layers, rank)
        self.weights = torch.full((num_simplices, size + 1), 1 / size if interior else 0.0, device=device)
        self.weights[:, 0] = 0.0 if interior else 1.0
        self.gradient = torch.zeros_like(self.weights[:, 1:])
        self.slopes = torch.zeros(0, device=device)
        self.steps = self.stable_steps = 0
        self.curvature = 0.0
        self.identified = self.frozen = False

    @property
    def reached(self) -> bool:
        """Whether the components with weight cost at most the target. Never from a vertex, where components appear."""
        return self.target is not None and self.interior and sum(compress(self.costs, self.active)) <= self.target

    @property
    def over_target(self) -> bool:
        """Whether the live components, with weight or not, cost more than the target."""
        return self.target is not None and sum(self.costs) > self.target

    @property
    def s(self) -> Tensor:
        """s of the live components, (n,)."""
        return self._s_at(self.weights)

    def step(self, hypergradient: Tensor, objective: Objective | None = None, progress: float = 0.0) -> Moved:
        """One Frank-Wolfe step along the hypergradients' average, given that of the live components, (n,); then, when
        it is time, components without weight are dropped.

        objective: for backtracking. progress: the search's share that is over, in [0, 1), for linearly falling steps.
        The history has the Frank-Wolfe gap, the step size and, from the second step on, the unbiased slope, means over
        the simplices; the shares of away and of drop steps, of pairwise ones also of swaps; the components with weight;
        the norm of what was followed; of backtracking the trials, of it and of short steps the curvature. Raises
        FloatingPointError where the hypergradient is not finite.
        """
        rules, value = self.rules, self._spread(hypergradient)
        gradient = self._averaged(value)
        direction, named_before = self._directions(gradient, self.gradient)
        slope = self._unbiased_slope(named_before, value)
        taken, history = self._take(direction, objective, progress)
        changed = ((taken.weights == 0) != (self.weights == 0)).any()
        # The one wait for the device in a step without trials, but for the first short step and one at the target.
        flags = torch.stack([gradient.isfinite().all(), changed, frank_wolfe.is_level(self.slopes, rules.tolerance)])
        finite, changes, settled, *weightless = torch.cat([flags, self._weightless(taken.weights)]).tolist()
        if not finite:
            raise FloatingPointError("the hypergradient is not finite")
        self.gradient = gradient
        taken = self._kept_to_target(taken, [not flag for flag in weightless])
        self.weights = taken.weights
        self.stable_steps = 0 if changes else self.stable_steps + 1
        self.identified = rules.face_steps is not None and settled and self.stable_steps >= rules.face_steps
        history |= slope | {
            "gap": direction.gap.mean(),
            "step_size": taken.step_size.mean(),
            "away": taken.away.float().mean(),
            "drop": taken.drop.float().mean(),
            "active_components": sum(self.active),
            "hypergradient_norm": gradient.norm(),
        }
        if rules.steps == "pairwise":
            history["swap"] = taken.swap.float().mean()
        truncates = rules.first_truncation is not None and self.steps >= rules.first_truncation
        self.steps += 1
        return Moved(history, self.drop([truncates and not has_weight for has_weight in self.active]))

    def freeze(self) -> list[list[bool]]:
        """End the search: every component without weight is dropped, and s stays. Returns the flags of `drop`."""
        self.frozen = True
        return self.drop([not has_weight for has_weight in self.active])

    def cut_to_target(self, scores: Tensor) -> list[list[bool]]:
        """Drop live components by their scores, (n,), until the rest cost at most the target: see `cut_to`. Returns the
        flags of `drop`."""
        return self.drop(cut_to(self.target or sum(self.costs), scores.tolist(), self.costs))

    def drop(self, flags: Sequence[bool]) -> list[list[bool]]:
        """Remove live components for good, one flag for each in order. Returns the flags by layer.

        s of the others stays: weight that a removed component had goes to the vertex eps*1.
        """
        remaining = iter(flags)
        by_layer = [[next(remaining) for _ in range(rank)] for rank in self.ranks]
        if any(flags):
            left = [not flag for flag in flags]
            self.live = self.live[list(compress(range(len(left)), left))]
            self.active, self.costs = list(compress(self.active, left)), list(compress(self.costs, left))
            self.ranks = [own.count(False) for own in by_layer]
            alive = self._alive()
            self.gradient = self.gradient.masked_fill(~alive, 0.0)
            lost = self.weights[:, 1:].masked_fill(alive, 0.0)
            self.weights = self.weights + torch.cat([lost.sum(-1, keepdim=True), -lost], -1)
        return by_layer

    def set_s(self, s: Tensor) -> None:
        """Give the live components another s, (n,), within the simplices; eps is no weight. Waits for the device.

        Raises ValueError where s leaves them by more than rounding.
        """
        components = self._spread((s - self.rules.eps) / self.rules.tau)
        weights = torch.cat([1 - components.sum(-1, keepdim=True), components], -1)
        if not (weights >= -1e-4).all():
            raise ValueError("s lies outside its simplices")
        self.weights = normalize(weights.clamp(min=0), p=1.0, dim=-1)
        before, self.active = self.active, (~self._weightless(self.weights)).tolist()
        self.stable_steps = self.stable_steps if self.active == before else 0

    def sizes(self) -> dict[str, Any]:
        """For the history: the rank of all layers together, `ranks` in their order, and s in the same order."""
        return {"rank": len(self.live), "ranks": list(self.ranks), "s": self.s}

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact resume needs."""
        names = "weights live costs gradient slopes steps stable_steps curvature identified frozen"
        return {name: getattr(self, name) for name in names.split()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, on a search that was made with the same arguments."""
        device = self.live.device
        for name, value in state.items():
            setattr(self, name, value.to(device, copy=True) if isinstance(value, Tensor) else value)
        self.ranks = torch.bincount(self.live // self.rank, minlength=len(self.ranks)).tolist()
        self.active = (~self._weightless(self.weights)).tolist()

    def _averaged(self, value: Tensor) -> Tensor:
        """The hypergradient over the simplices, averaged over the steps with weights that fall by `momentum` a step.

        They sum to 1 from the first step on (Kingma and Ba, 2015, section 3): at first nearly the plain mean. (In the
        averaged Frank-Wolfe of Mokhtari et al., 2020, arXiv 1804.09554, the new one's weight falls over time.)
        """
        momentum = self.rules.momentum
        return torch.lerp(self.gradient, value, (1 - momentum) / (1 - momentum ** (self.steps + 1)))

    def _directions(self, *gradients: Tensor) -> list[frank_wolfe.Direction]:
        """Where each of these gradients leads from here, found in one batch."""
        count, rules = len(gradients), self.rules
        weights, alive = torch.cat([self.weights] * count), torch.cat([self._alive()] * count)
        found = frank_wolfe.choose_direction(weights, torch.cat(gradients), alive, rules.tau, rules.steps)
        return [frank_wolfe.Direction(*fields) for fields in zip(*(own.chunk(count) for own in found), strict=True)]

    def _unbiased_slope(self, named_before: frank_wolfe.Direction, value: Tensor) -> dict[str, Tensor]:
        """For the history: -<g, d>, the mean over the simplices, with the new hypergradient g and the direction d that
        the average without it names (ours): none at the first step, and 0 of a simplex that would stay.

        d knows nothing of g's noise, so this has the slope along d as its mean. The gap and the slope that g itself
        names have not: they are maxima over noise.
        """
        if self.steps == 0:
            return {}
        slopes = frank_wolfe.slope_along(named_before, value, self.rules.tau)
        slope = slopes.masked_fill(named_before.gap <= self.rules.tolerance, 0.0).mean()
        self.slopes = torch.cat([self.slopes, slope[None]])[-(self.rules.face_steps or 1) :]
        return {"unbiased_slope": slope}

    def _kept_to_target(self, taken: frank_wolfe.StepTaken, active: list[bool]) -> frank_wolfe.StepTaken:
        """The step without what it empties beyond the target, see `given_back`; `active`: what has weight after it."""
        emptied = [i for i, (before, after) in enumerate(zip(self.active, active, strict=True)) if before and not after]
        self.active = active
        if self.target is None or not emptied or not self.reached:
            return taken
        gradient = self.gradient.flatten()[self.live].tolist()
        kept = given_back(emptied, gradient, self.costs, sum(compress(self.costs, active)), self.target)
        self.active = [has_weight or i in kept for i, has_weight in enumerate(active)]
        flags = torch.tensor([i in kept for i in range(len(active))], device=self.live.device)
        return frank_wolfe.give_back(taken, self.weights, pad(self._spread(flags), (1, 0)))

    def _take(
        self, direction: frank_wolfe.Direction, objective: Objective | None, progress: float
    ) -> tuple[frank_wolfe.StepTaken, dict[str, Any]]:
        """The step by the step rule, and what it adds to the history."""
        rules, weights = self.rules, self.weights
        if rules.step_rule == "short":
            self.curvature = self.curvature or frank_wolfe.curvature_for(direction, rules.tau, rules.step_size)
            squares = frank_wolfe.squared_length(direction, rules.tau)
            sizes = frank_wolfe.short_step_size(direction, squares, self.curvature or 1.0)
            return frank_wolfe.take_step(weights, direction, sizes, rules.tolerance), {"curvature": self.curvature}
        if rules.step_rule != "backtracking":
            size = rules.step_size * falling_share(rules.step_rule, self.steps, progress)
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
            curvature=self.curvature or 2 * frank_wolfe.curvature_for(direction, rules.tau, rules.step_size),
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
