"""Frank-Wolfe with away or pairwise steps on the shifted simplex, for B simplices at once.

Away steps are dEBORA's (Algorithm 1, steps 3 to 6), pairwise steps those of Lacoste-Julien and Jaggi (2015,
arXiv 1511.05932, Algorithm 2).

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
from typing import Literal, NamedTuple

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
    """-<g, z - s> with the oracle's z, (B,), in units of the loss. Never negative, and 0 at a stationary point."""
    return _scaled_rise(weights, gradient, linear_minimization_oracle(gradient, alive), -tau)


def away_gap(weights: Tensor, gradient: Tensor, tau: float) -> Tensor:
    """-<g, s - y> with the away vertex y, (B,), in units of the loss. Never negative."""
    return _scaled_rise(weights, gradient, away_vertex(weights, gradient), tau)


class Direction(NamedTuple):
    """Where each simplex goes next; every field is (B,), `vector` (B, r + 1)."""

    vertex: Tensor  # 0 to r: the vertex z that is moved towards, or y that is moved away from
    away: Tensor  # bool: away from `vertex`, which a full step empties; of pairwise steps each
    gap: Tensor  # Frank-Wolfe gap at the current point
    slope: Tensor  # -<g, d> >= gap: first-order decrease per unit of step size
    max_step: Tensor  # 1 towards; w_y / (1 - w_y) away and w_y pairwise, where y's weight reaches 0
    vector: Tensor  # d in vertex weights, whose sum is 0


def choose_direction(
    weights: Tensor, gradient: Tensor, alive: Tensor, tau: float, steps: Literal["away", "pairwise"] = "away"
) -> Direction:
    """With the oracle's vertex z and the away vertex y: d = z - s if its slope is at least that of s - y, else s - y
    (Algorithm 1, steps 3 to 5); or pairwise, d = z - y always."""
    entering, leaving = linear_minimization_oracle(gradient, alive), away_vertex(weights, gradient)
    gap, backward = (_scaled_rise(weights, gradient, v, sign * tau) for v, sign in ((entering, -1), (leaving, 1)))
    to_entering = _corner(entering, weights) - weights
    from_leaving = weights - _corner(leaving, weights)
    weight = weights.gather(-1, leaving[:, None])[:, 0]
    if steps == "pairwise":
        away, slope, limit = torch.ones_like(gap, dtype=torch.bool), gap + backward, weight
        vector = to_entering + from_leaving
    else:
        away, slope = backward > gap, torch.maximum(gap, backward)
        # At a single vertex (weight 1) the away gap is 0, so this quotient is only used where the weight is below 1.
        limit = weight / (1 - weight)
        vector = torch.where(away[:, None], from_leaving, to_entering)
    return Direction(
        vertex=torch.where(away, leaving, entering),
        away=away,
        gap=gap,
        slope=slope,
        max_step=torch.where(away, limit, 1.0),
        vector=vector,
    )


def slope_along(direction: Direction, gradient: Tensor, tau: float) -> Tensor:
    """-<g, d>, (B,), for any gradient, not only the one that named the direction."""
    return -tau * (direction.vector[:, 1:] * gradient).sum(-1)


class StepTaken(NamedTuple):
    """The weights after one step, (B, r + 1), and what it was, (B,) each."""

    weights: Tensor
    step_size: Tensor  # after the cap; 0 where the simplex stopped
    away: Tensor  # bool: an away or pairwise step that left its vertex y some weight
    drop: Tensor  # bool: one that set y's weight to exactly 0
    swap: Tensor  # bool: a drop whose weight went to a vertex that had none, so that as many as before have weight


