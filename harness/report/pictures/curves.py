"""Pictures over time: learning curves; ranks, Frank-Wolfe gap and the active set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.report.board.leaderboard import Board
from harness.report.board.rows import Column
from harness.report.pictures.figures import STYLE, Style, line_handles, log_if_wide, panels, plain, styles, widths
from harness.report.pictures.histories import History, Traced, excerpt, mean_series

SMOOTH = 0.1  # share of a run over which the training loss is averaged
MARKED = 12  # points: fewer are marked, more are a line
LINES = ("-", "--", "-.", ":")
OVER_TIME = (("rank", "rank, all layers"), ("gap", "Frank-Wolfe gap"), ("active_components", "active components"))


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
                    _band(axes[1][place], each, f"holdout_{column.headline}", names[each.label], width)
            _finish(axes[0][place], "training loss")
            if holdouts:
                _finish(axes[1][place], f"holdout {column.metric}".replace("_", " "))
            axes[-1][place].set_xlabel("batches")
    return figure


def over_time(board: Board, found: Sequence[Traced]) -> Figure | None:
    """Rank, gap and size of the active set, whichever the histories have, a column for each task; None without any.

    One line for each seed; a dot where the active set changed last: from there on it counts as identified.
    """
    shown = [(name, text) for name, text in OVER_TIME if any(_has(each.histories, name) for each in found)]
    able = [each for each in found if any(_has(each.histories, name) for name, _ in shown)]
    titles = list(dict.fromkeys(each.title for each in able))
    if not titles:
        return None
    names = styles(row.label for row in board.rows)
    handles = line_handles(names, (each.label for each in able))
    caption = f"{board.caption} A line a seed; dots: the number of active components changed last.{excerpt(board)}"
    with rc_context(STYLE):
        figure, axes = panels(len(shown), len(titles), caption, handles, height=1.5)
        for down, (name, text) in enumerate(shown):
            for across, title in enumerate(titles):
                panel = axes[down][across]
                for each in able:
                    if each.title == title:
                        _lines(panel, each, name, names[each.label])
                last = [history.last for each in able if each.title == title for history in each.histories]
                panel.set_xlim(0, 1.02 * max(last))
                _finish(panel, text)
                if name == "gap":
                    log_if_wide(panel, [float(y) for line in panel.lines for y in np.asarray(line.get_ydata())])
                if down == 0:
                    panel.set_title(title, fontsize=8)
                if down == len(shown) - 1:
                    panel.set_xlabel("batches")
    return figure


def last_change(values: np.ndarray) -> int:
    """Position of the first value of the stretch of equal values at the end."""
    changes = np.flatnonzero(np.diff(values))
    return int(changes[-1]) + 1 if len(changes) else 0


def _lines(panel: Axes, each: Traced, name: str, style: Style) -> None:
    """One line for each seed. A size holds until it changes, so it reaches to the end of the run; a gap does not."""
    colour, marker = style
    for place, history in enumerate(each.histories):
        batches, values = history.series(name)
        if not len(batches):
            continue
        if name == "active_components":
            last = last_change(values)
            panel.plot(batches[last], values[last], marker, color=colour, markersize=4)
        step = "default" if name == "gap" else "steps-post"
        if step != "default":
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
    return each.title == column.title and _has(each.histories, f"holdout_{column.headline}")


def _has(histories: Sequence[History], name: str) -> bool:
    return any(name in history for history in histories)
