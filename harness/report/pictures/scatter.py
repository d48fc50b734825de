"""Score against what a method costs, one panel per task, with sweeps as curves and the Pareto front."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from harness.report.board.leaderboard import Board
from harness.report.board.rows import Column
from harness.report.board.runs import Run
from harness.report.names import lines_of
from harness.report.pictures import fonts
from harness.report.pictures.broken_axis import BrokenAxis, of_scores, widened
from harness.report.pictures.cost import PARAMETERS, Cost
from harness.report.pictures.direct_labels import Labels, put
from harness.report.pictures.figures import (
    DPI,
    PANELS_ACROSS,
    STYLE,
    WIDTHS,
    Style,
    folded,
    legend_below,
    plain,
    styles,
)
from harness.report.tables.budget import pareto_front, varied

MOST_LABELS = 16  # above this the legend names methods, and a method's configurations share a colour
WIDE_PANELS = 4  # up to so many tasks stand two beside each other, so that there is room for labels
GREY = "#555555"  # of the front and the caption
LABEL_WIDTH = 26  # signs of a label's line
PANEL_HEIGHTS = {1: 2.3, 2: 2.3, 3: 2.1}  # inches, by panels across
LINE, SIGN, BESIDE, BELOW = 0.14, 0.062, 0.1, 0.45  # inches: a title's line, a tick's sign, right and below of panels


@dataclass(frozen=True)
class Point:
    """A row on one task."""

    label: str
    name: str  # what it is in the legend
    hollow: bool
    ranked: bool  # whether it competes for the best, and so for the front
    cost: float
    score: float
    half_width: float  # of the 95 % interval; 0 without one
    runs: Sequence[Run]  # with a score


@dataclass(frozen=True)
class Panel:
    """One task: its axes, and what stands in it with the labels that have no place yet, in the order of urgency."""

    axes: Axes
    points: Sequence[Point]
    labels: Labels


def draw(board: Board, cost: Cost = PARAMETERS) -> Figure | None:
    """The board's runs; None where none has both a score and the cost. A task whose rows' costs are no match has no
    panel."""
    found = {column: points for column in board.columns if (points := _points(board, column, cost))}
    if not found:
        return None
    points = [point for of_task in found.values() for point in of_task]
    few = len(board.rows) <= MOST_LABELS
    by_name = styles((row.label for row in board.rows) if few else (point.name for point in points))
    x = cost.axis([point.cost for point in points])
    across = 1 if len(found) == 1 else 2 if len(found) <= WIDE_PANELS else PANELS_ACROSS
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTHS[1 if across == 1 else PANELS_ACROSS], 3.0), dpi=DPI)
        FigureCanvasAgg(figure)
        grid = [*figure.subplots(math.ceil(len(found) / across), across, squeeze=False).flat]
        panels = [
            _panel(axes, column, found[column], x, by_name, cost) for axes, column in zip(grid, found, strict=False)
        ]
        for axes in grid[len(found) :]:
            axes.set_visible(False)
        for panel in panels[-across:]:  # the lowest of each column
            panel.axes.set_xlabel(cost.words)
        caption = textwrap.wrap(_caption(board), int(figure.get_figwidth() * 20), break_on_hyphens=False)
        figure.suptitle("\n".join(caption), fontsize=6, color=GREY)
        filled = {point.name for point in points if not point.hollow}
        _finish(figure, panels, across, _settled(figure, {point.name: by_name[point.name] for point in points}, filled))
    return figure


def _caption(board: Board) -> str:
    titles = [section.title for section in board.sections if section.title]
    titles += ["rows with fewer seeds"] if any(not section.ranked for section in board.sections) else []
    return (
        f"{board.caption} Large: mean over seeds; bars: its 95 % interval, cut where it leaves the panel; small: "
        f"single seeds; dashed: Pareto front; on grey: far beyond the others, not to scale."
        + (f" Hollow: {', '.join(dict.fromkeys(titles))}." if titles else "")
    )


def _points(board: Board, column: Column, cost: Cost) -> list[Point]:
    """The rows that have a score and a cost on a task, in the table's order."""
    if not cost.comparable([row.on(column.title) for row in board.rows if column.title in row.cells]):
        return []
    few, found, hollow = len(board.rows) <= MOST_LABELS, [], False
    for section in board.sections:
        hollow = hollow or bool(section.title)  # what has no title after one that has belongs to it
        for row in section.rows:
            cell = row.cells.get(column.title)
            value = cost.value(row.on(column.title)) if cell else None
            if cell is None or value is None or cell.score.mean is None:
                continue
            name = row.label if few else cell.runs[0].method
            half = cell.score.half_width or 0.0
            hollow_here, numbers = hollow or not section.ranked, (value, cell.score.mean, half)
            found.append(Point(row.label, name, hollow_here, section.ranked, *numbers, cell.scored))
    return found


