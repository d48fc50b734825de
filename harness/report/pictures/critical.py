"""The critical-difference diagram (Demsar, 2006): mean ranks over tasks, and what they allow to say."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.report.board.leaderboard import Board
from harness.report.pictures.figures import PANELS_ACROSS, STYLE, WIDTHS, folded, panels
from harness.report.statistics import CONFIDENCE

LEAST_TASKS = 6
MOST_CONFIGURATIONS = 20  # that a diagram has room for


@dataclass(frozen=True)
class MeanRanks:
    """Friedman's test over tasks, and Nemenyi's critical difference of mean ranks."""

    labels: tuple[str, ...]  # best first
    ranks: tuple[float, ...]  # mean over tasks; 1 is the best
    num_tasks: int
    p_value: float  # of all configurations being alike
    critical_difference: float


def refusal(board: Board) -> str | None:
    """Why there is no diagram of this board, or None."""
    tasks = len(board.counted)
    if tasks < LEAST_TASKS:
        return f"a critical-difference diagram needs {LEAST_TASKS} tasks or more, here are {tasks}"
    whole = len(_whole(board))
    if not 3 <= whole <= MOST_CONFIGURATIONS:
        return (
            f"a critical-difference diagram is made of 3 to {MOST_CONFIGURATIONS} configurations with a score from "
            f"every run and seed on every task, here are {whole}"
        )
    return None


def mean_ranks(board: Board) -> MeanRanks:
    """The ranks of the rows that lack no score. Raises ValueError where `refusal` gives a reason."""
    from scipy.stats import friedmanchisquare, rankdata, studentized_range

    reason = refusal(board)
    if reason is not None:
        raise ValueError(reason)
    merits = _whole(board)
    labels, scores = list(merits), np.array(list(merits.values()))  # (configurations, tasks)
    ranks = np.asarray(rankdata(-scores, axis=0)).mean(axis=1)
    k, num_tasks = scores.shape
    p = float(friedmanchisquare(*scores).pvalue) if np.ptp(scores, axis=0).any() else 1.0
    quantile = float(studentized_range.ppf(CONFIDENCE, k, np.inf)) / math.sqrt(2)
    order = np.argsort(ranks, kind="stable")
    return MeanRanks(
        tuple(labels[place] for place in order),
        tuple(float(ranks[place]) for place in order),
        num_tasks,
        p,
        quantile * math.sqrt(k * (k + 1) / (6 * num_tasks)),
    )


def draw(board: Board) -> Figure | None:
    """The diagram: configurations on an axis of mean ranks, bars over those that do not differ significantly; None
    where it is refused."""
    if refusal(board) is not None:
        return None
    found = mean_ranks(board)
    caption = (
        f"{board.caption} Mean ranks over {found.num_tasks} tasks, 1 is best; Friedman p = {found.p_value:.2g}; "
        f"bars join those that differ by less than Nemenyi's critical difference of {found.critical_difference:.2f}."
    )
    groups = cliques(found)
    height = 0.5 + 0.1 * len(groups) + 0.17 * math.ceil(len(found.labels) / 2)
    with rc_context(STYLE):
        figure, [[panel]] = panels(1, 1, caption, height=height, width=WIDTHS[PANELS_ACROSS])
        _draw(panel, found, groups)
    return figure


def cliques(found: MeanRanks) -> list[tuple[int, int]]:
    """(first, last) positions of the longest stretches of ranks within the critical difference."""
    groups: list[tuple[int, int]] = []
    for first, low in enumerate(found.ranks):
        last = max(place for place, rank in enumerate(found.ranks) if rank - low <= found.critical_difference)
        if last > first and (not groups or last > groups[-1][1]):
            groups.append((first, last))
    return groups


def _draw(panel: Axes, found: MeanRanks, groups: list[tuple[int, int]]) -> None:
    k = len(found.labels)
    panel.set_xlim(0.2, k + 0.8)
    half = math.ceil(k / 2)
    lowest = -0.55 * len(groups) - 0.8 - half
    panel.set_ylim(lowest, 0.5)
    panel.spines[["left", "right", "bottom"]].set_visible(False)
    panel.xaxis.tick_top()
    panel.set_xticks(range(1, k + 1))
    panel.set_yticks([])
    for place, (first, last) in enumerate(groups):
        y = -0.45 - 0.55 * place
        panel.plot([found.ranks[first] - 0.04, found.ranks[last] + 0.04], [y, y], color="#000000", linewidth=2.5)
    for place, (label, rank) in enumerate(zip(found.labels, found.ranks, strict=True)):
        left = place < half
        level = lowest + 0.3 + (half - 1 - place if left else place - half)
        edge = 0.55 if left else k + 0.45
        panel.plot([rank, rank, edge], [0.5, level, level], color="#0072B2", linewidth=0.8)
        text = f"{folded(label, 60)} ({rank:.2f})"
        panel.text(edge, level, text, ha="right" if left else "left", va="center", fontsize=7)


def _whole(board: Board) -> dict[str, list[float]]:
    """Merits on every task, of the rows that lack no score and have every seed of each task."""
    found = {}
    for row in board.rows:
        if not all(board.is_ranked(row, column) for column in board.counted):
            continue
        cells = [row.cells.get(column.title) for column in board.counted]
        means = [cell.score.mean if cell is not None and not cell.failures else None for cell in cells]
        if None not in means:
            pairs = zip(board.counted, means, strict=True)
            found[row.label] = [column.merit(mean) for column, mean in pairs if mean is not None]
    return found
