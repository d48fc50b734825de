"""Pictures over time: learning curves, and what methods report of themselves."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.report.board.leaderboard import Board
from harness.report.board.rows import Column
from harness.report.pictures.figures import (
    PANELS_ACROSS,
    STYLE,
    Style,
    line_handles,
    log_if_wide,
    panels,
    panels_for,
    plain,
    styles,
    widths,
)
from harness.report.pictures.histories import History, Traced, excerpt, mean_series
from harness.trace import HOLDOUT, Trace

SMOOTH = 0.1  # share of a run over which the training loss is averaged
MARKED = 12  # points: fewer are marked, more are a line
LINES = ("-", "--", "-.", ":")
DRAWN = ("line", "log_line", "steps")
MOST_TRACES = 8  # panels of a task


def learning_curves(board: Board, found: Sequence[Traced]) -> Figure | None:
    """Training loss above, the headline metric on the holdout below, a column for each task. None without histories."""
    columns = [column for column in board.columns if any(each.title == column.title for each in found)]
    if not columns:
        return None
    names = styles(row.label for row in board.rows)
    handles = line_handles(names, (each.label for each in found))
    holdouts = any(_holdout(each, column) for column in columns for each in found)
    caption = f"{board.caption} Lines: mean over seeds, the loss smoothed; shade: the seeds' range.{excerpt(board)}"
    with rc_context(STYLE):
        figure, axes = panels(1 + holdouts, len(columns), caption, handles, height=1.8)
        for place, column in enumerate(columns):
            of_task = [each for each in found if each.title == column.title]
            axes[0][place].set_title(column.title, fontsize=8)
            for each, width in zip(of_task, widths(len(of_task)), strict=True):
                _band(axes[0][place], each, "loss", names[each.label], width, SMOOTH)
                if holdouts:
                    _band(axes[1][place], each, HOLDOUT + column.headline, names[each.label], width)
            _finish(axes[0][place], "training loss")
            if holdouts:
                _finish(axes[1][place], f"holdout {column.metric}".replace("_", " "))
            axes[-1][place].set_xlabel("batches")
    return figure


def over_time(board: Board, found: Sequence[Traced]) -> Figure | None:
    """What the methods declare of their histories (see `harness.trace.Trace`) and the histories have; None without any.
    Several tasks: a row of panels for each value, a column for each task. One task: up to three panels across.

    One line for each seed; a dot where a size changed last.
    """
    shown = list(dict.fromkeys(trace for each in found for trace in _drawn(each)))[:MOST_TRACES]
    able = [each for each in found if any(trace in shown for trace in _drawn(each))]
    titles = list(dict.fromkeys(each.title for each in able))
    if not titles:
        return None
    names = styles(row.label for row in board.rows)
    handles = line_handles(names, (each.label for each in able))
    of = f" On {titles[0]}." if len(titles) == 1 else ""
    caption = f"{board.caption}{of} A line a seed; dots: where a size changed last.{excerpt(board)}"
    with rc_context(STYLE):
        if len(titles) == 1:  # beside each other
            figure, flat = panels_for(len(shown), caption, handles, height=1.7)
            axes, lowest = [[panel] for panel in flat], flat[-PANELS_ACROSS:]
        else:
            figure, axes = panels(len(shown), len(titles), caption, handles, height=1.5)
            lowest = axes[-1]
            for panel, title in zip(axes[0], titles, strict=True):
                panel.set_title(title, fontsize=8)
        for row, trace in zip(axes, shown, strict=True):
            for panel, title in zip(row, titles, strict=True):
                _trace(panel, trace, [each for each in able if each.title == title], names)
        for panel in lowest:
            panel.set_xlabel("batches")
    return figure


def _drawn(each: Traced) -> list[Trace]:
    """The traces of a method that are lines and that its histories have."""
    return [trace for trace in each.traces if trace.drawing in DRAWN and _has(each.histories, trace.name)]


def _trace(panel: Axes, trace: Trace, of_task: Sequence[Traced], names: Mapping[str, Style]) -> None:
    """One panel: a value on one task."""
    for each in of_task:
        if trace in each.traces:
            _lines(panel, each, trace, names[each.label])
    panel.set_xlim(0, 1.02 * max(history.last for each in of_task for history in each.histories))
    _finish(panel, textwrap.fill(trace.title, 20))
    if trace.drawing == "log_line":
        log_if_wide(panel, [float(y) for line in panel.lines for y in np.asarray(line.get_ydata())])


def last_change(values: np.ndarray) -> int:
    """Position of the first value of the stretch of equal values at the end."""
    changes = np.flatnonzero(np.diff(values))
    return int(changes[-1]) + 1 if len(changes) else 0


def _lines(panel: Axes, each: Traced, trace: Trace, style: Style) -> None:
    """One line for each seed. A size holds until it changes, so it reaches to the end of the run; others do not."""
    colour, marker = style
    for place, history in enumerate(each.histories):
        batches, values = history.series(trace.name)
        if not len(batches):
            continue
        step = "default"
        if trace.drawing == "steps":
            last, step = last_change(values), "steps-post"
            panel.plot(batches[last], values[last], marker, color=colour, markersize=4)
            batches, values = np.append(batches, history.last), np.append(values, values[-1])
        panel.plot(batches, values, LINES[place % len(LINES)], color=colour, linewidth=0.9, drawstyle=step)


def _band(panel: Axes, each: Traced, name: str, style: Style, width: float, smooth: float = 0.0) -> None:
    batches, means, halves = mean_series(each.histories, name, smooth)
    if len(batches):
        colour, marker = style
        mark = marker if len(batches) < MARKED else None
        panel.plot(batches, means, color=colour, linewidth=width, marker=mark, markersize=3)
        panel.fill_between(batches, means - halves, means + halves, color=colour, alpha=0.18, linewidth=0)


def _finish(panel: Axes, text: str) -> None:
    panel.set_ylabel(text)
    panel.margins(x=0.02)
    plain(panel)


def _holdout(each: Traced, column: Column) -> bool:
    return each.title == column.title and _has(each.histories, HOLDOUT + column.headline)


def _has(histories: Sequence[History], name: str) -> bool:
    return any(name in history for history in histories)
