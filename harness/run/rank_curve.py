"""One trained adapter scored at several ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from harness.method import Adaptation


def rank_curve(adaptation: Adaptation, ranks: Iterable[int], score: Callable[[int], float]) -> dict[int, float]:
    """rank -> what `score` gives for it while every layer is cut to at most that rank, by rising rank; see
    `Adaptation.at_rank`. {} for a method without such a cut; a score that is not finite is left out."""
    found = {}
    for rank in sorted(set(ranks)):
        cut = adaptation.at_rank(rank)
        if cut is None:
            return {}
        with cut:
            value = float(score(rank))
        if math.isfinite(value):
            found[rank] = value
    return found
