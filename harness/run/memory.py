"""Peak memory of one run of several in a process, and of its training apart."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path
from typing import Literal, NamedTuple

import torch

Phase = Literal["training", "other"]


class Peak(NamedTuple):
    """Bytes at a peak. reserved: by torch's allocator, what it keeps for later included; None on a CPU."""

    taken: int
    reserved: int | None = None


class PeakMemory:
    """Measures from its making on, in phases. On a GPU: allocated bytes at their peak. On Linux's CPUs: how far
    resident memory rose above what the process held at the start. Freed memory is given back before every phase.
    Elsewhere nothing is known."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._peaks: dict[Phase, Peak] = {}
        self._phase: Phase = "other"
        self._begin()
        self._before = _resident("VmRSS:") if self._reads_resident else 0

    def enter(self, phase: Phase) -> None:
        """What follows counts to this phase."""
        self._take()
        self._phase = phase
        self._begin()

    def bytes(self) -> int | None:
        """The peak so far; None where it cannot be measured."""
        self._take()
        return max((peak.taken for peak in self._peaks.values()), default=None)

    def of_training(self) -> Peak | None:
        """The peak of the training so far; None where it cannot be measured, or where none was entered."""
        self._take()
        return self._peaks.get("training")

    def _begin(self) -> None:
        gc.collect()
        self._reads_resident = False
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        elif sys.platform == "linux":
            _give_back()
            try:
                Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
                self._reads_resident = True
            except OSError:  # the peak would be that of the whole process
                pass

    def _take(self) -> None:
        """Enter the peak since the phase began."""
        if self.device.type == "cuda":
            now = Peak(torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device))
        elif self._reads_resident:
            now = Peak(max(0, _resident("VmHWM:") - self._before))
        else:
            return
        last = self._peaks.get(self._phase, now)
        reserved = None if now.reserved is None or last.reserved is None else max(now.reserved, last.reserved)
        self._peaks[self._phase] = Peak(max(now.taken, last.taken), reserved)


def _give_back() -> None:
    """Ask glibc to return freed memory, which would otherwise hide what the next run takes."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        return


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the machine or the device had no memory left."""
    text = str(error).lower()
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text or "out of memory" in text
    )
