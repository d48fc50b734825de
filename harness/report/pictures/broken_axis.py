"""An axis that spans the values of most rows. Those far beyond stand in a strip at its edge, with their value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from harness.report.pictures.figures import log_ticks, tick_text
from harness.report.wording import score_text

STRIP = 0.16  # width of a strip, in widths of the axis between the strips
WIDEST = 0.6  # of the whole: a main region that is wider gains nothing, and nothing is cut off
DECADES_NEAR = 0.8  # between neighbours of one region
TICKS_APART = 0.17  # of the axis, to the right; ticks upwards need less
SHADE = "#f0f0f0"
BREAK: Any = {"marker": ((-0.6, -1), (0.6, 1)), "markersize": 7, "color": "black", "markeredgewidth": 0.8}


@dataclass(frozen=True)
class BrokenAxis:
    """`low`, `high`: what the axis between its strips spans, as log10 where it is logarithmic. `below`, `above`: the
    values in the strips, rising."""

    low: float
    high: float
    below: tuple[float, ...] = ()
    above: tuple[float, ...] = ()
    logarithmic: bool = False

    @property
    def limits(self) -> tuple[float, float]:
        """The ends of the axis with its strips, in the unit of `low`."""
        strip = STRIP * (self.high - self.low)
        return self.low - strip * bool(self.below), self.high + strip * bool(self.above)

    def places(self, values: Iterable[float]) -> np.ndarray:
        """Where values stand, in the panel's data coordinates. One in a strip that is no row's, as a single seed's,
        takes the place of the nearest that is."""
        return self._data(np.array([self._unit(value) for value in values], dtype=float))

    def strips(self) -> list[tuple[float, float, tuple[float, ...]]]:
        """(start, end, values) of each strip, in the unit of `low`."""
        start, end = self.limits
        both = ((start, self.low, self.below), (self.high, end, self.above))
        return [strip for strip in both if strip[2]]

    def is_beyond(self, value: float) -> bool:
        """Whether the value stands in a strip."""
        return value in self.below or value in self.above

    def holds_several(self, value: float) -> bool:
        """Whether the value stands in a strip of several, so that the tick does not tell it."""
        return any(value in values and len(values) > 1 for _, _, values in self.strips())

    def text(self, value: float) -> str:
        """A value in words."""
        return tick_text(value) if self.logarithmic else score_text(value)

    def draw(self, panel: Axes, name: Literal["x", "y"]) -> None:
        """Set the panel's limits and ticks; shade and mark the strips."""
        axis, shade = (panel.xaxis, panel.axvspan) if name == "x" else (panel.yaxis, panel.axhspan)
        if self.logarithmic:
            (panel.set_xscale if name == "x" else panel.set_yscale)("log")
        (panel.set_xlim if name == "x" else panel.set_ylim)(*self._data(np.array(self.limits)))
        texts = {float(self._data(np.array(place))): text for place, text in [*self._ticks(), *self._strip_ticks()]}
        axis.set_major_locator(FixedLocator(sorted(texts)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: texts.get(value, "")))
        axis.set_minor_locator(NullLocator())
        start, end = self.limits
        for first, last, _ in self.strips():
            shade(*map(float, self._data(np.array([first, last]))), color=SHADE, linewidth=0, zorder=0)
            edge = ((first if first > start else last) - start) / (end - start)
            at = ([edge], [0.0]) if name == "x" else ([0.0], [edge])
            panel.plot(*at, linestyle="", transform=panel.transAxes, clip_on=False, label="break", **BREAK)

    def _unit(self, value: float) -> float:
        unit = value if not self.logarithmic else math.log10(value) if value > 0 else -math.inf
        for first, last, values in self.strips():
            if value in values or (unit < self.low if last == self.low else unit > self.high):
                nearest = min(range(len(values)), key=lambda place: abs(values[place] - value))
                return first + (last - first) * (nearest + 1) / (len(values) + 1)
        return max(unit, self.low - 1)

    def _data(self, units: np.ndarray) -> np.ndarray:
        return 10.0**units if self.logarithmic else units

    def _ticks(self) -> list[tuple[float, str]]:
        """(place, text) between the strips, off their texts."""
        start, end = self.limits
        if self.logarithmic:
            found = [(math.log10(tick), tick_text(tick)) for tick in log_ticks(10**self.low, 10**self.high)]
            apart = TICKS_APART * (end - start)
        else:
            found, apart = _plain_ticks(self.low, self.high), TICKS_APART / 3 * (end - start)
        taken = [(first + last) / 2 for first, last, _ in self.strips()]
        kept = []
        for place, text in found:
            if all(abs(place - other) >= apart for other in taken):
                kept.append((place, text))
                taken.append(place)
        return kept

    def _strip_ticks(self) -> list[tuple[float, str]]:
        """(middle, text) of each strip: its value, or the least and the largest."""
        return [
            ((first + last) / 2, "\nto ".join(dict.fromkeys(map(self.text, (values[0], values[-1])))))
            for first, last, values in self.strips()
        ]


def _plain_ticks(low: float, high: float) -> list[tuple[float, str]]:
    found = MaxNLocator(5).tick_values(low, high)
    step = float(found[1] - found[0])
    decimals = next((count for count in range(9) if abs(round(step, count) - step) < 1e-3 * step), 9)
    return [(float(tick), f"{tick + 0.0:.{decimals}f}") for tick in found if low <= tick <= high]


def of_counts(counts: Iterable[float]) -> BrokenAxis:
    """A logarithmic axis for counts, one or more; 0 stands in the strip below."""
    distinct = sorted(set(counts))
    logs = sorted(math.log10(count) for count in counts if count > 0)
    if not logs:
        return BrokenAxis(0.0, 1.0, below=(0.0,), logarithmic=True)
    low, high = main_region(logs, len(logs) // 2 + 1, DECADES_NEAR)
    below = tuple(count for count in distinct if count <= 0 or math.log10(count) < low)
    above = tuple(count for count in distinct if count > 0 and math.log10(count) > high)
    margin = max(0.1 * (high - low), 0.1)
    return BrokenAxis(low - margin, high + margin, below, above, logarithmic=True)


def of_scores(scores: Sequence[float], higher_is_better: bool) -> BrokenAxis:
    """A linear axis for scores, one or more, without margins: the strip is for those far worse than most."""
    low, high = main_region(sorted(scores), math.ceil(0.75 * len(scores)), None)
    if higher_is_better:
        return BrokenAxis(low, max(scores), below=tuple(sorted({score for score in scores if score < low})))
    return BrokenAxis(min(scores), high, above=tuple(sorted({score for score in scores if score > high})))


def widened(axis: BrokenAxis, low: float, high: float) -> BrokenAxis:
    """The axis from at most `low` to at least `high`."""
    return dataclasses.replace(axis, low=min(axis.low, low), high=max(axis.high, high))


def main_region(values: Sequence[float], at_least: int, near: float | None) -> tuple[float, float]:
    """(least, largest) of the shortest stretch of so many of the rising `values`, grown by neighbours that are `near`
    (None: within the stretch's own length); the whole where that is not much shorter."""
    last = len(values) - 1
    first = min(range(last - at_least + 2), key=lambda place: values[place + at_least - 1] - values[place])
    end = first + at_least - 1
    reach = near if near is not None else values[end] - values[first]
    while first > 0 and values[first] - values[first - 1] <= reach:
        first -= 1
    while end < last and values[end + 1] - values[end] <= reach:
        end += 1
    if values[end] - values[first] > WIDEST * (values[last] - values[0]):
        return values[0], values[last]
    return values[first], values[end]
