"""Pictures over layers: the rank of each as a heat map, what changes over time, singular values of kept adapters."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from harness.record.record import RunRecord
from harness.record.store import RecordStore
from harness.report.board.leaderboard import Board
from harness.report.pictures.figures import (
    PANELS_ACROSS,
    SEQUENTIAL,
    STYLE,
    WIDTHS,
    folded,
    log_if_wide,
    panels,
    panels_for,
    plain,
)
from harness.report.pictures.histories import MOST_ROWS, Traced, excerpt
from harness.report.pictures.picture import SingularValues

MOST_MODULES = 14  # that a panel of a third of a page has room for
MOST_LINES = 40  # layers of which a panel of singular values shows each


def split_name(layer: str) -> tuple[str, str]:
    """(block, module) of a layer's qualified name: "encoder.layer.3" and "attention.self.query". A name with several
    numbers keeps its last one in the module; one without is all module."""
    parts = layer.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    if not numbers:
        return "", layer
    cut = numbers[-2] if len(numbers) > 1 else numbers[0]
    return ".".join(parts[: cut + 1]), ".".join(parts[cut + 1 :])


def rank_heat_map(board: Board, records: Mapping[str, RunRecord]) -> Figure | None:
    """Mean live rank over seeds, blocks down and modules across, a panel for each of the board's first rows on its
    first task with ranks; None where no run has any."""
    for column in board.columns:
        found = {}
        for row in board.rows[:MOST_ROWS]:
            cell = row.cells.get(column.title)
            ranks = [] if cell is None else [records[run["run_id"]].ranks for run in cell.scored]
            if any(ranks):
                found[row.label] = _table([each for each in ranks if each])
        if found:
            return _heat_map(board, column.title, found)
    return None


def _table(ranks: Sequence[Mapping[str, int]]) -> dict[tuple[str, str], float]:
    """Mean rank by (block, module)."""
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for of_run in ranks:
        for layer, rank in of_run.items():
            sums[split_name(layer)] += rank
    return {place: total / len(ranks) for place, total in sums.items()}


def _heat_map(board: Board, title: str, found: Mapping[str, Mapping[tuple[str, str], float]]) -> Figure:
    blocks = list(dict.fromkeys(block for table in found.values() for block, _ in table))
    blocks.sort(key=lambda block: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", block)])
    modules = list(dict.fromkeys(module for table in found.values() for _, module in table))
    highest = max(value for table in found.values() for value in table.values())
    caption = f"{board.caption} Live rank on {title}, mean over seeds; blank: not adapted.{excerpt(board)}"
    height = 1.3 + 0.16 * max(len(blocks), 3)
    wide = len(modules) > MOST_MODULES  # a row of its own for each panel
    across = 1 if wide else min(PANELS_ACROSS, len(found))
    with rc_context(STYLE):
        if wide:
            figure, rows = panels(len(found), 1, caption, height=height, width=WIDTHS[PANELS_ACROSS])
            axes = [panel for (panel,) in rows]
        else:
            figure, axes = panels_for(len(found), caption, height=height)
        for place, (label, table) in enumerate(found.items()):
            grid = np.full((len(blocks), len(modules)), np.nan)
            for (block, module), value in table.items():
                grid[blocks.index(block), modules.index(module)] = value
            image = axes[place].imshow(grid, cmap=SEQUENTIAL, vmin=0, vmax=max(highest, 1), aspect="auto")
            _name_axes(axes[place], _short(blocks), _short_modules(modules), first=place % across == 0)
            axes[place].set_title(folded(label, 72 // across), fontsize=7)
            if grid.size <= 120:
                _write_values(axes[place], grid, highest)
        figure.colorbar(image, ax=axes, label="live rank", fraction=0.04, pad=0.02)
    return figure


def _name_axes(panel: Axes, blocks: Sequence[str], modules: Sequence[str], first: bool) -> None:
    panel.set_xticks(range(len(modules)), modules, rotation=90, fontsize=6)
    panel.set_yticks(range(len(blocks)), blocks if first else [""] * len(blocks), fontsize=6)
    panel.tick_params(length=0)


def _write_values(panel: Axes, grid: np.ndarray, highest: float) -> None:
    known = grid[~np.isnan(grid)]
    digits = 0 if (known == known.round()).all() else 1
    for (down, across), value in np.ndenumerate(grid):
        if not np.isnan(value):
            text = f"{value:.{digits}f}"
            colour = "white" if value < 0.55 * highest else "black"
            panel.text(across, down, text, ha="center", va="center", fontsize=5, color=colour)


def _short(names: Sequence[str]) -> list[str]:
    """The names without the parts that all begin with."""
    parts = [name.split(".") for name in names]
    same = 0
    while all(len(each) > same + 1 for each in parts) and len({each[same] for each in parts}) == 1:
        same += 1
    return [".".join(each[same:]) for each in parts]


def _short_modules(names: Sequence[str]) -> list[str]:
    """The last two parts of each name, or as many more as tell it from the others."""
    for parts in range(2, 10):
        short = [".".join(name.split(".")[-parts:]) for name in names]
        if len(set(short)) == len(names):
            return short
    return list(names)


def over_time(board: Board, found: Sequence[Traced]) -> Figure | None:
    """What methods declare as a number for each layer (see `harness.trace.Trace`), layers down and batches across, a
    panel for each of the board's first rows on its first task with such values; None without any.

    One run each, its first seed; a value holds until the next one.
    """
    shown = [
        (each, trace)
        for each in found
        for trace in each.traces
        if trace.drawing == "heat_map" and len(each.histories[0].table(trace.name)[0])
    ]
    shown = [(each, trace) for each, trace in shown if each.title == shown[0][0].title][:MOST_ROWS]
    if not shown:
        return None
    title = shown[0][0].title
    caption = f"{board.caption} On {title}, the first seed of each; layers in the method's order.{excerpt(board)}"
    with rc_context(STYLE):
        figure, axes = panels_for(len(shown), caption)
        for place, (each, trace) in enumerate(shown):
            panel, history = axes[place], each.histories[0]
            batches, table = history.table(trace.name)
            edges = np.append(batches, max(history.last, batches[-1] + 1))
            layers = np.arange(table.shape[1] + 1) + 0.5
            image = panel.pcolormesh(edges, layers, table.T, vmin=min(0, table.min()), cmap=SEQUENTIAL, rasterized=True)
            panel.invert_yaxis()
            panel.yaxis.set_major_locator(MaxNLocator(integer=True))
            panel.set_title(folded(each.label, 34), fontsize=7)
            panel.set_xlabel("batches")
            panel.set_ylabel("layer")
            whole = bool((table == table.round()).all())
            figure.colorbar(image, ax=panel, label=trace.title, ticks=MaxNLocator(5, integer=whole))
    return figure


def singular_values(board: Board, store: RecordStore, of_adapter: SingularValues) -> Figure | None:
    """Singular values of the update of each layer, from kept adapters (`--save-adapter`), a panel for each of the
    board's first rows: its first run with an adapter that has any. None where no run has one.

    `of_adapter`: reads them, (method, folder) -> by layer."""
    found = {}
    for row in board.rows[:MOST_ROWS]:
        runs = (run for cell in row.cells.values() for run in cell.scored)
        tried = (of_adapter(run["method"], store.folder(run["run_id"]) / "adapter") for run in runs)
        first = next((each for each in tried if each), None)
        if first:
            found[row.label] = first
    if not found:
        return None
    caption = (
        f"{board.caption} Singular values of each layer's update, largest first, dark for the first layer; "
        f"one run each.{excerpt(board)}"
    )
    with rc_context(STYLE):
        figure, axes = panels_for(len(found), caption)
        for panel, (label, spectra) in zip(axes, found.items(), strict=True):
            _draw_spectra(panel, spectra)
            panel.set_title(folded(label, 34), fontsize=7)
    return figure


def _draw_spectra(panel: Axes, spectra: Mapping[str, np.ndarray]) -> None:
    from matplotlib import colormaps

    shown = list(spectra.values())[:MOST_LINES]
    for place, values in enumerate(shown):
        colour = colormaps[SEQUENTIAL](0.9 * place / max(1, len(shown) - 1))
        panel.plot(range(1, len(values) + 1), values, "o-", color=colour, linewidth=0.8, markersize=2)
    log_if_wide(panel, [float(value) for values in shown for value in values])
    panel.set_xlabel("component")
    panel.set_ylabel("singular value")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain(panel)
