"""What can go wrong in a way that the program has an answer for."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable

MOST_LISTED = 40  # names of what there is, in one line
LONGEST_WORD, LONGEST_LINE = 200, 1500  # characters of a message that are shown


class InputError(ValueError):
    """A wrong option, file or value. The command line prints it as one line and exits with code 2.

    The message names what was given, what is allowed and, where there is one, the nearest match. `mention` is the
    piece of the user's own text that is wrong, so that a mistake in a file can be told with its line.
    """

    def __init__(self, message: str, mention: str | None = None) -> None:
        super().__init__(one_line(message))
        self.mention = mention


class Diverged(ArithmeticError):
    """A non-finite value in a run: it is recorded as diverged, and the sweep goes on."""


def plain(text: str) -> str:
    """Text as it can be shown anywhere: signs that steer a terminal or turn the order of writing are escaped."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(sign: str) -> str:
    joiners = "\u200c\u200d"  # which some scripts need within words
    if sign.isprintable() or sign in joiners or unicodedata.category(sign) == "Zs":
        return sign
    return sign.encode("unicode_escape").decode()


def one_line(message: str) -> str:
    """A message of one line, whatever a user's text in it is: `plain`, and long values and long messages cut in the
    middle."""
    message = re.sub(rf"\S{{{LONGEST_WORD + 1},}}", lambda word: _cut(word[0], LONGEST_WORD), plain(message))
    return _cut(message, LONGEST_LINE)


def _cut(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    end = longest // 3
    return f"{text[: longest - end - 30]}... ({len(text):,} characters) ...{text[-end:]}"


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not among `known`: says the nearest match and what there is.

    `kind` is the thing's noun ("method", "parameter of lora").
    """
    names = sorted(known)
    listed = names if len(names) <= MOST_LISTED else [*names[:MOST_LISTED], f"and {len(names) - MOST_LISTED} more"]
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5) if len(name) <= LONGEST_WORD else []
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    return InputError(f"unknown {kind} '{name}'.{hint} Available: {', '.join(listed) or 'none'}.", mention=name)
