"""Mean, spread and interval of a few scores."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """What n values say. None is "not available": the mean of no value, the spread of one."""

    n: int
    mean: float | None
    standard_deviation: float | None  # of the sample: divided by n - 1
    half_width: float | None  # of the 95 % Student t interval of the mean


def summarize(values: Iterable[float]) -> Summary:
    """The summary of `values`, in their own unit. Raises ValueError where one is not finite."""
    numbers = [float(value) for value in values]
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"values to summarize must be finite: {numbers}")
    n = len(numbers)
    if n == 0:
        return Summary(0, None, None, None)
    mean = math.fsum(numbers) / n
    if n == 1:
        return Summary(1, mean, None, None)
    deviation = math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / (n - 1))
    return Summary(n, mean, deviation, _t_quantile(n - 1) * deviation / math.sqrt(n))


@functools.cache
def _t_quantile(degrees: int) -> float:
    from scipy.special import (
        stdtrit,
    )  # what scipy.stats.t.ppf calls, without the second that scipy.stats takes to import

    return float(stdtrit(degrees, 0.5 + CONFIDENCE / 2))
