"""Away-step Frank-Wolfe on the shifted simplex (dEBORA, Algorithm 1, steps 3 to 6), for B simplices at once.

One simplex with r components is S_eps = {s : s >= eps, sum(s) <= tau + r eps}. Its vertices are eps*1 (here vertex 0)
and eps*1 + tau e_i (vertex i, for i = 1 to r). They are affinely independent, so a point has one set of vertex weights
and the paper's active set is read off them:

    s = eps + tau w[1:],    w >= 0,    sum(w) = 1.

Shapes: weights (B, r + 1), gradient with respect to s (B, r), alive (B, r) bool. A component that is not alive was
removed: its weight is 0, and its gradient (any finite number) does not matter. Everything is a tensor operation over
the batch, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


def points(weights: Tensor, tau: float, eps: float) -> Tensor:
    """The points s, (B, r), with these vertex weights, (B, r + 1). A weight of 0 gives s_i = eps exactly."""
    return eps + tau * weights[:, 1:]


def vertex_weights(s: Tensor, tau: float, eps: float) -> Tensor:
    """The vertex weights, (B, r + 1), of points of S_eps, (B, r): w_i = (s_i - eps) / tau, w_0 = 1 - sum of them."""
    weights = (s - eps) / tau
    return torch.cat([1 - weights.sum(-1, keepdim=True), weights], -1)


def linear_minimization_oracle(gradient: Tensor, alive: Tensor) -> Tensor:
    """The vertex z of smallest <g, z>, (B,): the component with the smallest entry if that is negative, else eps*1."""
    return _vertex_values(gradient).masked_fill(~_selectable(alive), torch.inf).argmin(-1)


def away_vertex(weights: Tensor, gradient: Tensor) -> Tensor:
    """The vertex y of largest <g, y> among those that carry weight, (B,)."""
    return _vertex_values(gradient).masked_fill(weights <= 0, -torch.inf).argmax(-1)


def frank_wolfe_gap(weights: Tensor, gradient: Tensor, alive: Tensor, tau: float) -> Tensor:
    """-<g, z - s> with the oracle's z, (B,), in units of the loss. Never negative, and 0 at a stationary point.

    Summed over the vertices as tau w_j (g_j - g_z), whose terms are all >= 0, so that rounding cannot make it negative.
    """
    values = _vertex_values(gradient)
    smallest = values.gather(-1, linear_minimization_oracle(gradient, alive)[:, None])
    return tau * (weights * (values - smallest)).sum(-1)


def away_gap(weights: Tensor, gradient: Tensor, tau: float) -> Tensor:
    """-<g, s - y> with the away vertex y, (B,), in units of the loss. Never negative."""
    values = _vertex_values(gradient)
    largest = values.gather(-1, away_vertex(weights, gradient)[:, None])
    return tau * (weights * (largest - values)).sum(-1)


class Direction(NamedTuple):
    """Where each simplex goes next; every field is (B,)."""

    vertex: Tensor  # the vertex that is moved towards or away from, 0 to r
    away: Tensor  # bool: d = s - vertex; else d = vertex - s
    gap: Tensor  # Frank-Wolfe gap at the current point
    slope: Tensor  # -<g, d> >= gap: first-order decrease per unit of step size
    max_step: Tensor  # 1 towards; w_y / (1 - w_y) away, where y's weight reaches 0


def choose_direction(weights: Tensor, gradient: Tensor, alive: Tensor, tau: float) -> Direction:
    """Towards the oracle's vertex if -<g, h> >= -<g, b>, else away from the away vertex (Algorithm 1, steps 3 to 5)."""
    gap = frank_wolfe_gap(weights, gradient, alive, tau)
    backward = away_gap(weights, gradient, tau)
    away = backward > gap
    leaving = away_vertex(weights, gradient)
    weight = weights.gather(-1, leaving[:, None])[:, 0]
    return Direction(
        vertex=torch.where(away, leaving, linear_minimization_oracle(gradient, alive)),
        away=away,
        gap=gap,
        slope=torch.maximum(gap, backward),
        # At a single vertex (weight 1) the away gap is 0, so this quotient is only used where the weight is below 1.
        max_step=torch.where(away, weight / (1 - weight), torch.ones_like(weight)),
    )


class StepTaken(NamedTuple):
    """The weights after one step, (B, r + 1), and what it was, (B,) each."""

    weights: Tensor
    step_size: Tensor  # after the cap; 0 where the simplex stopped
    away: Tensor  # bool: an away step that left its vertex some weight
    drop: Tensor  # bool: an away step that set its vertex's weight to exactly 0


