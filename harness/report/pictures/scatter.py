"""Score against adapter parameters, one panel per task, with sweeps as curves and the Pareto front."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from harness.report.board.leaderboard import Board
from harness.report.board.rows import over
from harness.report.board.runs import Run
from harness.report.pictures.figures import (
    PANELS_ACROSS,
    STYLE,
    Style,
    folded,
    log_ticks,
    panels_for,
    plain,
    styles,
    tick_text,
)
from harness.report.statistics import summarize
from harness.report.tables.budget import Point, pareto_front, varied

MOST_LABELS = 16  # above this the legend names methods, and a method's configurations share a colour
FRONT = "#555555"


def draw(board: Board) -> Figure | None:
    """The board's runs; None where none has both a score and a parameter count."""
    scored = [run for row in board.rows for cell in row.cells.values() for run in cell.scored]
    runs = [run for run in scored if run.parameters_final is not None]
    by_task = _grouped(runs, lambda run: run.column)
    columns = [column for column in board.columns if column.title in by_task]
    if not columns:
        return None
    labels = {run.label: run.method for column in columns for run in by_task[column.title]}
    few = len(labels) <= MOST_LABELS
    names = {label: label if few else method for label, method in labels.items()}
    by_name = styles([row.label for row in board.rows] if few else labels.values())
    handles = [_point(*by_name[name], folded(name)) for name in sorted(set(names.values()))]
    handles.append(Line2D([], [], color=FRONT, linewidth=0.8, linestyle="--", label="Pareto front"))
    caption = (
        f"{board.caption} Large: mean and 95 % interval over seeds, cut where it leaves the panel; small: single seeds."
    )
    with rc_context(STYLE):
        figure, axes = panels_for(len(columns), caption, handles)
        for panel, column in zip(axes, columns, strict=True):
            by_label = _grouped(by_task[column.title], lambda run: run.label)
            _draw(panel, by_task[column.title], by_name, names)
            _connect(panel, by_label, by_name, names)
            _front(panel, by_label, column.higher_is_better)
            panel.set_title(column.title, fontsize=8)
            panel.set_ylabel(column.metric.replace("_", " "))
            _scale(panel, [run.parameters_final or 0 for run in runs])
        for panel in axes[-PANELS_ACROSS:]:  # the lowest of each column
            panel.set_xlabel("adapter parameters")
    return figure


def _grouped(runs: Iterable[Run], name: Callable[[Run], str]) -> dict[str, list[Run]]:
    """The runs by a name, in its order."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[name(run)].append(run)
    return dict(sorted(groups.items()))


def _draw(panel: Axes, runs: Sequence[Run], styles: Mapping[str, Style], names: Mapping[str, str]) -> None:
    """One task: a small mark for each run, a large one with its spread for each configuration."""
    for name, of_name in _grouped(runs, lambda run: names[run.label]).items():
        colour, marker = styles[name]  # few calls for each: matplotlib takes milliseconds
        parameters, scores = [run.parameters_final or 0 for run in of_name], _scores(of_name)
        panel.plot(parameters, scores, marker, color=colour, markersize=3, alpha=0.45, markeredgewidth=0, zorder=2)
        configurations = _grouped(of_name, lambda run: run.label).values()
        summaries = [summarize(_scores(group)) for group in configurations]
        panel.errorbar(
            [_mean(group)[0] for group in configurations],
            [math.nan if summary.mean is None else summary.mean for summary in summaries],
            yerr=[summary.half_width or math.nan for summary in summaries],  # no bar for one run
            fmt=marker,
            color=colour,
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.6,
            elinewidth=1,
            capsize=2,
            zorder=3,
        )
    panel.margins(y=0.12)
    plain(panel)
    scores = _scores(runs)
    low, high = min(scores), max(scores)
    margin = 0.6 * max(high - low, 0.01)
    bottom, top = panel.get_ylim()  # intervals of two seeds are long: the scores must stay readable beside them
    panel.set_ylim(max(bottom, low - margin), min(top, high + margin))


def _scores(runs: Iterable[Run]) -> list[float]:
    return [run.score for run in runs if run.score is not None]


def _mean(runs: list[Run]) -> Point:
    """(adapter parameters, score)"""
    return over(runs, "parameters_final") or 0.0, over(runs, "score") or 0.0


def _connect(
    panel: Axes, by_label: Mapping[str, list[Run]], styles: Mapping[str, Style], names: Mapping[str, str]
) -> None:
    """A line through the configurations of each sweep, in the order of the parameter."""
    for sweep in varied(runs[0] for runs in by_label.values()):
        parameters, scores = zip(*(_mean(by_label[label]) for _, label in sweep.values), strict=True)
        colour = styles[names[sweep.values[0][1]]][0]
        panel.plot(parameters, scores, color=colour, linewidth=0.9, alpha=0.7, zorder=1)


def _front(panel: Axes, by_label: Mapping[str, list[Run]], higher_is_better: bool) -> None:
    front = pareto_front([_mean(runs) for runs in by_label.values()], higher_is_better)
    if len(front) > 1:
        x, y = zip(*front, strict=True)
        panel.step(x, y, where="post", color=FRONT, linewidth=0.8, linestyle="--", zorder=1)


def _scale(panel: Axes, parameters: Sequence[float]) -> None:
    """A logarithmic axis; linear from 0 to the decade of the smallest count where a method has no parameters."""
    positive = [count for count in parameters if count > 0]
    if not positive:
        panel.set_xticks([0], ["0"])
        return
    low, high = float(min(positive)), float(max(positive))
    if len(positive) < len(parameters):
        start = 10.0 ** math.floor(math.log10(low))
        panel.set_xscale("symlog", linthresh=start, linscale=0.5)
        panel.set_xlim(-0.4 * start, high * 2.5)
        ticks = [0.0, *log_ticks(start, high * 2.5)]
    else:
        panel.set_xscale("log")
        panel.set_xlim(low / 1.6, high * 1.6)
        ticks = log_ticks(low / 1.6, high * 1.6)
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(tick_text))


def _point(colour: str, marker: str, name: str) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, linestyle="", markersize=5, label=name)
