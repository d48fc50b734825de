"""Labels beside their points, where none lies on another, on a point or outside of its panel."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

REACH = 0.07  # inches from a point's middle to its label
MARK = 0.048  # half of a point's width
APART = 0.015  # between labels
SPACING = 0.07  # less than a label's height
MOST_LINES = 3  # of a label: longer ones are left to the legend
# (across, up): where a label's box lies beside its point; 1: all of it to the right or above, -1: left or below
SIDES = np.array([(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)], dtype=float)

Size = tuple[float, float]  # inches


@dataclass(frozen=True)
class Labels:
    """Of one panel, whose limits are set. texts: in axes coordinates, the most urgent first; points: (n, 2) data
    coordinates of what they name; lines: (m, 2) each, what labels keep off where they can."""

    axes: Axes
    texts: Sequence[Text]
    points: np.ndarray
    lines: Sequence[np.ndarray]


def put(figure: Figure, panels: Sequence[Labels], size: Size) -> list[list[bool]]:
    """Give labels their places in panels of `size` inches, and remove those that have none. Whether each has one."""
    sizes, found = _sizes(figure, [text for panel in panels for text in panel.texts]), []
    for panel in panels:
        shares = panel.axes.transScale + panel.axes.transLimits  # of the axes, wherever they are
        points = shares.transform(panel.points) * size
        specks = np.concatenate([np.empty((0, 2)), *(_along(shares.transform(line) * size) for line in panel.lines)])
        corners = placed(points, [sizes[text.get_text()] for text in panel.texts], size, specks)
        for text, corner in zip(panel.texts, corners, strict=True):
            if corner is None:
                text.remove()
            else:
                text.set_position((corner[0] / size[0], corner[1] / size[1]))
        found.append([corner is not None for corner in corners])
    return found


def placed(points: np.ndarray, sizes: Sequence[Size | None], panel: Size, specks: np.ndarray) -> list[Size | None]:
    """The lower left corner of each point's label, or None where there is no room, the first points first.

    points: (n, 2), inches from the panel's lower left corner; sizes: of their labels, None for one that is too long;
    panel: its size; specks: (m, 2), what a label keeps off where it can.
    """
    boxes = np.empty((2 * len(points), 4))  # what is taken: left, bottom, right, top
    boxes[: len(points)] = np.hstack([points - MARK, points + MARK])
    taken, found = len(points), list[Size | None]()
    for point, size in zip(points, sizes, strict=True):
        corners = point + REACH * SIDES + (SIDES - 1) / 2 * (size or panel)
        tried = np.hstack([corners - APART, corners + (size or panel) + APART])
        free = (tried[:, :2] >= 0).all(axis=1) & (tried[:, 2:] <= panel).all(axis=1)
        free &= ~_meet(tried, boxes[:taken, :2], boxes[:taken, 2:]).any(axis=1)
        if not free.any():
            found.append(None)
            continue
        covered = _meet(tried, specks, specks).sum(axis=1)
        best = int(np.argmin(np.where(free, covered, len(specks) + 1)))
        boxes[taken] = tried[best]
        taken += 1
        found.append((float(corners[best, 0]), float(corners[best, 1])))
    return found


def _sizes(figure: Figure, texts: Iterable[Text]) -> Mapping[str, Size | None]:
    """(width, height) of what the texts, all of one font, say; each is measured once. None for what is too long."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer, found = canvas.get_renderer(), dict[str, Size | None]()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a box says it
        for text in texts:
            words = text.get_text()
            if words.count("\n") >= MOST_LINES:
                found[words] = None
            elif words not in found:
                box = text.get_window_extent(renderer)
                found[words] = (box.width / figure.dpi, box.height / figure.dpi)
    return found


def _along(line: np.ndarray) -> np.ndarray:
    """Points on a line through (n, 2) points in inches, so close that no label fits between them."""
    ends = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(line, axis=0)).sum(axis=1))])
    steps = np.linspace(0, ends[-1], int(min(ends[-1] / SPACING, 500)) + 1)
    return np.stack([np.interp(steps, ends, line[:, 0]), np.interp(steps, ends, line[:, 1])], axis=1)


def _meet(tried: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """(tried, others): whether two boxes overlap."""
    return np.all((tried[:, None, :2] < high) & (tried[:, None, 2:] > low), axis=2)
