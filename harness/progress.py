"""What a person sees of a sweep while it runs: one live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from harness.record import RunRecord
from harness.run import Progress
from harness.spec import RunSpec

PLAIN_EVERY_SECONDS = 20.0


class View(Protocol):
    """Told of every step and every end."""

    def step(self, progress: Progress) -> None:
        """A run got further."""

    def ended(self, record: RunRecord) -> None:
        """A run has its record."""


@contextmanager
def view(num_runs: int, console: Console) -> Iterator[View]:
    """The view that suits the console, for a sweep of `num_runs` runs still to do."""
    if console.is_terminal:
        with Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        ) as bars:
            yield _Live(num_runs, bars)
    else:
        yield _Plain(num_runs, console)


def title(spec: RunSpec) -> str:
    """A run in a few words."""
    return f"{spec.method} · {spec.task} · seed {spec.seed}"


def outcome(record: RunRecord) -> str:
    """How a run ended, in one line."""
    head = f"{title(record.spec)} [{record.run_id}]"
    if record.status != "done":
        return f"{head}: {record.status.replace('_', ' ')}: {record.error}"
    count = record.parameters.adapter_final if record.parameters else 0
    return f"{head}: {record.headline} {record.score:.4f}, {count:,} adapter numbers, {record.seconds.total:.0f} s"


class _Live:
    def __init__(self, num_runs: int, bars: Bars) -> None:
        self.bars = bars
        self.sweep = bars.add_task("sweep", total=num_runs, note="")
        self.current = bars.add_task("starting", total=None, note="")

    def step(self, progress: Progress) -> None:
        """See `View`."""
        name = title(progress.spec)
        if self.bars.tasks[self.current].description != name:
            self.bars.reset(self.current, total=progress.budget, description=name)
        self.bars.update(self.current, completed=progress.batches, note=_note(progress))

    def ended(self, record: RunRecord) -> None:
        """See `View`."""
        self.bars.console.print(outcome(record), highlight=False, markup=False)
        self.bars.advance(self.sweep)


class _Plain:
    def __init__(self, num_runs: int, console: Console) -> None:
        self.console = console
        self.num_runs = num_runs
        self.num_ended = 0
        self.last = time.monotonic()

    def step(self, progress: Progress) -> None:
        """See `View`."""
        if time.monotonic() - self.last < PLAIN_EVERY_SECONDS:
            return
        self.last = time.monotonic()
        self._print(f"{title(progress.spec)}: batch {progress.batches} of {progress.budget}, {_note(progress)}")

    def ended(self, record: RunRecord) -> None:
        """See `View`."""
        self.num_ended += 1
        self._print(f"{self.num_ended}/{self.num_runs} {outcome(record)}")

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _note(progress: Progress) -> str:
    loss = "" if progress.loss is None else f"loss {progress.loss:.3f}, "
    holdout = "" if progress.holdout is None else f"holdout {progress.holdout:.3f}, "
    return f"{loss}{holdout}{progress.adapter_numbers:,} adapter numbers"
