"""Do runs of different seeds end with the same ranks?"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 4000


class Agreement(NamedTuple):
    """Share of components in common, mean over pairs of runs; what chance gives: mean and middle 95 %."""

    shared: float
    chance: float
    low: float
    high: float


def agreement(runs: Sequence[Mapping[str, int]], shape: Callable[[str], str] = lambda layer: "any") -> Agreement:
    """Between runs with the same layers, each layer -> rank: sum of min(r, r') over the mean of both sums, in 0 to 1.

    Chance: every run's ranks dealt anew to the layers of one `shape`, which keeps how many components each run has in
    each shape, and how unequal its ranks are. Raises ValueError for fewer than two runs.
    """
    if len(runs) < 2:
        raise ValueError(f"agreement needs two runs, and got {len(runs)}")
    by_shape: dict[str, list[str]] = defaultdict(list)
    for layer in runs[0]:
        by_shape[shape(layer)].append(layer)
    groups = [np.array([[run[layer] for layer in layers] for run in runs], dtype=float) for layers in by_shape.values()]
    draw = np.random.default_rng(0)
    dealt = [_shared(np.hstack([draw.permuted(ranks, axis=1) for ranks in groups])) for _ in range(DRAWS)]
    low, high = np.quantile(dealt, [0.025, 0.975])
    return Agreement(shared(runs), float(np.mean(dealt)), float(low), float(high))


def shared(runs: Sequence[Mapping[str, int]]) -> float:
    """The share alone, see `agreement`."""
    return _shared(np.array([[run[layer] for layer in runs[0]] for run in runs], dtype=float))


def _shared(ranks: np.ndarray) -> float:
    pairs = [
        2 * np.minimum(first, second).sum() / (first.sum() + second.sum())
        for first, second in itertools.combinations(ranks, 2)
    ]
    return float(np.mean(pairs))
