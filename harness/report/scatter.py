"""Score against adapter parameters, one panel per task, with sweeps as curves and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from harness.report.budget import pareto_front, varied
from harness.report.figures import PANELS_ACROSS, STYLE, Style, folded, log_ticks, panels_for, plain, styles, tick_text
from harness.report.leaderboard import Board
from harness.report.statistics import summarize

MOST_LABELS = 16  # above this the legend names methods, and a method's configurations share a colour
FRONT = "#555555"


def draw(frame: pd.DataFrame, board: Board) -> Figure | None:
    """One setting's runs (rows of `to_frame`); None where no run has both a score and a parameter count."""
    runs = frame[frame["score"].notna() & frame["parameters_final"].notna()]
    if runs.empty:
        return None
    columns = [column for column in board.columns if (runs["column"] == column.title).any()]
    labels = dict(zip(runs["label"], runs["method"], strict=True))
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
            of_task = runs[runs["column"] == column.title]
            _draw(panel, of_task, by_name, names)
            _connect(panel, of_task, by_name, names)
            _front(panel, of_task, column.higher_is_better)
            panel.set_title(column.title, fontsize=8)
            panel.set_ylabel(column.metric.replace("_", " "))
            _scale(panel, runs["parameters_final"])
        for panel in axes[-PANELS_ACROSS:]:  # the lowest of each column
            panel.set_xlabel("adapter parameters")
    return figure


def _draw(panel: Axes, runs: pd.DataFrame, styles: Mapping[str, Style], names: Mapping[str, str]) -> None:
    """One task: a small mark for each run, a large one with its spread for each configuration."""
    for name, of_name in runs.groupby(runs["label"].map(names)):  # few calls: matplotlib takes milliseconds for each
        colour, marker = styles[str(name)]
        parameters, scores = of_name["parameters_final"], of_name["score"]
        panel.plot(parameters, scores, marker, color=colour, markersize=3, alpha=0.45, markeredgewidth=0, zorder=2)
        configurations = [group for _, group in of_name.groupby("label")]
        summaries = [summarize(group["score"]) for group in configurations]
        panel.errorbar(
            [group["parameters_final"].mean() for group in configurations],
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
    low, high = runs["score"].min(), runs["score"].max()
    margin = 0.6 * max(high - low, 0.01)
    bottom, top = panel.get_ylim()  # intervals of two seeds are long: the scores must stay readable beside them
    panel.set_ylim(max(bottom, low - margin), min(top, high + margin))


def _connect(panel: Axes, runs: pd.DataFrame, styles: Mapping[str, Style], names: Mapping[str, str]) -> None:
    """A line through the configurations of each sweep, in the order of the parameter."""
    means = runs.groupby("label")[["parameters_final", "score"]].mean()
    unique = runs.drop_duplicates("label")
    for sweep in varied({str(name): value for name, value in run.items()} for run in unique.to_dict("records")):
        points = means.loc[[label for _, label in sweep.values]]
        colour = styles[names[sweep.values[0][1]]][0]
        panel.plot(points["parameters_final"], points["score"], color=colour, linewidth=0.9, alpha=0.7, zorder=1)


def _front(panel: Axes, runs: pd.DataFrame, higher_is_better: bool) -> None:
    means = runs.groupby("label")[["parameters_final", "score"]].mean()
    front = pareto_front(list(means.itertuples(index=False, name=None)), higher_is_better)
    if len(front) > 1:
        x, y = zip(*front, strict=True)
        panel.step(x, y, where="post", color=FRONT, linewidth=0.8, linestyle="--", zorder=1)


def _scale(panel: Axes, parameters: pd.Series[float]) -> None:
    """A logarithmic axis; linear from 0 to the decade of the smallest count where a method has no parameters."""
    positive = parameters[parameters > 0]
    if positive.empty:
        panel.set_xticks([0], ["0"])
        return
    low, high = float(positive.min()), float(positive.max())
    if (parameters == 0).any():
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
