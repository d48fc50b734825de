"""What was forgotten: the loss on a text sample with the trained adapter, less that of the untouched backbone."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from harness.metric import mean_of
from harness.record.record import FORGETTING, Forgetting
from harness.record.store import RecordStore
from harness.report.board.leaderboard import Board
from harness.report.board.provenance import provenance_notes
from harness.report.board.rows import Column
from harness.report.board.runs import Run
from harness.report.evidence.compare import ExampleReader, verdict_of
from harness.report.statistics import Difference, crossed, holm, paired
from harness.report.tables.table import Entry, Table
from harness.report.wording import NOTHING, score_text

RISE = mean_of(FORGETTING, lambda trained, untouched: trained - untouched, higher_is_better=False)
WORDS = {"better": "fell", "worse": "rose", "undecided": "not significantly different"}


class Forgot(NamedTuple):
    """A row's losses on a sample, means over its runs in nats per token; `of`: the sample and its windows."""

    column: Column
    label: str
    of: Forgetting
    seeds: int
    untouched: float
    trained: float
    rise: Difference | None  # over seeds and windows; None: not available
    adjusted_p: float | None = None  # Holm's, over the rows of a column and sample

    @property
    def verdict(self) -> str:
        """Whether the loss rose or fell."""
        return WORDS[verdict_of(self.rise, self.adjusted_p, -1)]


def forgotten(board: Board, store: RecordStore) -> list[Forgot]:
    """Of every row and task with such losses; a row once for each sample that its runs were measured on."""
    read = ExampleReader(store, lambda task, name: RISE)
    found: list[Forgot] = []
    for column in board.counted:
        of_column: dict[str, list[Forgot]] = defaultdict(list)
        for row in board.rows:
            cell = row.cells.get(column.title)
            for runs in _by_sample(cell.runs if cell else ()):
                of_column[_sample(runs[0]).fingerprint].append(_forgot(column, row.label, runs, read))
        found += [each for of_sample in of_column.values() for each in _corrected(of_sample)]
    return found


def _sample(run: Run) -> Forgetting:
    found = run.record.forgetting
    assert found is not None
    return found


def _by_sample(runs: Sequence[Run]) -> Iterator[list[Run]]:
    of_sample: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if run.record.forgetting is not None:
            of_sample[_sample(run).fingerprint].append(run)
    yield from of_sample.values()


def _forgot(column: Column, label: str, runs: Sequence[Run], read: ExampleReader) -> Forgot:
    rises = np.array([run.forgetting for run in runs])
    windows = [read(dataclasses.replace(run, split=FORGETTING, score=run.forgetting), column) for run in runs]
    kept = [each for each in windows if each is not None]
    return Forgot(
        column,
        label,
        _sample(runs[0]),
        len(runs),
        float(np.mean([_sample(run).untouched for run in runs])),
        float(np.mean([_sample(run).trained for run in runs])),
        crossed(np.stack(kept)) if len(kept) == len(runs) else paired(rises),
    )


def _corrected(rows: Sequence[Forgot]) -> list[Forgot]:
    adjusted = iter(holm([each.rise.p_value for each in rows if each.rise is not None]))
    return [each if each.rise is None else each._replace(adjusted_p=next(adjusted)) for each in rows]


def forgetting_frame(found: Iterable[Forgot]) -> pd.DataFrame:
    """Columns: task, method, sample, windows, tokens (of a window), seeds, untouched, trained (nats per token), rise,
    low, high (95 % interval over seeds and windows), adjusted_p."""
    rows = []
    for each in found:
        low, high = (None, None) if each.rise is None else each.rise.interval
        sample = each.of.sample, each.of.windows, each.of.tokens
        losses = each.untouched, each.trained, each.trained - each.untouched
        rows.append((each.column.title, each.label, *sample, each.seeds, *losses, low, high, each.adjusted_p))
    names = ["task", "method", "sample", "windows", "tokens", "seeds", "untouched", "trained", "rise", "low", "high"]
    return pd.DataFrame(rows, columns=[*names, "adjusted_p"])


def forgetting_table(board: Board, found: Iterable[Forgot]) -> Table:
    """The table for people."""
    rows = []
    for each in found:
        rise = each.trained - each.untouched
        interval = NOTHING if each.rise is None else f"({' to '.join(map(score_text, each.rise.interval))})"
        sample = Entry(f"{each.of.sample}, {each.of.windows} x {each.of.tokens}")
        losses = (Entry(score_text(loss), number=loss) for loss in (each.untouched, each.trained))
        change = Entry(score_text(rise), interval, each.verdict if each.rise else "", number=rise)
        rows.append((Entry(each.column.title), Entry(each.label), sample, *losses, change))
    headings = (
        ("task", ""),
        ("method", ""),
        ("sample", "windows x tokens"),
        ("untouched", "nats a token"),
        ("trained", "nats a token"),
        ("rise", "95 % interval"),
    )
    notes = (
        "untouched: the backbone before training, in the type that it is held in. trained: with the adapter. Mean loss "
        "per token over the sample's windows, then over seeds.",
        "Intervals are of seeds and windows together; p values are Holm-corrected over the rows of a task.",
        *provenance_notes(board),
    )
    return Table(board.key, "Forgetting", board.caption, headings, tuple(rows), notes, left=3)
