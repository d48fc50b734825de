"""Score against adapter parameters, one panel per task. No pyplot: a picture depends on its frame alone."""

from __future__ import annotations

import math
import re
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from harness.report.leaderboard import Board
from harness.report.statistics import summarize
from harness.report.text import human

# Okabe and Ito's colour-blind-safe palette without its yellow, which is lost on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")  # 7 and 9 have no common factor: 63 different pairs
MOST_LABELS = 16  # above this the legend names methods, and a method's configurations share a colour
PANELS_ACROSS = 3
WIDTHS = {1: 3.6, 2: 5.6, 3: 6.8}  # inches, by panels across: a column or a page of a paper, so that 8 points stay 8
PANEL_HEIGHT = 2.1
SIGN_WIDTH = 0.054  # of the legend's text
STYLE: Any = {"font.family": "DejaVu Sans", "font.size": 8, "pdf.fonttype": 42, "text.parse_math": False}


def save_pictures(frame: pd.DataFrame, board: Board, png: Path, pdf: Path) -> None:
    """Draw one setting's runs (rows of `to_frame`) and write both files; the same runs give the same bytes.

    Raises ValueError where no run has a score and a parameter count: see `can_draw`.
    """
    if not can_draw(frame):
        raise ValueError("no run to draw: none has both a score and a parameter count")
    with rc_context(STYLE):
        figure = _figure(frame, board)
        figure.savefig(png, format="png", dpi=200)
        figure.savefig(pdf, format="pdf", metadata={"CreationDate": None})


def can_draw(frame: pd.DataFrame) -> bool:
    """Whether any run has both a score and a parameter count."""
    return bool((frame["score"].notna() & frame["parameters_final"].notna()).any())


def _figure(frame: pd.DataFrame, board: Board) -> Figure:
    runs = frame[frame["score"].notna() & frame["parameters_final"].notna()]
    titles = [column.title for column in board.columns if (runs["column"] == column.title).any()]
    across = min(PANELS_ACROSS, len(titles))
    down = math.ceil(len(titles) / across)
    styles, names = _styles(runs)
    handles = [_point(*styles[name], name) for name in sorted(styles)]
    legend_columns = max(1, int(WIDTHS[across] / (0.35 + SIGN_WIDTH * max(_longest_line(name) for name in styles))))
    legend_rows = math.ceil(len(handles) / legend_columns)
    height = PANEL_HEIGHT * down + 0.55 + 0.17 * legend_rows
    figure = Figure(figsize=(WIDTHS[across], height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for panel, title in zip(panels, titles, strict=False):
        metric = next(column.metric for column in board.columns if column.title == title)
        _draw(panel, runs[runs["column"] == title], styles, names)
        panel.set_title(title, fontsize=8)
        panel.set_ylabel(metric.replace("_", " "))
        _scale(panel, runs["parameters_final"])
    for panel in panels[max(0, len(titles) - across) : len(titles)]:  # the lowest of each column
        panel.set_xlabel("adapter parameters")
    for panel in panels[len(titles) :]:
        panel.set_visible(False)
    caption = f"{board.caption} Large: mean ± sample standard deviation; small: single seeds."
    figure.suptitle(textwrap.fill(caption, int(WIDTHS[across] * 20)), fontsize=6, color="#555555")
    figure.legend(
        handles=handles, loc="outside lower center", ncols=legend_columns, frameon=False, fontsize=7, handletextpad=0.1
    )
    return figure


def _styles(runs: pd.DataFrame) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """(colour, marker) by the name in the legend, and that name by label."""
    labels = dict(zip(runs["label"], runs["method"], strict=True))
    names = {label: label if len(labels) <= MOST_LABELS else method for label, method in labels.items()}
    names = {label: _folded(name) for label, name in names.items()}
    ordered = sorted(set(names.values()))
    return {
        name: (COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]) for place, name in enumerate(ordered)
    }, names


def _draw(panel: Axes, runs: pd.DataFrame, styles: dict[str, tuple[str, str]], names: dict[str, str]) -> None:
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
            yerr=[summary.standard_deviation or math.nan for summary in summaries],  # no bar for one run
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
    panel.grid(color="#dddddd", linewidth=0.5)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


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
        ticks = [0.0, *_ticks(start, high * 2.5)]
    else:
        panel.set_xscale("log")
        panel.set_xlim(low / 1.6, high * 1.6)
        ticks = _ticks(low / 1.6, high * 1.6)
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(_tick_text))


def _ticks(low: float, high: float) -> list[float]:
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


def _tick_text(value: float, _: int | None) -> str:
    """1M, 20k: the table's form without its closing zeros."""
    return re.sub(r"\.0+(?=\D)", "", human(value))


def _point(colour: str, marker: str, name: str) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, linestyle="", markersize=5, label=name)


def _folded(name: str) -> str:
    return textwrap.fill(name.replace(",", ", "), 44, break_on_hyphens=False)


def _longest_line(text: str) -> int:
    return max(len(line) for line in text.splitlines())
