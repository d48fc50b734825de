"""Do the seeds of a method end with the same ranks? The share of components in common, beside what chance gives."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from harness.report.board.leaderboard import Board
from harness.report.board.provenance import provenance_notes
from harness.report.board.rows import Column
from harness.report.tables.table import Entry, Table

DRAWS = 4000
Alike = Callable[[str], Hashable]  # of a layer's name: equal for layers that a rank may be moved between


class Agreement(NamedTuple):
    """Share of components in common, mean over pairs of runs, in 0 to 1; what chance gives: mean and middle 95 %."""

    shared: float
    chance: float
    low: float
    high: float

    @property
    def is_beyond_chance(self) -> bool:
        """Whether the seeds share more than in the middle 95 % of chance."""
        return self.shared > self.high


class Agreed(NamedTuple):
    """How far the ranks of a row's seeds agree on a task."""

    column: Column
    label: str
    components: tuple[int, ...]  # of each seed's run, in all layers together
    found: Agreement


def module_of(layer: str) -> str:
    """A layer's name without its numbers: "encoder.layer.attention.self.query"."""
    return ".".join(part for part in layer.split(".") if not part.isdecimal())


def shapes_of(board: Board) -> Mapping[str, tuple[int, int]] | None:
    """The shape of each layer with a rank, from the board's records, which are of one model; None where it is not known
    of all, since records of older versions hold none."""
    runs = [run for row in board.rows for run in row.runs]
    shapes = {layer: shape for run in runs for layer, shape in run.record.shapes.items()}
    return shapes if all(layer in shapes for run in runs for layer in run.record.ranks) else None


def agreement(runs: Sequence[Mapping[str, int]], alike: Alike) -> Agreement:
    """Between runs, each layer -> rank: sum of min(r, r') over the mean of both sums, mean over pairs of runs.

    Chance: every run's ranks dealt anew at random among layers that are `alike`, which keeps how many components each
    run has in layers of a kind, and how unequal its ranks are. The draws are fixed. A layer that a run lacks has rank
    0. Raises ValueError for fewer than two runs.
    """
    if len(runs) < 2:
        raise ValueError(f"agreement needs two runs, and got {len(runs)}")
    groups = _groups(runs, alike)
    layers = [layer for group in groups for layer in group]
    ranks = _array(runs, layers)
    deals = _deals(len(runs), tuple(map(len, groups)))
    dealt = _shared([of_run.take(places) for of_run, places in zip(ranks, deals, strict=True)])
    low, high = np.quantile(dealt, [0.025, 0.975])
    return Agreement(float(_shared(ranks[:, None])[0]), float(np.mean(dealt)), float(low), float(high))


def shared(runs: Sequence[Mapping[str, int]]) -> float:
    """The share alone, see `agreement`."""
    layers = dict.fromkeys(layer for run in runs for layer in run)
    return float(_shared(_array(runs, layers)[:, None])[0])


def agreements(board: Board, alike: Alike | None = None) -> Iterator[Agreed]:
    """Of every row and task with ranks of two seeds, but for rows whose ranks are equal in all layers that are alike:
    they agree by what they are. `alike`: by default layers of one shape, or of one `module_of` where records do not
    hold the shapes."""
    shapes = shapes_of(board)
    alike = alike or (module_of if shapes is None else shapes.__getitem__)
    for column in board.counted:
        for row in board.rows:
            cell = row.cells.get(column.title)
            runs = [run.record.ranks for run in (cell.scored if cell else ()) if run.record.ranks]
            if len(runs) > 1 and not _fixed(runs, alike):
                sizes = tuple(sum(ranks.values()) for ranks in runs)
                yield Agreed(column, row.label, sizes, agreement(runs, alike))


def _groups(runs: Iterable[Mapping[str, int]], alike: Alike) -> list[list[str]]:
    """The layers of the runs, those that are alike together."""
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for layer in dict.fromkeys(layer for run in runs for layer in run):
        groups[alike(layer)].append(layer)
    return list(groups.values())


def _fixed(runs: Sequence[Mapping[str, int]], alike: Alike) -> bool:
    return all(len({run.get(layer, 0) for layer in group}) == 1 for group in _groups(runs, alike) for run in runs)


@functools.lru_cache(maxsize=4)  # all rows of a board have few kinds of layers, and mostly as many seeds
def _deals(num_runs: int, sizes: tuple[int, ...]) -> np.ndarray:
    """(runs, draws, layers) places: each run's layers shuffled within groups of these sizes, anew for each draw."""
    draw = np.random.default_rng(0)
    ends = list(itertools.accumulate(sizes))
    places = [np.tile(np.arange(end - size, end), (num_runs, 1)) for end, size in zip(ends, sizes, strict=True)]
    made = np.empty((num_runs, DRAWS, sum(sizes)), dtype=np.intp)
    for number in range(DRAWS):
        made[:, number] = np.hstack([draw.permuted(of_group, axis=1) for of_group in places])
    return made


def _array(runs: Sequence[Mapping[str, int]], layers: Iterable[str]) -> np.ndarray:
    """(runs, layers); whole numbers below 2^24, which float32 holds exactly and adds fastest."""
    return np.array([[run.get(layer, 0) for layer in layers] for run in runs], dtype=np.float32)


def _shared(runs: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """(deals,) shares; a run's ranks: (deals, layers). Two runs without components agree."""
    ones = np.ones(runs[0].shape[1], dtype=np.float32)
    sums = [float(run[0].sum()) for run in runs]  # the same however they are dealt
    shares = []
    for one, other in itertools.combinations(range(len(runs)), 2):
        both = sums[one] + sums[other]
        common = (np.minimum(runs[one], runs[other]) @ ones).astype(float)
        shares.append(2 * common / both if both else np.ones(len(common)))
    return np.mean(shares, axis=0)


def agreement_frame(found: Iterable[Agreed]) -> pd.DataFrame:
    """Columns: task, method, seeds, components (of each seed's run), shared, chance, chance_low, chance_high."""
    rows = []
    for each in found:
        components = " ".join(map(str, each.components))
        rows.append((each.column.title, each.label, len(each.components), components, *each.found))
    names = ["task", "method", "seeds", "components", "shared", "chance", "chance_low", "chance_high"]
    return pd.DataFrame(rows, columns=names)


def agreement_table(board: Board, found: Iterable[Agreed]) -> Table:
    """The table for people."""
    unknown = "whose names differ in numbers alone (shapes are not recorded)"
    alike = "of one shape" if shapes_of(board) else unknown
    rows = []
    for each in found:
        share = each.found
        components = Entry(", ".join(map(str, each.components)), number=float(np.mean(each.components)))
        chance = Entry(f"{share.chance:.2f}", f"({share.low:.2f} to {share.high:.2f})", number=share.chance)
        label = Entry(each.label)
        rows.append(
            (Entry(each.column.title), label, components, Entry(f"{share.shared:.2f}", number=share.shared), chance)
        )
    headings = (
        ("task", ""),
        ("method", ""),
        ("components", "of each seed"),
        ("shared", ""),
        ("by chance", "middle 95 %"),
    )
    notes = (
        "shared: components that two seeds have in common, layer by layer, as a share of those they have; mean over "
        "pairs of seeds.",
        f"by chance: each seed's ranks dealt anew at random among layers {alike}; mean and middle 95 % of {DRAWS:,} "
        "deals.",
        "Left out: rows whose ranks are the same in all such layers.",
        *provenance_notes(board),
    )
    return Table(board.key, "Agreement of seeds on ranks", board.caption, headings, tuple(rows), notes, left=2)
