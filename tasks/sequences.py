"""Sequences of token ids of unequal length: end to end on disk, padded in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Row i is values[starts[i]:starts[i + 1]]."""

    values: np.ndarray
    starts: np.ndarray

    def __getitem__(self, row: int) -> np.ndarray:
        found: np.ndarray = self.values[self.starts[row] : self.starts[row + 1]]
        return found

    @property
    def lengths(self) -> np.ndarray:
        """(rows,)"""
        import numpy as np

        return np.diff(self.starts)


def end_to_end(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(values, starts) of `Sequences`."""
    import numpy as np

    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    return np.fromiter((number for row in rows for number in row), dtype=np.int32, count=int(starts[-1])), starts


def padded(rows: Sequence[np.ndarray], filler: int, *, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(ids, which are filled), both (rows, longest); filled up on the right, or on the left."""
    import numpy as np

    lengths = np.array([len(row) for row in rows])
    places = np.arange(max(1, lengths.max()))
    filled = places >= (len(places) - lengths)[:, None] if left else places < lengths[:, None]
    ids = np.full(filled.shape, filler, dtype=np.int64)
    ids[filled] = np.concatenate(rows)  # row by row, as a mask is read
    return ids, filled


def tensor(array: np.ndarray) -> Tensor:
    """As int64."""
    import numpy as np
    import torch

    return torch.from_numpy(array.astype(np.int64))
