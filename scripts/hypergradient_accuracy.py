"""How far each hypergradient is from the true one, over the curvature of the loss: Markdown tables.

    python scripts/hypergradient_accuracy.py [--seeds 1] [--penalty 0.1]

Two adapted layers of width 5, rank 2, with a nonlinearity between them, in float64. Of the network's change m(x) the
loss is the mean of K/2 |m|^2 - <c(x), m>: its slope at the frozen weights is fixed, K dials its curvature, K = 1 is
squared error against targets. f2 is taken on one half of the rows, f1 on the same or on the other. The lower level is
solved to a stationary point, with a penalty lambda/2 (|U|^2 + |V|^2) on free factors. The true hypergradient is the
implicit one by MINRES to a residual of 1e-10, and is checked against differences of f1(B*(s), s) with the lower level
solved anew.

A cell is the relative error and, in brackets, the cosine: medians over the seeds. "K beta" is Theorem 4.1's: the norm
of the curvature's part of the lower level's Hessian, over the least singular value of the part that is bilinear in the
factors. `path` is no estimate of this derivative: its cosine is what there is to see.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor
from torch.func import grad, hessian, jvp

from methods.debora.math import hypergradient, manifolds

WIDTH, RANK, ROWS = 5, 2, 40
SIZES = torch.tensor([1.0, 1.4, 1.2, 0.8], dtype=torch.float64)  # s of both layers
CURVATURES = (0.3, 1.0, 3.0)
KINDS = ("closed_form", "direct", "free", "path", "implicit 5", "implicit 10", "implicit 50")
PATH_POINTS = 4
Loss = Callable[[Tensor, Tensor], Tensor]  # of the flat factors and s


class Problem:
    """The network and the two halves of the rows of one seed."""

    def __init__(self, seed: int, curvature: float) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.curvature = curvature
        self.weights, change = normal(2, 2, WIDTH, WIDTH) / WIDTH**0.5
        self.halves = []
        for _ in range(2):
            inputs = normal(ROWS, WIDTH)
            frozen = self.outputs(inputs, torch.zeros_like(change))
            self.halves.append((inputs, frozen, self.outputs(inputs, change) + 0.3 * normal(ROWS, WIDTH) - frozen))

    def outputs(self, inputs: Tensor, psi: Tensor) -> Tensor:
        """(rows, WIDTH), of the updates of both layers, (2, WIDTH, WIDTH)."""
        first, second = self.weights + psi
        hidden = inputs @ first.T
        return (hidden + torch.tanh(hidden) / 2) @ second.T

    def loss(self, half: int, psi: Tensor) -> Tensor:
        """On one half of the rows, 0 at the frozen weights."""
        inputs, frozen, slope = self.halves[half]
        change = self.outputs(inputs, psi) - frozen
        return (self.curvature / 2 * change.square() - slope * change).sum(1).mean()

    def bent(self, half: int, psi: Tensor) -> Tensor:
        """The loss at K = 1 with everything beyond its first order in psi times K: of a network too, K is then all the
        curvature there is."""
        inputs, frozen, slope = self.halves[half]

        def plain(psi: Tensor) -> Tensor:
            change = self.outputs(inputs, psi) - frozen
            return (change.square() / 2 - slope * change).sum(1).mean()

        first = (grad(plain)(torch.zeros_like(psi)) * psi).sum()
        return first + self.curvature * (plain(psi) - first)


def pair(flat: Tensor) -> tuple[Tensor, Tensor]:
    """U and V of both layers, (2, WIDTH, RANK) each."""
    U, V = flat.view(2, 2, WIDTH, RANK)
    return U, V


def free_psi(flat: Tensor, s: Tensor) -> Tensor:
    """(2, WIDTH, WIDTH)."""
    U, V = pair(flat)
    return U * s.view(2, 1, RANK) @ V.mT


def oblique(flat: Tensor) -> Tensor:
    """The columns divided by their norms."""
    return manifolds.project("oblique", flat.view(4, WIDTH, RANK)).flatten()


def off_norm(flat: Tensor) -> Tensor:
    """0 where all columns have norm 1. Added to a loss of `oblique`, which does not see the norms, it makes the system
    regular and changes neither minimiser nor hypergradient."""
    return (flat.view(4, WIDTH, RANK).square().sum(1) - 1).square().sum() / 2


def minimiser(loss: Loss, s: Tensor, flat: Tensor, normalise: Callable[[Tensor], Tensor] = torch.clone) -> Tensor:
    """B*(s) from a point nearby: Newton steps with the eigenvalues' sizes in place of the eigenvalues, halved until
    they descend."""
    slope, bend = grad(loss), hessian(loss)
    for _ in range(150):
        gradient = slope(flat, s)
        if gradient.norm() < 1e-12:
            break
        eigenvalues, Q = torch.linalg.eigh(bend(flat, s))
        step = -Q @ ((Q.T @ gradient) / eigenvalues.abs().clamp(min=1e-6))
        here, size = loss(flat, s), 1.0
        bound = here + 1e-14 * (1 + here.abs())
        while not loss(normalise(flat + size * step), s) <= bound and size > 1e-6:  # also where it is nan
            size /= 2
        flat = normalise(flat + size * step)
    return flat


class Levels(NamedTuple):
    """A lower level at its minimiser, and an upper one. B is flat, (4 WIDTH RANK,)."""

    lower: Loss  # f2, with the penalty or `off_norm`
    plain: Loss  # f2 as a function of free factors, without either
    upper: Loss
    flat: Tensor
    s: Tensor

    def implicit(self, products: int, tolerance: float = 0.0, damping: float = 0.0) -> Tensor:
        """G by MINRES with at most so many products."""
        slope = grad(self.lower)
        value, _ = hypergradient.implicit(
            grad(self.upper, 1)(self.flat, self.s),
            grad(self.upper)(self.flat, self.s),
            lambda v: jvp(lambda B: slope(B, self.s), (self.flat,), (v,))[1],
            lambda v: grad(lambda s: slope(self.flat, s) @ v)(self.s),
            damping,
            products,
            tolerance,
        )
        return value

    def true(self) -> Tensor:
        """G by MINRES to convergence."""
        return self.implicit(5000, 1e-10)

    def by_differences(self, size: float = 1e-4) -> Tensor:
        """d f1(B*(s), s) / d s, the lower level solved anew at every point."""
        found = []
        for direction in torch.eye(len(self.s), dtype=self.s.dtype):
            ends = (self.s + size * direction, self.s - size * direction)
            above, below = (self.upper(minimiser(self.lower, s, self.flat), s) for s in ends)
            found.append((above - below) / (2 * size))
        return torch.stack(found)

    def estimates(self, damping: float = 0.0) -> dict[str, Tensor]:
        """What each of KINDS gives without a batch's noise, (4,)."""
        (U, V), s = pair(self.flat), self.s
        grad_s, grad_factors = grad(self.upper, 1)(self.flat, s), pair(grad(self.upper)(self.flat, s))
        closed = hypergradient.closed_form(grad_s.view(2, RANK), (U, V), grad_factors, s.view(2, RANK))
        lower = pair(grad(self.plain)(self.flat, s))[0]  # Euclidean, also where the columns have norm 1
        points = [hypergradient.path_point(j, PATH_POINTS) for j in range(PATH_POINTS)]
        found = {
            "closed_form": closed.flatten(),
            "direct": hypergradient.direct(grad_s),
            "free": hypergradient.radial(tuple(U), tuple(lower)) / s,
            "path": torch.stack([grad(self.upper, 1)(self.flat, t * s) for t in points]).mean(0),
        }
        return found | {f"implicit {most}": self.implicit(most, damping=damping) for most in (5, 10, 50)}


