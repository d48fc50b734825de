"""What can go wrong in a way that the program has an answer for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_LISTED = 40  # names of what there is, in one line


class InputError(ValueError):
    """A wrong option, file or value. The command line prints it as one line and exits with code 2.

    The message names what was given, what is allowed and, where there is one, the nearest match. `mention` is the
    piece of the user's own text that is wrong, so that a mistake in a file can be told with its line.
    """

    def __init__(self, message: str, mention: str | None = None) -> None:
        super().__init__(message)
        self.mention = mention


class Diverged(ArithmeticError):
    """A non-finite value in a run: it is recorded as diverged, and the sweep goes on."""


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not among `known`: says the nearest match and what there is.

    `kind` is the thing's noun ("method", "parameter of lora").
    """
    names = sorted(known)
    listed = names if len(names) <= MOST_LISTED else [*names[:MOST_LISTED], f"and {len(names) - MOST_LISTED} more"]
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    return InputError(f"unknown {kind} '{name}'.{hint} Available: {', '.join(listed) or 'none'}.", mention=name)