def _panel(
    axes: Axes, column: Column, points: Sequence[Point], x: BrokenAxis, by_name: Mapping[str, Style], cost: Cost
) -> Panel:
    """One task: a bar and a large mark for each row, small marks for its runs, lines for its sweeps and its front."""
    y = _scores_axis(points, column.higher_is_better)
    places = np.stack([x.places(p.cost for p in points), y.places(p.score for p in points)], axis=1)
    colours = [by_name[point.name][0] for point in points]
    halves = np.array([0.0 if y.is_beyond(point.score) else point.half_width for point in points])
    ends = places[:, 1] - halves, places[:, 1] + halves
    axes.vlines(places[:, 0], *ends, colors=colours, linewidth=0.8, alpha=0.45, zorder=1.5)
    _seeds(axes, points, x, y, colours, cost)
    for point, place in zip(points, places, strict=True):
        _mark(axes, point, place, by_name[point.name])
    drawn = _connect(axes, points, x, y, by_name)
    ranked = [(point.cost, point.score) for point in points if point.ranked]
    front = pareto_front(ranked, column.higher_is_better)
    drawn += _front(axes, x.places(value for value, _ in front), y.places(score for _, score in front))
    plain(axes)
    axes.set_title(column.title, fontsize=8)
    axes.set_ylabel(column.metric.replace("_", " "))
    x.draw(axes, "x")
    y.draw(axes, "y")
    on_front = {point.label for point in points if point.ranked and (point.cost, point.score) in front}
    beyond = {point.label for point in points if x.is_beyond(point.cost) or y.is_beyond(point.score)}
    order = sorted(range(len(points)), key=lambda at: _urgency(points[at], beyond, on_front))
    texts = [_label(axes, points[at], x, y, colours[at]) for at in order]
    bars = [np.array([(left, low), (left, high)]) for left, low, high in zip(places[:, 0], *ends, strict=True)]
    lines = [*bars, *(np.asarray(line.get_xydata()) for line in drawn)]
    return Panel(axes, [points[at] for at in order], Labels(axes, texts, places[order], lines))


def _scores_axis(points: Sequence[Point], higher_is_better: bool) -> BrokenAxis:
    """From the seeds' scores, and of the intervals as much as leaves the scores readable."""
    axis = of_scores([point.score for point in points], higher_is_better)
    inside = [point for point in points if not axis.is_beyond(point.score)]
    scores = [run.score for point in inside for run in point.runs if run.score is not None]
    low, high = min(scores), max(scores)
    spread = max(high - low, 0.01)
    bottom = min(point.score - point.half_width for point in inside)
    top = max(point.score + point.half_width for point in inside)
    bottom, top = max(bottom, low - 0.4 * spread), min(top, high + 0.4 * spread)
    return widened(axis, min(bottom, low - 0.15 * spread), max(top, high + 0.15 * spread))


def _seeds(
    axes: Axes, points: Sequence[Point], x: BrokenAxis, y: BrokenAxis, colours: Sequence[str], cost: Cost
) -> None:
    """A small mark for each run of a row whose score is to scale."""
    shown = [
        (getattr(run, cost.name) or 0, run.score, colour)
        for point, colour in zip(points, colours, strict=True)
        for run in point.runs
        if run.score is not None and len(point.runs) > 1 and not y.is_beyond(point.score)
    ]
    if shown:
        values, scores, tints = zip(*shown, strict=True)
        axes.scatter(x.places(values), scores, s=5, c=tints, alpha=0.4, linewidths=0, zorder=2)


def _mark(axes: Axes, point: Point, place: np.ndarray, style: Style) -> None:
    colour, marker = style
    fill, edge, width = ("white", colour, 1.0) if point.hollow else (colour, "white", 0.5)
    axes.plot(
        *place.reshape(2, 1),
        marker,
        markersize=5.5,
        markerfacecolor=fill,
        markeredgecolor=edge,
        markeredgewidth=width,
        zorder=3,
        label=point.label,
    )


def _urgency(point: Point, beyond: Set[str], front: Set[str]) -> tuple[bool, int, bool, bool]:
    """Of its label: what is not to scale comes first, the shortest of it before the others, then the front."""
    is_beyond = point.label in beyond
    return not is_beyond, len(point.label) * is_beyond, point.label not in front, point.hollow


