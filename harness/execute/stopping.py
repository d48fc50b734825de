"""What ends the program from outside: an interrupt, a scheduler's stop, a closed terminal or output."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from typing import Any

INTERRUPTED = 130  # exit code
STOPPED = """
stopped; finished runs are kept, and unfinished ones go on from their last checkpoint (--checkpoint-every): \
give the same command again to go on
"""


def take_signals() -> None:
    """From now on, the first signal to stop is a KeyboardInterrupt; a further one leaves at once."""
    _on_signals(_interrupt)


def told() -> int:
    """Say after an interrupt how to go on. Returns the exit code."""
    with contextlib.suppress(OSError):  # a terminal that was closed
        print(STOPPED, end="", file=sys.stderr, flush=True)
    return INTERRUPTED


def _on_signals(handler: Any) -> None:
    """A scheduler's stop and a closed terminal are interrupts; one that is ignored (nohup) stays so."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _interrupt(number: int, frame: Any) -> None:
    """The first signal: stop in order."""
    _on_signals(_leave)
    raise KeyboardInterrupt


def _leave(number: int, frame: Any) -> None:
    """A further one, while that takes too long: leave at once. What is on disk may be cut off at any moment."""
    with contextlib.suppress(OSError):
        os.write(2, STOPPED.encode())
    os._exit(INTERRUPTED)


def drop_output() -> None:
    """Print nothing any more, since nothing can be."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def open_streams() -> None:
    """Output that was closed goes nowhere, and a sign that the terminal's encoding lacks is escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