def take_step(
    weights: Tensor, direction: Direction, step_size: float | Tensor, tolerance: float | Tensor = 0.0
) -> StepTaken:
    """Move by min(`step_size`, max_step) along the direction (Algorithm 1, step 6).

    `step_size` > 0 and `tolerance` >= 0 are one number or (B,). A simplex whose gap is at most `tolerance` (the paper's
    p) does not move. The weights stay >= 0 with sum 1, and a drop step gives a weight of exactly 0.
    """
    moves = direction.gap > tolerance
    alpha = torch.where(moves, direction.max_step.clamp(max=step_size), 0.0)
    moved = weights + alpha[:, None] * direction.vector
    emptied = direction.away & (alpha >= direction.max_step)
    moved = moved.masked_fill(_is(direction.vertex, weights) & emptied[:, None], 0.0).clamp(min=0)
    moved = torch.where(moves[:, None], moved / moved.sum(-1, keepdim=True), weights)
    weightless = moved.gather(-1, direction.vertex[:, None])[:, 0] == 0
    drop = moves & direction.away & weightless
    return StepTaken(
        weights=moved,
        step_size=alpha,
        away=moves & direction.away & ~weightless,
        drop=drop,
        swap=drop & ((weights == 0) & (moved > 0)).any(-1),
    )


def give_back(taken: StepTaken, before: Tensor, kept: Tensor) -> StepTaken:
    """The step, but vertices that it emptied get back the weight that they had `before`, and their simplices are scaled
    to sum 1: a shorter step along the same line. `step_size` stays what it was. kept: (B, r + 1) bool."""
    weights = taken.weights + before * kept
    others = ~kept.any(-1)
    return taken._replace(
        weights=weights / weights.sum(-1, keepdim=True), drop=taken.drop & others, swap=taken.swap & others
    )


def is_level(slopes: Tensor, tolerance: float) -> Tensor:
    """Whether the mean of noisy slopes, (k,), is at most `tolerance` plus its standard error: a bool, False if k is 0.

    Ours. A small slope shows only in many of them, whose mean is then several standard errors.
    """
    count = len(slopes)
    if count == 0:
        return slopes.new_zeros((), dtype=torch.bool)
    return slopes.mean() <= tolerance + slopes.std(correction=min(1, count - 1)) / count**0.5


def squared_length(direction: Direction, tau: float) -> Tensor:
    """||d||^2 of each direction, (B,), in the units of s."""
    return tau**2 * direction.vector[:, 1:].square().sum(-1)


def short_step_size(direction: Direction, squares: Tensor, curvature: float | Tensor) -> Tensor:
    """-<g, d> / (M ||d||^2), (B,): the least point of the quadratic bound with curvature M along d; 0 where d is 0.

    squares: `squared_length`. `take_step` caps it at max_step.
    """
    return torch.where(squares > 0, direction.slope / (curvature * squares.clamp(min=1e-30)), 0.0)


def curvature_for(direction: Direction, tau: float, step_size: float) -> float:
    """The M for which the longest of the short steps is `step_size`; 0 where no simplex has a slope. Waits once."""
    squares = squared_length(direction, tau)
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
    squares = squared_length(direction, tau)
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
    return Backtracked(StepTaken(weights, torch.zeros_like(direction.slope), none, none, none), curvature, most)


def _is(vertex: Tensor, weights: Tensor) -> Tensor:
    """Where each simplex has this vertex, (B,): (B, r + 1) bool."""
    return vertex[:, None] == torch.arange(weights.shape[-1], device=weights.device)


def _corner(vertex: Tensor, weights: Tensor) -> Tensor:
    """The weights at this vertex of each simplex, (B,): 1 there and 0 elsewhere, (B, r + 1)."""
    return _is(vertex, weights).to(weights.dtype)


def _vertex_values(gradient: Tensor) -> Tensor:
    """<g, vertex> / tau for every vertex, (B, r + 1), less the part that all of them share; so 0 for eps*1."""
    return pad(gradient, (1, 0))


def _scaled_rise(weights: Tensor, gradient: Tensor, vertex: Tensor, scale: float) -> Tensor:
    """`scale` / tau times <g, vertex - s>, (B,).

    Summed over the vertices as w_j (g_vertex - g_j), whose terms all have one sign for an extreme vertex, so that
    rounding cannot give the sum the other.
    """
    values = _vertex_values(gradient)
    return scale * (weights * (values.gather(-1, vertex[:, None]) - values)).sum(-1)


def _selectable(alive: Tensor) -> Tensor:
    """Which vertices the oracle may return, (B, r + 1): eps*1 always."""
    return pad(alive, (1, 0), value=True)