def _connect(
    axes: Axes, points: Sequence[Point], x: BrokenAxis, y: BrokenAxis, by_name: Mapping[str, Style]
) -> list[Line2D]:
    """A line through the configurations of each sweep, in the order of the parameter, as far as they are to scale."""
    drawn = list[Line2D]()
    to_scale = {p.label: p for p in points if not x.is_beyond(p.cost) and not y.is_beyond(p.score)}
    for sweep in varied(point.runs[0] for point in to_scale.values()):
        along = [to_scale[label] for _, label in sweep.values]
        places = x.places(point.cost for point in along), [point.score for point in along]
        colour = by_name[along[0].name][0]
        drawn += axes.plot(*places, color=colour, linewidth=0.8, alpha=0.5, zorder=1.5, label="sweep")
    return drawn


def _front(axes: Axes, across: np.ndarray, up: np.ndarray) -> list[Line2D]:
    """Steps through the front's places."""
    if len(across) < 2:
        return []
    return axes.plot(
        np.repeat(across, 2)[1:],
        np.repeat(up, 2)[:-1],
        color=GREY,
        linewidth=0.8,
        linestyle="--",
        zorder=1,
        label="Pareto front",
    )


def _label(axes: Axes, point: Point, x: BrokenAxis, y: BrokenAxis, colour: str) -> Text:
    """The point's label, with what its axes do not tell."""
    pairs = ((x, point.cost), (y, point.score))
    values = [axis.text(value) for axis, value in pairs if axis.holds_several(value)]
    label = point.label.replace(",", ", ") + (f" ({'; '.join(values)})" if values else "")
    words, dark = "\n".join(lines_of(label, LABEL_WIDTH)), tuple(0.75 * part for part in to_rgb(colour))
    return axes.text(0, 0, words, fontsize=6, color=dark, ha="left", va="bottom", zorder=4, transform=axes.transAxes)


def _settled(figure: Figure, by_name: Mapping[str, Style], filled: Set[str]) -> dict[str, Line2D]:
    """Entries of a legend by their names, hollow but for the `filled`, when the figure and they have only signs that a
    font has."""
    handles = []
    for name, (colour, marker) in sorted(by_name.items()):
        handle = Line2D([], [], color=colour, marker=marker, linestyle="", markersize=5, label=folded(name))
        handle.set_markerfacecolor(colour if name in filled else "white")
        handles.append(handle)
    legend = legend_below(figure, handles, "lower center")
    fonts.settle(figure)
    for handle, text in zip(handles, legend.get_texts(), strict=True):
        handle.set_label(text.get_text())
    legend.remove()
    return dict(zip(sorted(by_name), handles, strict=True))


def _finish(figure: Figure, panels: Sequence[Panel], across: int, handles: Mapping[str, Line2D]) -> None:
    """Labels where there is room for them, a legend for the rest, and all in its place: what is measured here in inches
    stays so, which matplotlib's own layout does not promise."""
    width, height, down = figure.get_figwidth(), PANEL_HEIGHTS[across], math.ceil(len(panels) / across)
    ticks = [panel.axes.yaxis.get_major_formatter().format_ticks([*panel.axes.get_yticks()]) for panel in panels]
    left = 0.36 + SIGN * max(len(line) for texts in ticks for text in texts for line in text.splitlines())
    inner = width / across - left - BESIDE
    found = put(figure, [panel.labels for panel in panels], (inner, height))
    pairs = [pair for panel, has in zip(panels, found, strict=True) for pair in zip(panel.points, has, strict=True)]
    unlabelled = {point.name for point, has_label in pairs if not has_label}
    below = BELOW + _legend(figure, [handle for name, handle in handles.items() if name in unlabelled])
    title = 0.08 + LINE * max(panel.axes.get_title().count("\n") + 1 for panel in panels)
    above = title + 0.1 + 0.115 * (figure.get_suptitle().count("\n") + 1)
    whole = above + down * height + (down - 1) * (title + 0.3) + below
    figure.set_figheight(whole)
    figure.suptitle(figure.get_suptitle(), y=1 - 0.06 / whole, fontsize=6, color=GREY)
    figure.subplots_adjust(
        left=left / width,
        right=1 - BESIDE / width,
        wspace=(left + BESIDE) / inner,
        bottom=below / whole,
        top=1 - above / whole,
        hspace=(title + 0.3) / height,
    )


def _legend(figure: Figure, handles: Sequence[Line2D]) -> float:
    """A legend of the entries, if any. Returns its height in inches."""
    if not handles:
        return 0.0
    legend, canvas = legend_below(figure, handles, "lower center"), figure.canvas
    fonts.settle(figure)
    assert isinstance(canvas, FigureCanvasAgg)
    return float(legend.get_window_extent(canvas.get_renderer()).height / figure.dpi)
