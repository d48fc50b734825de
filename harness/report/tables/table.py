"""A table of words and numbers beside the leaderboard, the same in every form (see `harness.report.forms.plain`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from harness.report.wording import NOTHING


class Entry(NamedTuple):
    """What stands in a cell."""

    text: str = NOTHING
    spread: str = ""  # after it, in smaller type where there is any
    mark: str = ""  # the last word
    number: float | None = None  # that the page sorts by; None: the text

    def __str__(self) -> str:
        return " ".join(part for part in (self.text, self.spread, self.mark) if part)


@dataclass(frozen=True)
class Table:
    """One setting's table. A heading is a name with what it is of, ("digits", "accuracy"), the second may be ""."""

    key: str  # of the setting: 8 hexadecimal digits
    title: str
    caption: str
    headings: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Entry, ...], ...]
    notes: tuple[str, ...] = ()
    left: int = 1  # how many of the first columns name a row
