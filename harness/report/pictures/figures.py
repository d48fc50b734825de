"""What all pictures share: colours, panels, files. No pyplot: a picture depends on what it is given alone."""

from __future__ import annotations

import math
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from harness.report.pictures import fonts
from harness.report.wording import human

# Okabe and Ito's colour-blind-safe palette without its yellow, which is lost on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")  # 7 and 9 have no common factor: 63 different pairs
SEQUENTIAL = "cividis"  # readable without colour vision, and in grey
PANELS_ACROSS = 3
WIDTHS = {1: 3.6, 2: 5.6, 3: 6.8}  # inches, by panels across: a column or a page of a paper, so that 8 points stay 8
PANEL_HEIGHT = 2.1
SIGN_WIDTH = 0.054  # of the legend's text
DPI = 200
STYLE: Any = {"font.family": fonts.FAMILY, "font.size": 8, "pdf.fonttype": 42, "text.parse_math": False}
STYLE["axes.titley"] = 1.0  # where it would be anyway, looked up by drawing the panel once more

Style = tuple[str, str]  # colour and marker
LegendPlace = Literal["outside lower center", "lower center"]  # the first where matplotlib lays the figure out


@contextmanager
def in_house_style() -> Iterator[None]:
    """Fonts and sizes of every picture."""
    with rc_context(STYLE):
        yield


def save(figure: Figure, *paths: Path) -> None:
    """Write the files, each in the form of its suffix (.png, .pdf); the same figure gives the same bytes. Names that
    DejaVu Sans lacks signs of are set with what fonts are installed; see `fonts.settle`."""
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a box says it
        if fonts.settle(figure):
            rcParams["pdf.fonttype"] = 3  # takes outlines of every kind of font
        lay_out(figure)
        for path in paths:
            form = path.suffix.removeprefix(".")
            figure.savefig(path, format=form, dpi=DPI, metadata={"CreationDate": None} if form == "pdf" else None)


def lay_out(figure: Figure) -> None:
    """Lay the figure out once: left to itself, matplotlib draws twice for each file."""
    engine = figure.get_layout_engine()
    if engine is not None:
        figure.set_dpi(DPI)
        engine.execute(figure)
        figure.set_layout_engine(None)


def styles(names: Iterable[str], more: Iterable[str] = ()) -> dict[str, Style]:
    """A colour and a marker for each name: those of `names` whatever `more` there is. With a board's labels as `names`,
    all of its pictures show a label alike."""
    ordered = dict.fromkeys([*sorted(set(names)), *sorted(set(more))])
    return {name: (COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]) for place, name in enumerate(ordered)}


def panels(
    down: int,
    across: int,
    caption: str,
    handles: Sequence[Line2D] = (),
    height: float = PANEL_HEIGHT,
    width: float | None = None,
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of `down` x `across` panels, `height` inches each, with its caption above and its legend below.
    `width`: inches, of the whole; None: that of so many panels."""
    width = width or WIDTHS[min(across, PANELS_ACROSS)]
    legend_rows = math.ceil(len(handles) / legend_columns(handles, width))
    lines = textwrap.wrap(caption, int(width * 20), break_on_hyphens=False)
    size = (width, height * down + 0.3 + 0.12 * len(lines) + 0.17 * legend_rows)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = [list(row) for row in figure.subplots(down, across, squeeze=False)]
    figure.suptitle("\n".join(lines), fontsize=6, color="#555555")
    if handles:
        legend_below(figure, handles, "outside lower center")
    return figure, axes


def legend_columns(handles: Sequence[Line2D], width: float) -> int:
    """Entries beside each other in a legend of `width` inches."""
    longest = max((len(line) for handle in handles for line in str(handle.get_label()).splitlines()), default=1)
    return max(1, int(width / (0.45 + SIGN_WIDTH * longest)))


def legend_below(figure: Figure, handles: Sequence[Line2D], place: LegendPlace) -> Legend:
    """A legend as wide as the figure, at its lower edge."""
    across = legend_columns(handles, figure.get_figwidth())
    return figure.legend(handles=handles, loc=place, ncols=across, frameon=False, fontsize=7, handletextpad=0.4)


def panels_for(
    count: int, caption: str, handles: Sequence[Line2D] = (), height: float = PANEL_HEIGHT
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels in as many rows as it takes; see `panels`."""
    across = min(PANELS_ACROSS, count)
    figure, axes = panels(math.ceil(count / across), across, caption, handles, height)
    flat = [panel for row in axes for panel in row]
    for panel in flat[count:]:
        panel.set_visible(False)
    return figure, flat[:count]


def line_handles(names: Mapping[str, Style], shown: Iterable[str]) -> list[Line2D]:
    """A legend's entries for the names that are shown, as lines with marks."""
    return [
        Line2D([], [], color=names[name][0], marker=names[name][1], markersize=4, linewidth=1.1, label=folded(name))
        for name in sorted(set(shown))
    ]


def widths(count: int) -> list[float]:
    """Of lines in the order in which they are drawn, thinner and thinner, so that none hides an equal one."""
    return [1.0 + 0.4 * min(count - 1 - place, 3) for place in range(count)]


def plain(panel: Axes) -> None:
    """A faint grid, and no frame above and to the right."""
    panel.grid(color="#dddddd", linewidth=0.5)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def log_if_wide(panel: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis upwards, its ticks plain numbers, where all `values` drawn are positive and span more than a
    decade and a half."""
    positive = [value for value in values if value > 0]
    if positive and min(values) > 0 and max(positive) > 30 * min(positive):
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from `low` to `high`, at most five; multiples of them where there are fewer than three."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    powers = [10.0**decade for decade in decades if low <= 10.0**decade <= high]
    if len(powers) >= 3:
        return powers[:: math.ceil(len(powers) / 5)]
    for steps in ((1, 2, 5), (1, 2, 3, 4, 6, 8)):
        finer = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(finer) >= 3:
            break
    return finer


def folded(name: str, width: int = 44) -> str:
    """A label in lines of a legend's width."""
    return textwrap.fill(name.replace(",", ", "), width, break_on_hyphens=False)


def tick_text(value: float, _: int | None = None) -> str:
    """1M, 20k: the table's form without its closing zeros."""
    return re.sub(r"\.0+(?=\D)", "", human(value))
