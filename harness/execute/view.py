"""What a person sees of a sweep while it runs: one live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from harness import registry
from harness.notation import duration
from harness.record.locks import Progress
from harness.record.record import RunRecord
from harness.spec import RunSpec

PLAIN_EVERY_SECONDS = 20.0
SHOWN = 12  # running cells in the live view; of more, their number


class View:
    """Told of every step and every end, of any number of runs at a time. Here: plain lines."""

    def __init__(self, specs: Iterable[RunSpec], console: Console) -> None:
        self.console = console
        self.titles = {spec.run_id: title(spec) for spec in specs}
        self.num_ended = 0
        self.at_work: dict[str, Progress] = {}
        self.started = self._last = time.monotonic()

    def step(self, progress: Progress) -> None:
        """A run got further."""
        self.at_work[progress.run_id] = progress
        if time.monotonic() - self._last >= PLAIN_EVERY_SECONDS:
            self._last = time.monotonic()
            self.note(self.summary())
            for each in self.at_work.values():
                self.note(f"  {self.titles[each.run_id]}: batch {each.batches} of {each.budget}, {each.text()}")

    def retried(self, spec: RunSpec, reason: str, attempt: int, most: int) -> None:
        """A run failed and is resumed."""
        self.at_work.pop(spec.run_id, None)
        self.note(f"{title(spec)} [{spec.run_id}]: {reason}; resumed ({attempt} of {most})")

    def ended(self, record: RunRecord) -> None:
        """A run has its record."""
        self.at_work.pop(record.run_id, None)
        self.num_ended += 1
        self.note(f"{self.num_ended}/{len(self.titles)} {outcome(record)}")
        for line in record.notes:
            self.note(f"  {line}")

    def note(self, line: str) -> None:
        """Print a line."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def summary(self) -> str:
        """The sweep in a line: cells, and the time to go at the pace so far."""
        share = self.num_ended + sum(progress.share for progress in self.at_work.values())
        text = f"{self.num_ended} of {len(self.titles)} ended, {len(self.at_work)} running"
        if not share:
            return text
        return f"{text}, {duration((time.monotonic() - self.started) / share * (len(self.titles) - share))} to go"


class LiveView(View):
    """Bars for the sweep and each running cell, lines for what has ended."""

    def __init__(self, specs: Iterable[RunSpec], bars: Bars) -> None:
        super().__init__(specs, bars.console)
        self.bars = bars
        self.sweep = bars.add_task("sweep", total=len(self.titles), note="starting")
        self.rows: dict[str, TaskID] = {}

    def step(self, progress: Progress) -> None:
        """See `View`."""
        run_id = progress.run_id
        self.at_work[run_id] = progress
        if run_id not in self.rows and len(self.rows) < SHOWN:
            self.rows[run_id] = self.bars.add_task(self.titles[run_id], total=progress.budget, note="")
        if run_id in self.rows:
            self.bars.update(self.rows[run_id], completed=progress.batches, note=progress.text())
        self._refresh()

    def retried(self, spec: RunSpec, reason: str, attempt: int, most: int) -> None:
        """See `View`."""
        super().retried(spec, reason, attempt, most)
        self._remove(spec.run_id)

    def ended(self, record: RunRecord) -> None:
        """See `View`."""
        super().ended(record)
        self._remove(record.run_id)

    def _remove(self, run_id: str) -> None:
        if run_id in self.rows:
            self.bars.remove_task(self.rows.pop(run_id))
        self._refresh()

    def _refresh(self) -> None:
        self.bars.update(self.sweep, completed=self.num_ended, note=self.summary())


@contextmanager
def view(specs: Iterable[RunSpec], console: Console) -> Iterator[View]:
    """The view that suits the console, for runs still to do."""
    if not console.is_terminal:
        yield View(specs, console)
        return
    with Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    ) as bars:
        yield LiveView(specs, bars)


def title(spec: RunSpec) -> str:
    """A run in a few words."""
    return f"{registry.label_of(spec.method, spec.method_parameters)} · {spec.task} · seed {spec.seed}"


def outcome(record: RunRecord) -> str:
    """How a run ended, in one line."""
    head = f"{title(record.spec)} [{record.run_id}]"
    if record.status != "done":
        return f"{head}: {record.status.replace('_', ' ')}: {record.error}"
    count = record.parameters.adapter_final if record.parameters else 0
    score = record.score if record.score is not None else record.holdout[record.headline]
    where = " on the holdout" if record.spec.is_trial else ""
    return f"{head}: {record.headline} {score:.4f}{where}, {count:,} adapter parameters, {record.seconds.total:.0f} s"