def random_factors(seed: int) -> Tensor:
    """Flat."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4 * WIDTH * RANK, generator=generator, dtype=torch.float64) / 2


def free_cases(problem: Problem, penalty: float) -> dict[str, Levels]:
    """The lower level of free factors solved, with each upper level."""

    def free(half: int, penalty: float = 0.0) -> Loss:
        return lambda B, s: problem.loss(half, free_psi(B, s)) + penalty / 2 * B.square().sum()

    flat = minimiser(free(0, penalty), SIZES, random_factors(1))
    return {
        "matrix, f1 = f2, penalty in both": Levels(free(0, penalty), free(0), free(0, penalty), flat, SIZES),
        "matrix, f1 = f2, penalty in f2": Levels(free(0, penalty), free(0), free(0), flat, SIZES),
        "matrix, two halves, penalty in f2": Levels(free(0, penalty), free(0), free(1), flat, SIZES),
    }


def oblique_cases(problem: Problem) -> dict[str, Levels]:
    """The lower level of columns of norm 1 solved, with each upper level. s is the update's size there: it goes with
    1 / K."""

    def constrained(half: int) -> Loss:
        return lambda B, s: problem.loss(half, free_psi(oblique(B), s))

    def lower(B: Tensor, s: Tensor) -> Tensor:
        return constrained(0)(B, s) + off_norm(B)

    def plain(B: Tensor, s: Tensor) -> Tensor:
        return problem.loss(0, free_psi(B, s))

    sizes = SIZES / problem.curvature
    flat = minimiser(lower, sizes, oblique(random_factors(1)), oblique)
    names = {"oblique, f1 = f2": 0, "oblique, two halves": 1}
    return {name: Levels(lower, plain, constrained(half), flat, sizes) for name, half in names.items()}


def k_beta(levels: Levels, psi_slope: Tensor) -> float:
    """The curvature's part of the Hessian of f2 over the least singular value of its bilinear part."""
    whole = hessian(levels.plain)(levels.flat, levels.s)
    bilinear = hessian(lambda B: (psi_slope * free_psi(B, levels.s)).sum())(levels.flat)
    return float(torch.linalg.matrix_norm(whole - bilinear, 2) / torch.linalg.svdvals(bilinear)[-1])


