"""Every picture of a board, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from harness.record.record import RunRecord
from harness.record.store import RecordStore
from harness.report.board.leaderboard import Board
from harness.report.pictures import critical, curves, layers, lines, scatter
from harness.report.pictures.histories import Traced


def pictures(
    board: Board,
    trials: pd.DataFrame,
    store: RecordStore,
    records: Mapping[str, RunRecord],
    found: Sequence[Traced],
) -> dict[str, Callable[[], Figure | None]]:
    """What draws each picture, by name; it gives None where the board's runs have nothing for it. `trials`
    holds the searches' trials of the board's setting, `found` its histories."""
    return {
        "score_vs_parameters": lambda: scatter.draw(board),
        "learning_rate_sensitivity": lambda: lines.learning_rates(board, trials),
        "rank_curves": lambda: lines.rank_curves(board, records),
        "learning_curves": lambda: curves.learning_curves(board, found),
        "over_time": lambda: curves.over_time(board, found),
        "rank_heat_map": lambda: layers.rank_heat_map(board, records),
        "singular_values": lambda: layers.singular_values(board, store),
        "critical_difference": lambda: critical.draw(board),
    }
