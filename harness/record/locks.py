"""Run locks: which process has a run in progress, and how far it is. A file each, below `results/running/`.

A second process, on this machine or another that shares the folder, leaves a locked run alone. The live view and
`status` read the locks too. The lock of a process of this machine holds as long as the process lives,
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
SCHEMA = 2  # of a lock's file


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


class _Content(Strict):
    """The content of a lock's file."""

    schema_version: Literal[2] = 2
    owner: Owner
    token: str = Field(description="of this one lock")
    sweep: str = Field(description="of the driver that the process works for")
    progress: Progress

    def text(self) -> str:
        return storage.sealed_text(self.model_dump(mode="json"))


class RunLock:
    """The lock on a run that this process has in progress.

    Another process may have taken it over, where it could not see that this one lives: the file is then that process's,
    and is left alone.
    """

    def __init__(self, path: Path, content: _Content) -> None:
        self.path = path
        self.content = content
        self._told = 0.0

    @property
    def is_own(self) -> bool:
        """Whether the file is still this lock."""
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
def locked(folder: Path, run_id: str, sweep: str = "") -> Iterator[RunLock | None]:
    """Hold the lock on a run; None where another process has it. Raises OSError where `folder` cannot be written.

    `sweep`: of the driver that this process works for, see `release`.
    """
    lock = _take(folder / f"{run_id}.json", sweep)
    if lock is None:
        yield None
        return
    stopped = threading.Event()
    beating = threading.Thread(target=lock.beat, args=(stopped,), daemon=True)
    beating.start()
    try:
        yield lock
    finally:
        stopped.set()
        beating.join()
        if lock.is_own:
            storage.remove(lock.path)


def progress(folder: Path, run_id: str) -> Progress | None:
    """How far a live process is with a run; None where the run is not in progress."""
    path = folder / f"{run_id}.json"
    with contextlib.suppress(FileNotFoundError):
        if not _is_abandoned(path):
            found = _read(path)
            return found.progress if found and found.progress.run_id == run_id else Progress(run_id=run_id)
    return None


def holder(folder: Path, run_id: str) -> str:
    """Which process has a run in progress, in words."""
    with contextlib.suppress(OSError):
        found = _read(folder / f"{run_id}.json")
        if found is not None:
            return str(found.owner)
    return "another process"


def release(folder: Path, run_id: str, sweep: str) -> None:
    """Drop the lock of a worker of this sweep that is known to be dead, which its machine cannot tell."""
    path = folder / f"{run_id}.json"
    with contextlib.suppress(OSError):
        found = _read(path)
        if found is not None and found.sweep == sweep:
            path.unlink(missing_ok=True)


def clear_abandoned(folder: Path, subject: str = "") -> None:
    """Remove what dead processes have left (of one subject, or all): their locks and everything under their
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
    lock = path.with_name(f"{path.name.partition('-')[0]}.json")
    with contextlib.suppress(FileNotFoundError):
        if not _is_abandoned(lock):
            return False
    return _age(path) > REMAINS_SECONDS


def everything(folder: Path) -> dict[str, Progress]:
    """`progress` of every run in progress, by run_id."""
    found = {path.stem: progress(folder, path.stem) for path in folder.glob("*.json")}
    return {run_id: told for run_id, told in found.items() if told is not None}


def _take(path: Path, sweep: str = "") -> RunLock | None:
    """Make the lock's file; None where a live process has it."""
    content = _Content(owner=own(), token=uuid.uuid4().hex, sweep=sweep, progress=Progress(run_id=path.stem))
    while True:
        try:
            with path.open("x") as stream:
                stream.write(content.text())
            return RunLock(path, content)
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
    """Whether no process has this run in progress any more. Raises FileNotFoundError where its lock has gone."""
    age = _age(path)
    found = _read(path)
    state = found.owner.state if found else "unknown"
    return age > STALE_SECONDS if state == "unknown" else state == "dead"


def _age(path: Path) -> float:
    """Seconds since the last sign of life."""
    return time.time() - path.lstat().st_mtime


def _read(path: Path) -> _Content | None:
    """The lock; None while it is being written, and of a file that is none. Raises FileNotFoundError."""
    try:
        return _Content.model_validate(storage.unseal(path.read_bytes(), SCHEMA, f"run lock '{path}'"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, ValidationError):
        return None
