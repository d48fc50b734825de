"""From records to tables, pictures and a page; `frame` gives the runs to pandas."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from harness.record.record import RunRecord
    from harness.report.board.labels import Naming


def frame(records: Iterable[RunRecord], naming: Naming | None = None) -> pd.DataFrame:
    """The runs as a DataFrame, a row each: `frame(RecordStore(Path("results")).records())`. Columns and `naming`: see
    `harness.report.board.frame.to_frame`."""
    from harness.report.board.frame import to_frame

    return to_frame(records, naming)
