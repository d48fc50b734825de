"""Pictures over layers: the rank of each as a heat map, and singular values of kept adapters."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

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
from harness.report.pictures.histories import MOST_ROWS, excerpt

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
            ranks = [] if cell is None else [records[run.run_id].ranks for run in cell.scored]
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


def singular_values(board: Board, store: RecordStore) -> Figure | None:
    """Singular values of the update B A of each layer, from kept adapters (`--save-adapter`), a panel for each of the
    board's first rows: its first run with an adapter. None where no run kept a low-rank one."""
    found = {}
    for row in board.rows[:MOST_ROWS]:
        runs = (run for cell in row.cells.values() for run in cell.scored)
        tried = (spectrum(store.folder(run.run_id) / "adapter") for run in runs)
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


def spectrum(folder: Path) -> dict[str, np.ndarray]:
    """Singular values of scaling x B A by layer, (rank,), from a stock LoRA adapter's folder.

    {} without one, for one in a precision that NumPy does not know, and for one that is damaged.
    """
    from safetensors.numpy import load_file

    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if not (weights.is_file() and settings.is_file()):
        return {}
    try:
        with np.errstate(all="ignore"):
            found = _spectra(load_file(weights), json.loads(settings.read_bytes()))
    except Exception:  # a picture is not worth a report: whatever other content makes the readers and NumPy raise
        return {}
    return found if all(np.isfinite(values).all() for values in found.values()) else {}


def _spectra(tensors: Mapping[str, np.ndarray], config: Mapping[str, object]) -> dict[str, np.ndarray]:
    """As `spectrum`. Raises an error of any kind for what is no stock LoRA adapter."""
    found = {}
    for name, down in tensors.items():
        if ".lora_A." in name:
            up = tensors[name.replace(".lora_A.", ".lora_B.")]
            if not all(matrix.ndim >= 2 and matrix.dtype.kind == "f" for matrix in (up, down)):
                raise TypeError(f"{name} and its counterpart are no matrices of numbers")
            layer = name.split(".lora_A.")[0].removeprefix("base_model.model.")
            B, A = up.reshape(up.shape[0], -1), down.reshape(down.shape[0], -1)
            found[layer] = _scaling(layer, len(A), config) * _product_singular_values(B, A)
    return found


def _product_singular_values(B: np.ndarray, A: np.ndarray) -> np.ndarray:
    """Of B A, with B (m, r) and A (r, n), without the product: those of R_B R_A^T of two thin QR factorisations."""
    triangles = [np.asarray(np.linalg.qr(matrix.astype(np.float64), mode="r")) for matrix in (B, A.T)]
    return np.linalg.svd(triangles[0] @ triangles[1].T, compute_uv=False)


def _scaling(layer: str, rank: int, config: Mapping[str, object]) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA; patterns are matched as PEFT does, at the end of the name."""
    alpha = config.get("lora_alpha", rank)
    patterns = config.get("alpha_pattern")
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = value
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or alpha < 0:
        raise ValueError(f"alpha = {alpha!r} of layer {layer} is no scale")
    root = config.get("use_rslora", False)
    if not isinstance(root, bool):
        raise TypeError(f"use_rslora = {root!r} is neither true nor false")
    return float(alpha) / (rank**0.5 if root else rank)
