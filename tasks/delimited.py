"""CSV and TSV as rows of texts, exactly as they stand in the file; which quote signs are quoting and which are text."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from harness.errors import InputError

Quoting = Literal["auto", "quoted", "plain"]
PLAIN = "quote signs are part of the texts: not all are quoting (quoting=plain)"


@dataclass(frozen=True)
class Reading:
    """The header and the rows of a file in one way of reading quote signs.

    wrong: why it does not fit the file, or None. several: (first line, number of lines) of each row that goes over
    several lines; suspicious: how many of these are made of lines that would be rows by themselves.
    """

    header: list[str]
    rows: list[list[str]]
    wrong: str | None = None
    several: tuple[tuple[int, int], ...] = ()
    suspicious: int = 0

    @property
    def swallows(self) -> bool:
        """Whether most rows of several lines look like rows that an unclosed quote joined."""
        return 2 * self.suspicious > len(self.several)


def delimited(text: str, delimiter: str, quoting: Quoting, name: str) -> tuple[list[str], list[list[str]], list[str]]:
    """(header, rows, notes) of a CSV or TSV; blank lines are passed over.

    With "auto", cells are in quotes as RFC 4180 has them where the whole file fits that and no quote joins lines that
    are rows by themselves; else quote signs are part of the texts, where every line then has as many cells as the
    header. Raises InputError, with the line, where neither holds, or the asked one of "quoted" and "plain" does not.
    """
    if '"' not in text or quoting == "plain":
        return _checked(_plain(text, delimiter), name, [])
    quoted = _quoted(text, delimiter)
    if quoting == "quoted":
        return _checked(quoted, name, _of_several(quoted))
    plain = _plain(text, delimiter)
    if quoted.wrong is None and not quoted.swallows:
        taken = delimiter == "\t" and not quoted.several and quoted.rows != plain.rows
        more = ["quote signs around cells are no part of the texts (quoting=plain makes them so)"] if taken else []
        return _checked(quoted, name, [*_of_several(quoted), *more])
    if plain.wrong is None:
        return _checked(plain, name, [PLAIN])
    if quoted.wrong is None:
        first, lines = max(quoted.several, key=lambda row: row[1])
        raise InputError(
            f"{name}: lines {first} to {first + lines - 1} are one row between two quote signs, though each of them "
            "looks like a row: double or close the quote sign, or give quoting=quoted if they are one row",
            "quoting",
        )
    return _checked(quoted, name, [])


def _checked(reading: Reading, name: str, notes: list[str]) -> tuple[list[str], list[list[str]], list[str]]:
    if reading.wrong is not None:
        raise InputError(f"{name}: {reading.wrong}")
    return reading.header, reading.rows, notes


def _of_several(quoted: Reading) -> list[str]:
    if not quoted.several:
        return []
    first, longest = max(quoted.several, key=lambda row: row[1])
    lines = sum(count for _, count in quoted.several)
    return [
        f"{len(quoted.several):,} rows take {lines:,} lines, as cells in quotes hold line ends; the longest "
        f"{longest:,} lines, from line {first:,}"
    ]


def _plain(text: str, delimiter: str) -> Reading:
    """Quote signs as any other."""
    rows: list[list[str]] = []
    for number, line in enumerate(io.StringIO(text, newline=""), start=1):
        if content := line.rstrip("\r\n"):
            rows.append(content.split(delimiter))
            if len(rows[-1]) != len(rows[0]):
                return Reading(rows[0], rows[1:], _uneven(number, rows))
    return Reading(rows[0] if rows else [], rows[1:])


def _quoted(text: str, delimiter: str) -> Reading:
    """Cells in quotes as RFC 4180 has them, strictly."""
    lines = list(io.StringIO(text, newline=""))
    rows: list[list[str]] = []
    several: list[tuple[int, int]] = []
    suspicious = 0
    wrong = None
    with _long_cells():
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        before = 0
        try:
            for row in reader:
                before, first = reader.line_num, before
                if not row:
                    continue
                rows.append(row)
                if len(row) != len(rows[0]):
                    wrong = _uneven(first + 1, rows)
                    break
                if before - first > 1:
                    several.append((first + 1, before - first))
                    own = [line.rstrip("\r\n").split(delimiter) for line in lines[first:before]]
                    suspicious += all(len(cells) == len(row) for cells in own)
        except csv.Error as error:
            how = "ends within a cell that a quote sign opens" if "end of data" in str(error) else "cannot be read"
            wrong = f"the row at line {before + 1} {how}: a quote sign is not closed, or one in a cell is not doubled"
            wrong += " (quoting=plain takes quote signs as text)"
    return Reading(rows[0] if rows else [], rows[1:], wrong, tuple(several), suspicious)


def _uneven(line: int, rows: list[list[str]]) -> str:
    return f"line {line} has {len(rows[-1])} columns, the header has {len(rows[0])}"


@contextmanager
def _long_cells() -> Iterator[None]:
    """Cells of any length: Python's limit is 128 KiB."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
