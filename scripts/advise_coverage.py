"""How often `advise` recommends a configuration that is truly worse than the best by the margin, on simulated sweeps.

    python scripts/advise_coverage.py            the table of docs/reports.md, in minutes

A run's score on an example is: a mean of its configuration, what its seed adds, what the configuration adds on the
example, and what the run adds on it. The smallest configurations come first, and are worse than the best by exactly the
margin, the least that counts as an error and the hardest to tell.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from typing import NamedTuple

import numpy as np

from harness.report.evidence.advise import Estimate, non_inferior, of_examples, smallest

MARGIN = 0.02


class Setting(NamedTuple):
    """Simulated sweeps. means: of the configurations, the smallest first; of_*: standard deviations. binary: examples
    are right or wrong. alike: share of the examples that are the same for all configurations, but for their means."""

    means: tuple[float, ...]
    seeds: int
    examples: int
    of_seed: float
    of_example: float
    of_rest: float
    binary: bool = False
    alike: float = 0.0

    def sweep(self, random: np.random.Generator) -> np.ndarray:
        """(configurations, seeds, examples) scores."""
        count = len(self.means)
        score = np.array(self.means)[:, None, None] + self.of_seed * random.standard_normal((count, self.seeds, 1))
        if not self.binary:
            score = score + self.of_example * random.standard_normal((count, 1, self.examples))
            return score + self.of_rest * random.standard_normal((count, self.seeds, self.examples))
        # The share of right answers is 0.8 plus the mean: a value uniform in 0 to 1 falls below it, one that the
        # configuration has in common with its other seeds by a chance that `of_example` is.
        own = random.random((count, 1, self.examples)), random.random((count, self.seeds, self.examples))
        shared = random.random((count, self.seeds, self.examples)) < self.of_example
        alike, of_all = random.random((2, 1, 1, self.examples))
        return (np.where(alike < self.alike, of_all, np.where(shared, *own)) < 0.8 + score).astype(float)


def estimates(scores: np.ndarray) -> list[list[Estimate | None]]:
    """Each configuration less each other one."""
    against: list[list[Estimate | None]] = [[None] * len(scores) for _ in scores]
    for c, j in itertools.combinations(range(len(scores)), 2):
        found = of_examples(scores[c] - scores[j])
        if found is not None:
            against[c][j], against[j][c] = found, dataclasses.replace(found, mean=-found.mean)
    return against


def errors(setting: Setting, margin: float, sweeps: int, seed: int) -> tuple[float, float]:
    """(share of sweeps in which a configuration is recommended that is worse than the best by `margin`, share in which
    any is)."""
    random = np.random.default_rng(seed)
    wrong = any_at_all = 0
    limit = max(setting.means) - margin + 1e-12
    for _ in range(sweeps):
        place = smallest(range(len(setting.means)), non_inferior(estimates(setting.sweep(random)), margin))
        if place is not None:
            any_at_all += 1
            wrong += setting.means[place] <= limit
    return wrong / sweeps, any_at_all / sweeps


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sweeps", type=int, default=2000)
    options = parser.parse_args()
    sources = {
        "seeds": (0.01, 0.0, 0.3, False, 0.0),
        "examples": (0.003, 0.3, 0.2, False, 0.0),
        "both": (0.03, 0.1, 0.1, False, 0.0),
        "right or wrong": (0.01, 0.5, 0.0, True, 0.0),
        "few differ": (0.005, 0.5, 0.0, True, 0.97),
    }
    print("| seeds | configurations | what varies most | wrong | right, where all are equal |\n|---|---|---|---|---|")
    for seeds, count, (name, source) in itertools.product((2, 3, 5, 10), (2, 6), sources.items()):
        bad = Setting((-MARGIN,) * (count - 1) + (0.0,), seeds, 500, *source)
        wrong, _ = errors(bad, MARGIN, options.sweeps, seed=seeds)
        _, shown = errors(bad._replace(means=(0.0,) * count), 2 * MARGIN, options.sweeps // 4, seed=seeds)
        print(f"| {seeds} | {count} | {name} | {wrong:.3f} | {shown:.2f} |", flush=True)


if __name__ == "__main__":
    main()
