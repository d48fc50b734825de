"""Learning-rate sensitivity: the score on the holdout against the learning rate, from the trials of searches."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from harness.report.figures import PANELS_ACROSS, STYLE, Style, folded, panels, plain, styles
from harness.report.leaderboard import Board

PARAMETER = "learning_rate"


def draw(board: Board, trials: pd.DataFrame) -> Figure | None:
    """A panel for each of the board's tasks with trials; a point for each trial, larger and outlined for the best of a
    method, a cross below where a trial gave no score. `trials`: rows of `trials_frame` of the board's setting.

    None where no learning rate was searched for.
    """
    if trials.empty:
        return None
    found = trials[trials["parameter"] == PARAMETER].assign(value=lambda rows: rows["value"].astype(float))
    columns = [column for column in board.columns if (found["column"] == column.title).any()]
    if not columns:
        return None
    names = styles(map(folded, found["label"]))
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", markersize=4, label=name)
        for name, (colour, marker) in names.items()
    ]
    across = min(PANELS_ACROSS, len(columns))
    caption = (
        f"{board.caption} Trials of the search, each scored once on the holdout; lines by rising learning rate, "
        "whatever else the search varied; large: the best; x: no score."
    )
    with rc_context(STYLE):
        figure, axes = panels(math.ceil(len(columns) / across), across, caption, handles)
        flat = [panel for row in axes for panel in row]
        for panel, column in zip(flat, columns, strict=False):
            of_task = found[found["column"] == column.title]
            for label, of_label in of_task.groupby("label"):
                _draw(panel, of_label.sort_values("value"), names[folded(str(label))], column.higher_is_better)
            panel.set_title(column.title, fontsize=8)
            panel.set_xscale("log")
            panel.set_xlabel("learning rate")
            panel.set_ylabel(f"holdout {column.metric}".replace("_", " "))
            panel.margins(y=0.12)
            plain(panel)
        for panel in flat[len(columns) :]:
            panel.set_visible(False)
    return figure


def _draw(panel: Axes, trials: pd.DataFrame, style: Style, higher_is_better: bool) -> None:
    """One method's trials, by rising learning rate."""
    colour, marker = style
    scores = trials.set_index("value")["holdout"].astype(float)
    for value in scores[scores.isna()].index:
        panel.plot([value], [0.02], "x", color=colour, markersize=4, transform=panel.get_xaxis_transform())
    scores = scores.dropna()
    panel.plot(scores.index, scores, marker=marker, color=colour, linewidth=0.8, markersize=3)
    if len(scores):
        best = scores.argmax() if higher_is_better else scores.argmin()
        place = [scores.index[best]], [scores.iloc[best]]
        panel.plot(*place, marker=marker, color=colour, markersize=7, markeredgecolor="black", markeredgewidth=0.8)
