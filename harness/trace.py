"""What a method writes into the history of its runs, declared: the report draws it and knows no method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Drawing = Literal["line", "log_line", "steps", "heat_map"]

# What the training loop writes into every row itself; the holdout's metrics are there too, under HOLDOUT + name.
OF_THE_LOOP = ("update", "batches", "loss", "learning_rate_factor", "gradient_norm")
HOLDOUT = "holdout_"


@dataclass(frozen=True)
class Trace:
    """A value that a method's `after_step` gives the history under `name`, and how it is drawn over the batches.

    name: of the value. label: what it is, in words, with a small first letter. unit: in words; "" for a plain number.
    drawing: "line"; "log_line", whose axis is logarithmic where the values span more than a decade and a half; "steps",
    for a size that holds until it changes; "heat_map", for a list with a number for each adapted layer, in the order of
    `Adaptation.ranks`; None: it is kept in the history and drawn in no picture.
    """

    name: str
    label: str
    unit: str = ""
    drawing: Drawing | None = "line"

    @property
    def title(self) -> str:
        """The label with its unit, as an axis has it."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


# Of every method that changes ranks, so that methods stand in one panel.
RANK = Trace("rank", "rank, all layers", drawing="steps")
RANKS = Trace("ranks", "rank", drawing="heat_map")