def compared(found: Tensor, true: Tensor) -> tuple[float, float]:
    """(relative error, cosine)."""
    return float((found - true).norm() / true.norm()), float(torch.cosine_similarity(found, true, dim=0))


def row(name: str, curvature: float, bounds: Sequence[float], seen: Sequence[tuple[Levels, Tensor]]) -> list[Any]:
    """A row of a table: medians over the seeds."""
    cells, found = [], [levels.estimates() for levels, _ in seen]
    for kind in KINDS:
        pairs = [compared(own[kind], true) for own, (_, true) in zip(found, seen, strict=True)]
        error, cosine = (statistics.median(values) for values in zip(*pairs, strict=True))
        cells.append(f"{error:.2g} ({cosine:.2f})")
    size = statistics.median(float(true.norm()) for _, true in seen)
    return [name, curvature, f"{statistics.median(bounds):.2g}" if bounds else "", f"{size:.2g}", *cells]


def at_the_minimiser(seeds: int, penalty: float) -> tuple[list[list[Any]], float]:
    """The rows, and how far MINRES and the differences are apart at most, relative."""
    rows, apart = [], 0.0
    for curvature in CURVATURES:
        problems = [Problem(seed, curvature) for seed in range(seeds)]
        solved = [free_cases(problem, penalty) | oblique_cases(problem) for problem in problems]
        for name in solved[0]:
            seen = [(levels[name], levels[name].true()) for levels in solved]
            apart = max(apart, compared(seen[0][0].by_differences(), seen[0][1])[0])  # dear: one seed
            bounds = []
            if name.startswith("matrix"):
                for problem, (levels, _) in zip(problems, seen, strict=True):
                    slope = grad(lambda psi, own=problem: own.loss(0, psi))(free_psi(levels.flat, levels.s))
                    bounds.append(k_beta(levels, slope))
            rows.append(row(name, curvature, bounds, seen))
    return sorted(rows, key=lambda own: list(solved[0]).index(own[0])), apart


def _bent(problem: Problem, half: int) -> Loss:
    return lambda B, s: problem.bent(half, free_psi(B, s))


def anywhere(seeds: int) -> list[list[Any]]:
    """The rows at random factors, no minimiser, without a penalty: the formula of the hypergradient all the same."""
    rows = []
    for curvature in (1e-6, 1e-5, 1e-4, 1e-3):
        seen, bounds = [], []
        for seed in range(seeds):
            problem = Problem(seed, curvature)
            lower, upper = (_bent(problem, half) for half in (0, 1))
            flat = random_factors(seed)
            levels = Levels(lower, lower, upper, flat, SIZES)
            slope = grad(lambda psi, own=problem: own.bent(0, psi))(free_psi(flat, SIZES))
            bounds.append(k_beta(levels, slope))
            seen.append((levels, levels.true()))
        rows.append(row("matrix, two halves", curvature, bounds, seen))
    return rows


def without_a_penalty(seeds: int) -> list[list[Any]]:
    """The norms, over that of `direct`, at free factors that minimise f2 alone: the true hypergradient is 0."""
    rows = []
    for curvature in CURVATURES:
        ratios: dict[str, list[float]] = {}
        for seed in range(seeds):
            levels = free_cases(Problem(seed, curvature), 0.0)["matrix, two halves, penalty in f2"]
            found = {"true": levels.true()} | levels.estimates(damping=1e-3)
            for kind, value in found.items():
                ratios.setdefault(kind, []).append(float(value.norm() / found["direct"].norm()))
        rows.append([curvature, *(f"{statistics.median(values):.2g}" for values in ratios.values())])
    return rows


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--penalty", type=float, default=0.1, help="lambda")
    options = parser.parse_args()
    torch.set_num_threads(1)
    headers = ["case", "K", "K beta", "size", *KINDS]
    rows, apart = at_the_minimiser(options.seeds, options.penalty)
    print(f"At the lower level's minimiser, lambda = {options.penalty:g}:\n")
    print(tabulate(rows, headers, tablefmt="pipe", disable_numparse=True))
    print(f"\nThe true one and differences of f1(B*(s), s): apart by {apart:.1g} at most.")
    print("\nAnywhere else, the network's own curvature in K too, without a penalty:\n")
    print(tabulate(anywhere(options.seeds), headers, tablefmt="pipe", disable_numparse=True))
    print("\nAt free factors that minimise f2 without a penalty, two halves, damping 1e-3: norms over that of direct\n")
    print(tabulate(without_a_penalty(options.seeds), ["K", "true", *KINDS], tablefmt="pipe", disable_numparse=True))


if __name__ == "__main__":
    main()
