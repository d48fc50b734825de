"""Runs that are being carried out: who is at them, and how far they are. A file each, below `results/running/`.

The file is a claim: a second process, on this machine or another that shares the folder, leaves a claimed run alone. It
is also what the live view and `status` read. The claim of a process of this machine holds as long as the process lives,
suspended or not, and falls with it; of a process that cannot be looked up (another machine, another container) it falls
STALE_SECONDS after its last sign of life. Where two processes make one run all the same, no harm is done: both make the
same record, and the first stays.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from harness import storage
from harness.parameters import Strict
from harness.record.processes import KINDS, Owner, own, own_name, owner_of

BEAT_SECONDS = 5.0  # between signs of life
STALE_SECONDS = 90.0  # without one: the process counts as dead; a shared disk may show files a minute late
REMAINS_SECONDS = 3600.0  # after which drafts of processes that cannot be looked up count as left behind
TELL_SECONDS = 1.0  # least time between two reports of progress
SCHEMA = 2  # of a claim's file


class Progress(Strict):
    """How far a run is."""

    run_id: str
    batches: int = Field(0, ge=0, description="used of the budget")
    budget: int = Field(0, ge=0, description="0: training has not begun")
    loss: float | None = None
    holdout: float | None = Field(None, description="headline metric, last time it was taken")
    rank: int | None = Field(None, description="live rank of all adapted layers together")
    adapter_parameters: int | None = None

    @property
    def share(self) -> float:
        """Of the budget that is used, 0 to 1."""
        return self.batches / self.budget if self.budget else 0.0

    def text(self) -> str:
        """Loss, score and size, as far as they are known."""
        parts = [
            ("loss {:.3f}", self.loss),
            ("holdout {:.3f}", self.holdout),
            ("rank {}", self.rank),
            ("{:,} adapter parameters", self.adapter_parameters),
        ]
        return ", ".join(form.format(value) for form, value in parts if value is not None)


class _Claimed(Strict):
    """The content of a claim's file."""

    schema_version: Literal[2] = 2
    owner: Owner
    token: str = Field(description="of this one claim")
    sweep: str = Field(description="of the driver that the process works for")
    progress: Progress

    def text(self) -> str:
        return storage.sealed_text(self.model_dump(mode="json"))


class Claim:
    """A run that this process is at.

    Another process may have taken it over, where it could not see that this one lives: the file is then that process's,
    and is left alone.
    """

    def __init__(self, path: Path, content: _Claimed) -> None:
        self.path = path
        self.content = content
        self._told = 0.0

    @property
    def is_own(self) -> bool:
        """Whether the file is still this claim."""
        with contextlib.suppress(OSError):
            found = _read(self.path)
            return found is not None and found.token == self.content.token
        return False

    def tell(self, progress: Progress) -> None:
        """Leave word of the progress, at most once in TELL_SECONDS. A full disk is no reason to stop training."""
        if time.monotonic() - self._told < TELL_SECONDS:
            return
        self._told = time.monotonic()
        draft = self.path.with_name(own_name(self.path.stem, "told"))
        with contextlib.suppress(OSError):
            try:
                draft.write_text(self.content.model_copy(update={"progress": progress}).text())
                if self.is_own:
                    draft.replace(self.path)
            finally:
                draft.unlink(missing_ok=True)

    def beat(self, stopped: threading.Event) -> None:
        """Give signs of life until told to stop."""
        while not stopped.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                if self.is_own:
                    os.utime(self.path)


@contextlib.contextmanager
def claimed(folder: Path, run_id: str, sweep: str = "") -> Iterator[Claim | None]:
    """Hold the claim on a run; None where another process has it. Raises OSError where `folder` cannot be written.

    `sweep`: of the driver that this process works for, see `release`.
    """
    claim = _take(folder / f"{run_id}.json", sweep)
    if claim is None:
        yield None
        return
    stopped = threading.Event()
    beating = threading.Thread(target=claim.beat, args=(stopped,), daemon=True)
    beating.start()
    try:
        yield claim
    finally:
        stopped.set()
        beating.join()
        if claim.is_own:
            storage.remove(claim.path)


def progress(folder: Path, run_id: str) -> Progress | None:
    """What a live process has told of a run it is at; None where nobody is at it."""
    path = folder / f"{run_id}.json"
    with contextlib.suppress(FileNotFoundError):
        if not _is_abandoned(path):
            found = _read(path)
            return found.progress if found and found.progress.run_id == run_id else Progress(run_id=run_id)
    return None


def holder(folder: Path, run_id: str) -> str:
    """Who is at a run, in words."""
    with contextlib.suppress(OSError):
        found = _read(folder / f"{run_id}.json")
        if found is not None:
            return str(found.owner)
    return "another process"


def release(folder: Path, run_id: str, sweep: str) -> None:
    """Drop the claim of a worker of this sweep that is known to be dead, which its machine cannot tell."""
    path = folder / f"{run_id}.json"
    with contextlib.suppress(OSError):
        found = _read(path)
        if found is not None and found.sweep == sweep:
            path.unlink(missing_ok=True)


def clear_abandoned(folder: Path, subject: str = "") -> None:
    """Remove what dead processes have left (of one subject, or all): their claims and everything under their
    `own_name`. What a process that cannot be looked up has left goes when nobody has touched it for REMAINS_SECONDS."""
    for path in list(folder.glob(f"{subject}*")):
        with contextlib.suppress(OSError):
            if path.suffix == ".json":
                if _is_abandoned(path):
                    storage.remove(path)
            elif path.name.rpartition("-")[2] in KINDS and _is_left_behind(path):
                storage.remove(path)


def _is_left_behind(path: Path) -> bool:
    owner = owner_of(path.name)
    state = owner.state if owner else "unknown"
    if state != "unknown":
        return state == "dead"
    claim = path.with_name(f"{path.name.partition('-')[0]}.json")
    with contextlib.suppress(FileNotFoundError):
        if not _is_abandoned(claim):
            return False
    return _age(path) > REMAINS_SECONDS


def everything(folder: Path) -> dict[str, Progress]:
    """`progress` of every run that somebody is at, by run_id."""
    found = {path.stem: progress(folder, path.stem) for path in folder.glob("*.json")}
    return {run_id: told for run_id, told in found.items() if told is not None}


def _take(path: Path, sweep: str = "") -> Claim | None:
    """Make the claim's file; None where a live process has it."""
    content = _Claimed(owner=own(), token=uuid.uuid4().hex, sweep=sweep, progress=Progress(run_id=path.stem))
    while True:
        try:
            with path.open("x") as stream:
                stream.write(content.text())
            return Claim(path, content)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # another process was faster, or it has just ended
                if not _is_abandoned(path):
                    return None
                old = path.with_name(own_name(path.stem, "old"))
                path.rename(old)
                if not _is_abandoned(old):  # another process took it over since we looked
                    with contextlib.suppress(OSError):
                        os.link(old, path)
                storage.remove(old)


def _is_abandoned(path: Path) -> bool:
    """Whether nobody is at this run any more. Raises FileNotFoundError where its claim has gone."""
    age = _age(path)
    found = _read(path)
    state = found.owner.state if found else "unknown"
    return age > STALE_SECONDS if state == "unknown" else state == "dead"


def _age(path: Path) -> float:
    """Seconds since the last sign of life."""
    return time.time() - path.lstat().st_mtime


def _read(path: Path) -> _Claimed | None:
    """The claim; None while it is being written, and of a file that is none. Raises FileNotFoundError."""
    try:
        return _Claimed.model_validate(storage.unseal(path.read_bytes(), SCHEMA, f"claim '{path}'"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, ValidationError):
        return None
