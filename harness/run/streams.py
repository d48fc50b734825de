"""A training split as streams of batches, and every seed of a run."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch

from harness.method import Indices, Stream

SORTED_BATCHES = 50  # batches whose rows are sorted by length together, where batches are grouped by length


def derived_seed(seed: int, *words: str | int) -> int:
    """A 63-bit seed for one purpose of a run, independent of the seeds for the others."""
    digest = hashlib.sha256(repr((seed, *words)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class TrainingData:
    """The training split as endless streams of batches, the same for every method at a seed.

    A stream runs through its rows in one random order after another; a batch may span two of them. With `lengths`
    (what each row costs) an order brings rows of similar length together: it is cut into stretches of 50 batches, each
    is sorted by length and cut into batches, and those come in random order.

    upper_share: share of the rows, between 0 and 1, that is the upper stream's; the lower stream has the others.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, lengths: np.ndarray | None = None, upper_share: float = 0.5
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.lengths = lengths
        self.drawn: dict[Stream, int] = {"all": 0, "lower": 0, "upper": 0}
        shuffled = np.random.default_rng(derived_seed(seed, "halves")).permutation(size)
        lower, upper = _shares(size, upper_share)
        self._rows: dict[Stream, np.ndarray] = {
            "all": np.arange(size),
            "lower": np.sort(shuffled[:lower]),
            "upper": np.sort(shuffled[lower : lower + upper]),
        }
        self._order: dict[Stream, tuple[int, np.ndarray]] = {}

    def draw(self, stream: Stream) -> Indices:
        """The stream's next batch, as positions in the training split."""
        start = self.drawn[stream] * self.batch_size
        self.drawn[stream] += 1
        rows = self._rows[stream]
        batch: list[int] = []
        while len(batch) < self.batch_size:
            passes, offset = divmod(start + len(batch), len(rows))
            order = self._pass(stream, passes)
            batch += order[offset : offset + self.batch_size - len(batch)].tolist()
        return tuple(batch)

    def _pass(self, stream: Stream, number: int) -> np.ndarray:
        cached = self._order.get(stream)
        if cached is None or cached[0] != number:
            generator = np.random.default_rng(derived_seed(self.seed, stream, number))
            order = generator.permutation(self._rows[stream])
            if self.lengths is not None:
                order = self._grouped(order, -number * len(order) % self.batch_size, generator)
            cached = self._order[stream] = (number, order)
        return cached[1]

    def _grouped(self, order: np.ndarray, begun: int, generator: np.random.Generator) -> np.ndarray:
        """The order with similar lengths together. Its first `begun` rows fill up the last batch of the pass before."""
        assert self.lengths is not None
        size, rest = self.batch_size, order[begun:]
        stretches = np.split(rest, range(SORTED_BATCHES * size, len(rest), SORTED_BATCHES * size))
        batches = []
        for rows in stretches:
            rows = rows[np.argsort(self.lengths[rows], kind="stable")]
            batches += np.split(rows, range(size, len(rows), size))
        whole = [batch for batch in batches if len(batch) == size]
        generator.shuffle(whole)
        return np.concatenate([order[:begun], *whole, *(batch for batch in batches if len(batch) < size)])


def _shares(size: int, upper_share: float) -> tuple[int, int]:
    """Rows of the lower and of the upper stream, each at least one where there are two."""
    if not 0 < upper_share < 1:
        raise ValueError(f"upper_share = {upper_share} is not between 0 and 1")
    if upper_share == 0.5:
        return size // 2, size // 2  # of an odd number of rows, one is in neither half, so that they are equal
    upper = min(max(1, round(upper_share * size)), size - 1)
    return size - upper, upper
