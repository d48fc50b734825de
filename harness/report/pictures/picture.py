"""A picture of the report: its name, its words on the page, and what draws it. Declared once, here or in a package."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.record.record import RunRecord
from harness.record.store import RecordStore
from harness.report.board.leaderboard import Board
from harness.report.pictures.histories import Traced
from harness.report.tables.rank_curves import IsLora

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.figure import Figure

SingularValues = Callable[[str, Path], Mapping[str, "np.ndarray"]]  # (method, folder of a kept adapter) -> by layer


def no_singular_values(method: str, folder: Path) -> Mapping[str, np.ndarray]:
    """Where nobody can read kept adapters."""
    return {}


def no_lora(record: RunRecord) -> bool:
    """Where nobody knows which runs train a LoRA."""
    return False


@dataclass(frozen=True)
class PictureData:
    """What a picture is drawn of: one leaderboard and what lies behind it.

    board: its runs are those of its rows. trials: those of its searches, see `trials_frame`. records: of the whole
    report, by run_id. histories: of its first rows and tasks. singular_values: of kept adapters. is_lora: of a run,
    whether it is the training of a LoRA at its ranks.
    """

    board: Board
    trials: pd.DataFrame
    store: RecordStore
    records: Mapping[str, RunRecord]
    histories: Sequence[Traced] = ()
    singular_values: SingularValues = no_singular_values
    is_lora: IsLora = no_lora


@dataclass(frozen=True)
class Picture:
    """`name`: of its files, of a-z, 0-9 and _. `title`: what it shows, on the page. `draw`: gives None where the data
    have nothing for it; use the helpers of `harness.report.pictures.figures`, so that it looks like the others.

    Raises ValueError for another name.
    """

    name: str
    title: str
    draw: Callable[[PictureData], Figure | None]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(f"'{self.name}' cannot name the files of a picture: use a-z, 0-9 and _")
