"""`advise`: the smallest configuration that is not worse than the best by more than a margin. Statistics alone.

The question has three traps, and the procedure an answer to each.

- *The best is not known.* A test against the configuration with the best observed mean would take the luckiest for the
  best. Here a configuration c is shown to be non-inferior only if it is so against every other one. "c is worse than
  the best by the margin or more" is "c is so against some j", a union of hypotheses; its intersection-union test
  (Berger, 1982) rejects where each of them is rejected, at the same level, so its p value is the largest of theirs. No
  selection enters, whichever is the best. (It is the test behind Hsu's constrained intervals for the difference from
  the best, 1984, without their common variance and equal numbers of runs, as in Edwards and Hsu, 1983.)
- *Several candidates.* Whichever is recommended is one of those shown, so it is enough that no false one is among
  them but with probability 0.05: Holm's correction. At most K - 1 of K hypotheses are true, since the best is not worse
  than itself, so that Holm's first factor is K - 1 (Shaffer, 1986).
- *Few seeds.* The variance of a difference is a sum of two parts: of seeds, with S - 1 degrees of freedom, and of
  examples, with N - 1. Satterthwaite's degrees of freedom (`statistics.crossed`) are estimates themselves, and
  sometimes too high: with them, a one-sided test at two seeds passes a difference of exactly the margin in up to 8 % of
  cases at level 5 %, and in up to 4.6 % at level 1 %, which a correction asks for. Here each part has Student's
  quantile of its own, and the squares are added (Howe, 1974; Graybill and Wang, 1980): 2 to 5 %, and at most 1.1 %.
- *Few examples that differ.* Where two configurations disagree on a handful of examples only, a normal interval is too
  short, most of all where few were seen by luck: at level 5 % the test passes up to 15 %. So it is made as if one
  example more had been seen, which differs against the configuration by as much as any did. That is nothing where many
  differ, and leaves 6 % at worst, on seeds that all end alike.

scripts/advise_coverage.py measures how often the whole procedure recommends a configuration that is truly worse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.report.statistics import CONFIDENCE, POWER, Difference, crossed, paired

LEVEL = 1 - CONFIDENCE
MOST_SEEDS = 100  # that are looked at for what would make an advice surer
HALVINGS = 40  # of an interval of p values' logarithms, from 1e-9


@dataclass(frozen=True)
class Estimate:
    """A difference of two configurations in merit (more is better), its variance in independent parts.

    parts: (variance, degrees of freedom of its estimate); that of seeds comes first, that of examples after it.
    one_more: what one more example could take from the mean, if it differed as much as any does.
    """

    mean: float
    parts: tuple[tuple[float, float], ...]
    one_more: float = 0.0

    @property
    def variance(self) -> float:
        """Of the mean."""
        return math.fsum(variance for variance, _ in self.parts)

    def below(self, level: float) -> float:
        """How far the true difference may lie below the mean, at one-sided confidence 1 - `level` (up to 0.5)."""
        from scipy.special import stdtrit

        squares = math.fsum(variance * float(stdtrit(df, level)) ** 2 for variance, df in self.parts)
        return self.one_more + math.sqrt(squares)

    def p_above(self, bound: float) -> float:
        """One-sided p of "the true difference is `bound` or less", where the mean is above it; else 1. Never below
        1e-9."""
        distance = self.mean - bound
        low, high = math.log(1e-9), math.log(0.5)
        if distance <= 0:
            return 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.below(math.exp(middle)) < distance else (middle, high)
        return math.exp(high)


def estimate(
    by_seed: np.ndarray, found: Difference | None, num_examples: int | None, largest: float = 0.0, sign: float = 1
) -> Estimate | None:
    """The difference with its variance's parts.

    `by_seed`: (seeds,) differences of scores. `found`: the difference over seeds and `num_examples` examples (see
    `statistics.crossed`), or over seeds alone, without examples. `largest`: difference on an example, mean over seeds,
    without its sign. `sign`: -1 where less is better. None where there is no difference to be had.
    """
    if found is None:
        return None
    of_seeds = paired(by_seed)
    total, seeds = found.standard_error**2, 0.0 if of_seeds is None else of_seeds.standard_error**2
    parts = [(min(seeds, total), len(by_seed) - 1.0)]
    if num_examples is not None:
        parts.append((max(0.0, total - seeds), num_examples - 1.0))
    return Estimate(sign * found.mean, tuple(parts), largest / (num_examples or 1))


def of_examples(differences: np.ndarray) -> Estimate | None:
    """The estimate from (seeds, examples) differences in merit."""
    largest = float(np.abs(differences.mean(axis=0)).max())
    return estimate(differences.mean(axis=1), crossed(differences), differences.shape[1], largest)


def mean_estimate(of_tasks: Sequence[Estimate | None]) -> Estimate | None:
    """Of the mean difference over these tasks, taken to be independent; None where one of them is not available."""
    known = [each for each in of_tasks if each is not None]
    if not known or len(known) < len(of_tasks):
        return None
    parts = tuple((variance / len(known) ** 2, df) for each in known for variance, df in each.parts)
    mean = math.fsum(each.mean for each in known) / len(known)
    one_more = math.fsum(each.one_more for each in known) / len(known)
    return Estimate(mean, parts, one_more)


def non_inferior(against: Sequence[Sequence[Estimate | None]], margin: float) -> list[float]:
    """Adjusted p, for each of K configurations, of "it is worse than the best of them by `margin` or more".

    `against[c][j]`: c less j in merit, None where that cannot be told (c is then not shown); the diagonal is not read.
    """
    p_values = [
        max((1.0 if each is None else each.p_above(-margin) for j, each in enumerate(row) if j != c), default=1.0)
        for c, row in enumerate(against)
    ]
    return _at_most_all_but_one(p_values)


def _at_most_all_but_one(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values where one of the hypotheses is known to be false."""
    count, adjusted, highest = len(p_values), [1.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(count), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, min(count - 1, count - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def smallest(sizes: Sequence[float | None], adjusted: Sequence[float]) -> int | None:
    """The place of the smallest configuration that is shown to be non-inferior; None where none is. Of equally large
    ones the first. A size of None is that of one that may not be recommended."""
    shown = [
        (size, place)
        for place, (size, p) in enumerate(zip(sizes, adjusted, strict=True))
        if size is not None and p <= LEVEL
    ]
    return min(shown)[1] if shown else None


@dataclass(frozen=True)
class Needed:
    """What would show a configuration with probability 0.8, if the differences are as observed."""

    seeds: int | None = None  # in place of those there are, on the same rows
    times_rows: float | None = None  # so many times the examples, with the same seeds


def needed(against: Sequence[Estimate], margin: float, seeds: int, count: int) -> Needed | None:
    """For a configuration's differences from the others on one task at `seeds` seeds, `count` configurations in all;
    None where its observed mean is below one of theirs by the margin, so that more of the same would not show it."""
    if not against or min(each.mean for each in against) <= -margin:
        return None
    level = LEVEL / max(1, count - 1)
    for more in range(seeds + 1, MOST_SEEDS + 1):
        if all(_detected(_scaled(each, seeds / more, more - 1.0), margin, level) for each in against):
            return Needed(seeds=more)
    for rows in (2, 3, 4, 6, 8, 10, 20, 50, 100):
        if all(_detected(_scaled(each, 1.0, seeds - 1.0, rows), margin, level) for each in against):
            return Needed(times_rows=rows)
    return Needed()


def _scaled(each: Estimate, of_seeds: float, degrees: float, rows: float = 1) -> Estimate:
    (variance, _), *others = each.parts
    parts = ((variance * of_seeds, degrees), *((v / rows, df * rows) for v, df in others))
    return Estimate(each.mean, parts, each.one_more / rows)


def _detected(each: Estimate, margin: float, level: float) -> bool:
    from scipy.special import ndtri

    return each.mean + margin >= each.below(level) + float(ndtri(POWER)) * math.sqrt(each.variance)
