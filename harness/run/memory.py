"""Peak memory of one run of several in a process."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch


class PeakMemory:
    """Measures from its making on. On a GPU: allocated bytes at their peak. On Linux's CPUs: how far resident memory
    rose above what the process held at the start, freed memory given back first. Elsewhere it is not known."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = 0
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif sys.platform == "linux":
            _give_back()
            self._before = _resident("VmRSS:")
            try:
                Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            except OSError:
                self._before = -1  # the peak would be that of the whole process

    def bytes(self) -> int | None:
        """The peak so far; None where it cannot be measured."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if sys.platform != "linux" or self._before < 0:
            return None
        return max(0, _resident("VmHWM:") - self._before)


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


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