def take_step(
    weights: Tensor, direction: Direction, step_size: float | Tensor, tolerance: float | Tensor = 0.0
) -> StepTaken:
    """Move by min(`step_size`, max_step) along the direction (Algorithm 1, step 6).

    `step_size` > 0 and `tolerance` >= 0 are one number or (B,). A simplex whose gap is at most `tolerance` (the paper's
    p) does not move. The weights stay >= 0 with sum 1, and a drop step gives a weight of exactly 0.
    """
    moves = direction.gap > tolerance
    alpha = torch.where(moves, direction.max_step.clamp(max=step_size), 0.0)
    vertex = direction.vertex[:, None] == torch.arange(weights.shape[-1], device=weights.device)
    towards = vertex.to(weights.dtype) - weights
    moved = weights + torch.where(direction.away, -alpha, alpha)[:, None] * towards
    full_away = direction.away & (alpha >= direction.max_step)
    moved = moved.masked_fill(vertex & full_away[:, None], 0.0).clamp(min=0)
    moved = torch.where(moves[:, None], moved / moved.sum(-1, keepdim=True), weights)
    weightless = moved.gather(-1, direction.vertex[:, None])[:, 0] == 0
    return StepTaken(
        weights=moved,
        step_size=alpha,
        away=moves & direction.away & ~weightless,
        drop=moves & direction.away & weightless,
    )


def diminishing_step_size(n: int) -> float:
    """2 / (n + 2) at step n = 0, 1, ...: the standard rule of this family, which needs no constant of the problem.

    Its first step is 1, so all weight goes to one vertex.
    """
    return 2 / (n + 2)


def squared_length(weights: Tensor, direction: Direction, tau: float) -> Tensor:
    """||d||^2 of each direction, (B,), in the units of s."""
    vertex = direction.vertex[:, None] == torch.arange(weights.shape[-1], device=weights.device)
    return tau**2 * (vertex.to(weights.dtype) - weights)[:, 1:].square().sum(-1)


def short_step_size(direction: Direction, squares: Tensor, curvature: float | Tensor) -> Tensor:
    """-<g, d> / (M ||d||^2), (B,): the least point of the quadratic bound with curvature M along d; 0 where d is 0.

    squares: `squared_length`. `take_step` caps it at max_step.
    """
    return torch.where(squares > 0, direction.slope / (curvature * squares.clamp(min=1e-30)), 0.0)


def curvature_for(weights: Tensor, direction: Direction, tau: float, step_size: float) -> float:
    """The M for which the longest of the short steps is `step_size`; 0 where no simplex has a slope. Waits once."""
    squares = squared_length(weights, direction, tau)
    slopes = direction.slope / (step_size * squares.clamp(min=1e-30))
    return float(torch.where(squares > 0, slopes, 0.0).max())


class Backtracked(NamedTuple):
    """What `backtrack` found."""

    taken: StepTaken
    curvature: float  # the estimate of M that the next search begins from
    trials: int


def backtrack(
    weights: Tensor,
    direction: Direction,
    tau: float,
    loss: Callable[[Tensor], Tensor],
    start: float,
    curvature: float,
    most: int,
    rho: float = 0.25,
    tolerance: float = 0.0,
) -> Backtracked:
    """The short-step rule with one M for all simplices, found by backtracking (Algorithm 1, step 6).

    M begins at half of `curvature` and doubles until the step's decrease is sufficient,
    loss(moved) <= start - rho sum_b alpha_b slope_b; after `most` trials without success no simplex moves. Any M from
    the objective's true curvature on succeeds with rho <= 1/2. A decrease
    below the loss's rounding is taken on trust. It fits objectives of which the gradient behind `direction` is the
    gradient.

    loss: weights (B, r + 1) to the objective, a scalar; start: the objective at `weights`. Waits for the device once
    per trial. `tolerance` as in `take_step`.
    """
    squares = squared_length(weights, direction, tau)
    curvature = curvature / 2 or 1.0  # 0 stands for no slope anywhere, where no M makes a step
    for trial in range(1, most + 1):
        taken = take_step(weights, direction, short_step_size(direction, squares, curvature), tolerance)
        promised = rho * float((taken.step_size * direction.slope).sum())
        if promised == 0:
            return Backtracked(taken, 2 * curvature, 0)
        reached = loss(taken.weights)
        rounding = 4 * torch.finfo(reached.dtype).eps * abs(start)
        if float(reached) <= start - promised + rounding:
            return Backtracked(taken, curvature, trial)
        curvature = 2 * curvature
    none = torch.zeros_like(direction.away)
    return Backtracked(StepTaken(weights, torch.zeros_like(direction.slope), none, none), curvature, most)


def _vertex_values(gradient: Tensor) -> Tensor:
    """<g, vertex> / tau for every vertex, (B, r + 1), less the part that all of them share; so 0 for eps*1."""
    return pad(gradient, (1, 0))


def _selectable(alive: Tensor) -> Tensor:
    """Which vertices the oracle may return, (B, r + 1): eps*1 always."""
    return pad(alive, (1, 0), value=True)
