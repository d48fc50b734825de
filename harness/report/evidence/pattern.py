"""Ranks that differ by seed, as one rank for each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def one_pattern(ranks: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """One rank for each layer from those of several runs; a layer that a run does not name has rank 0 there.

    The median over the runs, rounded half up, then scaled to the mean total of a run: whole parts first, and what is
    left to the largest fractions, of equal ones to the earlier layer. No layer gets more than it had in some run, so
    the total may stay below. Where all medians are 0, the means are scaled in their place.
    """
    layers = list(dict.fromkeys(layer for of_run in ranks for layer in of_run))
    found = {layer: sorted(of_run.get(layer, 0) for of_run in ranks) for layer in layers}
    total = _half_up(sum(map(sum, found.values())) / max(1, len(ranks)))
    base: dict[str, float] = {layer: _half_up(_median(values)) for layer, values in found.items()}
    if not any(base.values()):
        base = {layer: sum(values) / len(values) for layer, values in found.items()}
    factor = total / sum(base.values()) if any(base.values()) else 0.0
    exact = {layer: min(base[layer] * factor, found[layer][-1]) for layer in layers}
    pattern = {layer: math.floor(value + 1e-9) for layer, value in exact.items()}
    by_fraction = sorted(layers, key=lambda layer: pattern[layer] - exact[layer])  # stable: earlier layers first
    room = [layer for layer in by_fraction if base[layer] and pattern[layer] < found[layer][-1]]
    for layer in room[: max(0, total - sum(pattern.values()))]:
        pattern[layer] += 1
    return pattern


def _median(values: Sequence[int]) -> float:
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2


def _half_up(value: float) -> int:
    return math.floor(value + 0.5)
