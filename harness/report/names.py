"""Names of any length and script: in lines, and as numbers with a key where a font or LaTeX cannot set them."""

from __future__ import annotations

import re
import unicodedata

import regex


def lines_of(name: str, width: int) -> list[str]:
    """The name in lines of at most `width` signs, broken after spaces, underscores and the like where it can be."""
    lines = [""]
    for part in re.findall(r"[^\s_/,:.-]*[\s_/,:.-]?", name):
        for piece in [part[at : at + width] for at in range(0, len(part), width)]:
            if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
                lines.append("")
            lines[-1] += piece
    return [line.strip() for line in lines]


class StandIns:
    """Puts "[1]", "[2]" ... in the place of runs of signs that cannot be set; equal runs get equal numbers.

    `signs`: a pattern of one such sign. Marks on it, and spaces between two of them, go with it.
    """

    def __init__(self, signs: str) -> None:
        run = rf"(?:{signs}[\p{{M}}\p{{Cf}}]*)+"
        self._runs = regex.compile(rf"{run}(?: {run})*")
        self._numbers: dict[str, int] = {}

    def put(self, text: str, form: str = "[{}]") -> str:
        """The text with every run replaced by its number in this form."""
        return str(self._runs.sub(lambda run: form.format(self._numbers.setdefault(run[0], self._next)), text))

    @property
    def _next(self) -> int:
        return len(self._numbers) + 1

    @property
    def runs(self) -> list[str]:
        """What stands behind the numbers, from 1 on."""
        return list(self._numbers)

    @property
    def key(self) -> list[str]:
        """A line in ASCII for each number: the code points, of a single sign its name too."""
        return [f"[{number}]: {_spelled(run)}" for run, number in self._numbers.items()]


def _spelled(run: str) -> str:
    points = " ".join(f"U+{ord(sign):04X}" if sign != " " else "/" for sign in run)
    name = unicodedata.name(run, "") if len(run) == 1 else ""
    return f"{points} ({name.lower()})" if name else points
