"""Scores over a number: the learning rate of a search's trials, the rank that a trained adapter is cut to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from harness.record.record import RunRecord
from harness.report.board.leaderboard import Board
from harness.report.board.rows import Column
from harness.report.pictures.figures import STYLE, Style, line_handles, log_ticks, panels_for, plain, styles
from harness.report.pictures.histories import MOST_COLUMNS, MOST_ROWS, excerpt
from harness.report.tables.rank_curves import Curves, curves_of
from harness.report.tables.trials import LEARNING_RATE

ASIDE = 0.06  # octaves between the bars of two curves


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


def rank_curves(board: Board, records: Mapping[str, RunRecord]) -> Figure | None:
    """Scores of trained adapters cut to several ranks, of the board's first rows, a panel for each of its first tasks;
    None where no run has any."""
    rows, tasks = {row.label for row in board.rows[:MOST_ROWS]}, board.columns[:MOST_COLUMNS]
    found = [each for each in curves_of(board, records) if each.label in rows and each.column in tasks]
    columns = [column for column in board.columns if any(each.column == column for each in found)]
    if not columns:
        return None
    names = styles(row.label for row in board.rows)
    caption = (
        f"{board.caption} Each trained adapter cut to at most this rank a layer, without further training; mean over "
        f"seeds, bars: 95 % interval.{excerpt(board)}"
    )
    with rc_context(STYLE):
        figure, axes = panels_for(len(columns), caption, line_handles(names, (each.label for each in found)))
        for panel, column in zip(axes, columns, strict=True):
            of_task = [each for each in found if each.column == column]
            for place, each in enumerate(of_task):
                _curve(panel, each, names[each.label], 2 ** (ASIDE * (place - (len(of_task) - 1) / 2)))
            _log(panel, sorted({rank for each in of_task for rank in each.ranks}))
            _finish(panel, column, "rank kept in each layer", column.metric)
    return figure


def _curve(panel: Axes, each: Curves, style: Style, aside: float) -> None:
    """One configuration, its points moved by the factor `aside`, so that bars at one rank stand beside each other."""
    colour, marker = style
    summaries = [each.at(rank) for rank in each.ranks]
    panel.errorbar(
        [aside * rank for rank in each.ranks],
        [summary.mean or 0.0 for summary in summaries],
        yerr=[summary.half_width or float("nan") for summary in summaries],  # no bar for one run
        color=colour,
        marker=marker,
        markersize=4,
        linewidth=1.1,
        elinewidth=0.7,
        capsize=2,
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
