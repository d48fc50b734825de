"""Runs that are being carried out: who is at them, and how far they are. A file each, below `results/running/`.

The file is a claim: a second process, on this machine or another that shares the folder, leaves a claimed run alone. It
is also what the live view and `status` read. A claim whose process has died is taken over, at once on its own machine
and after STALE_SECONDS from another. Where two processes make one run all the same, no harm is done: both make the same
record, and the first stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field, ValidationError

from harness.parameters import Parameters

BEAT_SECONDS = 5.0  # between signs of life
STALE_SECONDS = 90.0  # without one: the process counts as dead; a shared disk may show files a minute late
TELL_SECONDS = 1.0  # least time between two reports of progress

HOST = socket.gethostname().replace("-", "_")


class Progress(Parameters):
    """How far a run is."""

    run_id: str
    batches: int = Field(0, ge=0, description="used of the budget")
    budget: int = Field(0, ge=0, description="0: training has not begun")
    loss: float | None = None
    holdout: float | None = Field(None, description="headline metric, last time it was taken")
    rank: int | None = Field(None, description="live rank of all adapted layers together")
    adapter_numbers: int | None = None

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
            ("{:,} adapter numbers", self.adapter_numbers),
        ]
        return ", ".join(form.format(value) for form, value in parts if value is not None)


class _Claimed(Parameters):
    """The content of a claim's file."""

    host: str
    process: int
    progress: Progress


class Claim:
    """A run that this process is at."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._told = 0.0

    def tell(self, progress: Progress) -> None:
        """Leave word of the progress, at most once in TELL_SECONDS. A full disk is no reason to stop training."""
        if time.monotonic() - self._told < TELL_SECONDS:
            return
        self._told = time.monotonic()
        draft = self.path.with_name(own_name(self.path.stem, "told"))
        with contextlib.suppress(OSError):
            draft.write_text(_Claimed(host=HOST, process=os.getpid(), progress=progress).model_dump_json())
            draft.replace(self.path)

    def beat(self, stopped: threading.Event) -> None:
        """Give signs of life until told to stop."""
        while not stopped.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.path)


@contextlib.contextmanager
def claimed(folder: Path, run_id: str) -> Iterator[Claim | None]:
    """Hold the claim on a run; None where another process has it. Raises OSError where `folder` cannot be written."""
    path = folder / f"{run_id}.json"
    if not _take(path):
        yield None
        return
    claim, stopped = Claim(path), threading.Event()
    beating = threading.Thread(target=claim.beat, args=(stopped,), daemon=True)
    beating.start()
    try:
        yield claim
    finally:
        stopped.set()
        beating.join()
        path.unlink(missing_ok=True)


def progress(folder: Path, run_id: str) -> Progress | None:
    """What a live process has told of a run it is at; None where nobody is at it."""
    path = folder / f"{run_id}.json"
    with contextlib.suppress(FileNotFoundError):
        if not _is_abandoned(path):
            owner = _owner(path)
            return owner.progress if owner else Progress(run_id=run_id)
    return None


def release(folder: Path, run_id: str) -> None:
    """Drop the claim of a process of ours that is known to be dead, which its machine cannot tell."""
    (folder / f"{run_id}.json").unlink(missing_ok=True)


def own_name(subject: str, kind: str) -> str:
    """The name of a file or folder of this process that is of no use without it; see `clear_abandoned`."""
    return f"{subject}-{HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}-{kind}"


def clear_abandoned(folder: Path) -> None:
    """Remove what dead processes have left: their claims, and of this machine's everything under its `own_name`."""
    for path in folder.iterdir():
        parts = path.name.split("-")
        with contextlib.suppress(OSError):
            if path.suffix == ".json":
                if _is_abandoned(path):
                    path.unlink()
            elif len(parts) == 5 and parts[1] == HOST and not is_alive(int(parts[2])):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def everything(folder: Path) -> dict[str, Progress]:
    """`progress` of every run that somebody is at, by run_id."""
    found = {path.stem: progress(folder, path.stem) for path in folder.glob("*.json")}
    return {run_id: told for run_id, told in found.items() if told is not None}


def _take(path: Path) -> bool:
    """Make the claim's file; False where a live process has it."""
    mine = _Claimed(host=HOST, process=os.getpid(), progress=Progress(run_id=path.stem)).model_dump_json()
    while True:
        try:
            with path.open("x") as stream:
                stream.write(mine)
            return True
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # another process was faster, or it has just ended
                if not _is_abandoned(path):
                    return False
                old = path.with_name(own_name(path.stem, "old"))
                path.rename(old)
                if _is_abandoned(old):
                    old.unlink()
                else:  # another process took it over since we looked
                    old.rename(path)


def _is_abandoned(path: Path) -> bool:
    """Whether nobody is at this run any more. Raises FileNotFoundError where its claim has gone."""
    if time.time() - path.stat().st_mtime > STALE_SECONDS:
        return True
    owner = _owner(path)
    return owner is not None and owner.host == HOST and not is_alive(owner.process)


def _owner(path: Path) -> _Claimed | None:
    """The claim's content; None while it is being written."""
    try:
        return _Claimed.model_validate(json.loads(path.read_bytes()))
    except (ValueError, ValidationError):
        return None


def is_alive(process: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def duration(seconds: float) -> str:
    """12 s, 3.1 min, 5.2 h, 4.0 days."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
