"""Scores over a number: the learning rate of a search's trials, the rank that a trained adapter is cut to."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from harness.report.board.leaderboard import Board
from harness.report.board.rows import Column, Row
from harness.report.pictures.figures import STYLE, Style, line_handles, log_ticks, panels_for, plain, styles
from harness.report.pictures.histories import MOST_COLUMNS, MOST_ROWS
from harness.report.statistics import Summary
from harness.report.tables.rank_curves import TRAINED, Curves, IsLora, curves_of, trained_at
from harness.report.tables.trials import LEARNING_RATE

ASIDE = 0.06  # octaves between the bars of two curves
EXCERPT = f" The first {MOST_COLUMNS} tasks that have any."
LINE_TO_BEAT: dict[str, Any] = {"color": "#444444", "linestyle": "--", "linewidth": 1.1, "marker": "d", "markersize": 4}
LINE_TO_BEAT |= {"markerfacecolor": "white"}


def learning_rates(board: Board, trials: pd.DataFrame) -> Figure | None:
    """Learning-rate sensitivity: scores on the holdout, a panel for each of the board's tasks with trials, a point for
    each trial. `trials`: rows of `trials_frame` of the board's setting. None where no learning rate was searched for.
    """
    if trials.empty:
        return None
    found = trials[trials["parameter"] == LEARNING_RATE].astype({"value": float, "holdout": float})
    columns = [column for column in board.columns if (found["column"] == column.title).any()]
    if not columns:
        return None
    names = styles((row.label for row in board.rows), found["label"])
    caption = (
        f"{board.caption} Trials of the search, each scored once on the holdout; lines by rising learning rate, "
        "whatever else the search varied; large: the chosen setting; x: no score."
    )
    with rc_context(STYLE):
        figure, axes = panels_for(len(columns), caption, line_handles(names, found["label"]))
        for panel, column in zip(axes, columns, strict=True):
            for label, of_label in found[found["column"] == column.title].groupby("label"):
                _trials(panel, of_label.sort_values("value"), names[str(label)])
            rates = found.loc[found["column"] == column.title, "value"]
            _log(panel, log_ticks(rates.min() / 1.1, rates.max() * 1.1))
            _finish(panel, column, "learning rate", f"holdout {column.metric}")
    return figure


def _trials(panel: Axes, trials: pd.DataFrame, style: Style) -> None:
    """One method's trials, by rising learning rate."""
    colour, marker = style
    scored, lost = trials[trials["holdout"].notna()], trials[trials["holdout"].isna()]
    for value in lost["value"]:
        panel.plot([value], [0.02], "x", color=colour, markersize=4, transform=panel.get_xaxis_transform())
    panel.plot(scored["value"], scored["holdout"], marker=marker, color=colour, linewidth=0.8, markersize=3)
    chosen = scored[scored["chosen"]]
    outlined: Any = {"markersize": 7, "markeredgecolor": "black", "markeredgewidth": 0.8}
    panel.plot(chosen["value"], chosen["holdout"], marker=marker, color=colour, linestyle="", **outlined)


def rank_curves(board: Board, is_lora: IsLora) -> Figure | None:
    """Scores of trained adapters cut to several ranks, of all rows that have any, and those of LoRAs trained at these
    ranks as a line to beat; None where no run was cut. A panel for each of the board's first tasks and for every few
    rows, the panels of a task at one scale.

    Of the rows on that line only the one of the highest rank has a curve: others are on it, and flat beyond.
    """
    trained = {column: trained_at(board, column, is_lora) for column in board.tasks}
    on_line = {row.label for rows in trained.values() for row in list(rows.values())[:-1]}
    every = [each for each in curves_of(board) if each.label not in on_line]
    if not every:
        return None
    columns = [column for column in board.tasks if any(each.column == column for each in every)][:MOST_COLUMNS]
    found = [each for each in every if each.column in columns]
    labels = [row.label for row in board.rows if any(each.label == row.label for each in found)]
    groups = [labels[first : first + MOST_ROWS] for first in range(0, len(labels), MOST_ROWS)]
    names = styles(row.label for row in board.rows)
    handles = line_handles(names, labels)
    lines = {column: _between(trained[column], [each for each in found if each.column == column]) for column in columns}
    if any(lines.values()):
        handles.append(Line2D([], [], **LINE_TO_BEAT, label=TRAINED))
    caption = (
        f"{board.caption} Each trained adapter cut to at most this rank a layer, without further training; mean over "
        f"seeds, bars: 95 % interval.{'' if len(found) == len(every) else EXCERPT}"
    )
    with rc_context(STYLE):
        figure, axes = panels_for(len(groups) * len(columns), caption, handles)
        for panel, (column, group) in zip(axes, itertools.product(columns, groups), strict=True):
            of_panel = [each for each in found if each.column == column and each.label in group]
            drawn = [({rank: each.at(rank) for rank in each.ranks}, _of(names[each.label])) for each in of_panel]
            drawn += [(lines[column], LINE_TO_BEAT)] if lines[column] else []
            for place, (scores, look) in enumerate(drawn):
                _curve(panel, scores, look, 2 ** (ASIDE * (place - (len(drawn) - 1) / 2)))
            _log(panel, sorted({rank for scores, _ in drawn for rank in scores}))
            _finish(panel, column, "rank kept in each layer", column.metric)
        for place, column in enumerate(columns):
            of_task = axes[place * len(groups) : (place + 1) * len(groups)]
            lows, highs = zip(*(panel.get_ylim() for panel in of_task), strict=True)
            for number, panel in enumerate(of_task, 1):
                panel.set_ylim(min(lows), max(highs))
                if len(groups) > 1:
                    panel.set_title(f"{column.title} ({number} of {len(groups)})", fontsize=8)
    return figure


def _between(trained: Mapping[int, Row], curves: Sequence[Curves]) -> dict[int, Summary]:
    """The scores of the LoRAs trained at ranks that the curves span."""
    ranks = [rank for each in curves for rank in each.ranks]
    title = curves[0].column.title
    return {rank: row.cells[title].score for rank, row in trained.items() if min(ranks) <= rank <= max(ranks)}


def _of(style: Style) -> dict[str, Any]:
    return {"color": style[0], "marker": style[1], "markersize": 4, "linewidth": 1.1}


def _curve(panel: Axes, scores: Mapping[int, Summary], look: Mapping[str, Any], aside: float) -> None:
    """One line, its points moved by the factor `aside`, so that bars at one rank stand beside each other."""
    panel.errorbar(
        [aside * rank for rank in scores],
        [score.mean or 0.0 for score in scores.values()],
        yerr=[score.half_width or float("nan") for score in scores.values()],  # no bar for one run
        elinewidth=0.7,
        capsize=2,
        **look,
    )


def _log(panel: Axes, ticks: Sequence[float]) -> None:
    """A logarithmic axis to the right, its ticks plain numbers."""
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_locator(NullLocator())


def _finish(panel: Axes, column: Column, across: str, up: str) -> None:
    panel.set_title(column.title, fontsize=8)
    panel.set_xlabel(across)
    panel.set_ylabel(up.replace("_", " "))
    panel.margins(y=0.12)
    plain(panel)
