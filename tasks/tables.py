"""Tables of the user's own: CSV, TSV, JSONL and parquet, with cells as they stand in the file.

What a cell means is decided by its use, not by its looks: a column of texts is text also where it holds "01" or dates.
"""

from __future__ import annotations

import codecs
import functools
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field, field_validator

from harness.errors import InputError, unknown
from harness.parameters import Strict
from tasks.delimited import Quoting, delimited
from tasks.hub import Rows, check_columns, read_parquet

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class TableFile(Strict):
    """How the file of a table is read; parquet says this by itself."""

    encoding: str = Field("utf-8", description="of CSV, TSV and JSONL: utf-8, cp1252, latin-1, utf-16, gb18030, ...")
    quoting: Quoting = Field(
        "auto",
        description='of CSV and TSV: quoted (cells in quotes as RFC 4180), plain (" is part of the text); auto: quoted '
        "where the whole file fits that, else plain",
    )

    @field_validator("encoding")
    @classmethod
    def _known(cls, encoding: str) -> str:
        try:
            io.TextIOWrapper(io.BytesIO(), encoding)
        except (LookupError, ValueError):
            raise ValueError(
                f"'{encoding}' is no text encoding; some are utf-8, cp1252, latin-1, utf-16, gb18030"
            ) from None
        return encoding


@dataclass(frozen=True)
class OwnRows(Rows):
    """Rows of a table of the user's own.

    untyped: columns whose texts may stand for numbers or true/false, since the file has no types (CSV) or the cells are
    of several (JSONL). notes: what a person should know of how the file was read, a line each.
    """

    untyped: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.table)

    def texts(self, column: str) -> list[str]:
        """A column's cells as text: strings as they stand, numbers and dates as they are written, true and false.

        Raises InputError for empty cells and for lists, dicts or binary data.
        """
        cells = self.cells(column)
        self.check_filled(column, cells.count(None))
        return [cell for cell in cells if cell is not None]

    def cells(self, column: str) -> list[str | None]:
        """As `texts`, with None for an empty cell (NaN is one)."""
        import pyarrow as pa

        values = self.table.column(column)
        kind = values.type
        if wrong := _not_scalar(kind):
            raise InputError(
                f"{self.source}: column '{column}' holds {wrong}; one text, word or number a row is needed"
            )
        if pa.types.is_boolean(kind):
            return [None if value is None else str(value).lower() for value in values.to_pylist()]
        if pa.types.is_floating(kind):
            numbers = values.to_numpy()  # NaN where there is none
            return [None if number != number else str(number) for number in numbers]
        return [None if value is None else str(value) for value in values.to_pylist()]

    def is_words(self, column: str) -> bool:
        """Whether the file itself says that the column is of strings."""
        return column not in self.untyped and _is_string(self.table.schema.field(column).type)

    def typed_notes(self, columns: Sequence[str]) -> tuple[str, ...]:
        """Which of these columns, used as texts, are of another type in the file."""
        kinds = {column: self.table.schema.field(column).type for column in columns}
        return tuple(
            f"column '{name}' holds {kind}: read as text" for name, kind in kinds.items() if not _is_string(kind)
        )


def read_table(
    files: tuple[Path, ...], columns: Sequence[str], optional: Sequence[str] = (), options: TableFile | None = None
) -> OwnRows:
    """These columns of a table, of the `optional` ones those that are there.

    Raises InputError where it is damaged, empty, in another encoding, or lacks a column or has it twice.
    """
    # Of these two alone, so that reading is shared by tasks that differ in something else.
    options = TableFile(encoding=options.encoding, quoting=options.quoting) if options else TableFile()
    stamps = tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    wanted = tuple(dict.fromkeys([*columns, *optional]))
    found = _read(files, wanted, tuple(optional), options, stamps)
    source = f"'{files[0]}'"
    if columns and len(found.table) == 0:
        raise InputError(f"{source} has no rows", str(files[0]))
    return OwnRows(found.table, source, found.untyped, found.notes)


class _Found(NamedTuple):
    table: pa.Table
    untyped: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


@functools.lru_cache(maxsize=8)
def _read(
    files: tuple[Path, ...],
    wanted: tuple[str, ...],
    optional: tuple[str, ...],
    options: TableFile,
    stamps: tuple[tuple[int, int], ...],
) -> _Found:
    """Kept while the files stay as they are: one command looks at its data several times."""
    suffix = files[0].suffix.lower()
    if suffix == ".parquet":
        return _Found(read_parquet(list(files), wanted, str(files[0].parent), optional))
    if suffix not in SUFFIXES:
        raise unknown(f"kind of table: '{files[0]}' ends in", suffix, SUFFIXES)
    name = f"'{files[0]}' cannot be read as {suffix}"
    text = decoded_text(files[0], options.encoding)
    if suffix == ".jsonl":
        header, cells = _json_columns(text, name)
        notes: list[str] = []
    else:
        header, rows, notes = delimited(text, DELIMITERS[suffix], options.quoting, name)
        cells = {}
    columns = _present(wanted, optional, header, f"'{files[0]}'")
    if suffix != ".jsonl":
        places = {column: header.index(column) for column in columns}
        cells = {column: [row[place] or None for row in rows] for column, place in places.items()}
        return _Found(_table(cells, name), frozenset(columns), tuple(notes))
    untyped = frozenset(column for column in columns if any(isinstance(cell, _Untyped) for cell in cells[column]))
    return _Found(_table({column: cells[column] for column in columns}, name), untyped)


def _present(wanted: Sequence[str], optional: Sequence[str], header: Sequence[str], source: str) -> list[str]:
    columns = [column for column in wanted if column in header or column not in optional]
    check_columns(columns, header, source)
    return columns


def _table(cells: dict[str, list[Any]], name: str) -> pa.Table:
    import pyarrow as pa

    arrays = {}
    for column, values in cells.items():
        nested = any(isinstance(value, (list, dict)) for value in values)
        try:
            arrays[column] = pa.array(values, None if nested else pa.large_string())
        except (pa.ArrowException, UnicodeError) as error:  # of several kinds; half of a surrogate pair
            raise InputError(f"{name}: column '{column}': {str(error).splitlines()[0]}") from None
    return pa.table(arrays)


def decoded_text(path: Path, encoding: str) -> str:
    """The text of a file, without its byte order mark. Raises InputError, with the line, for another encoding."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}", path.name) from None
    likely = "utf-16" if raw.startswith(UTF16) or b"\x00" in raw[:1000] else "cp1252"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].decode(encoding, "replace").count("\n") + 1
        raise InputError(
            f"'{path}' is not {encoding}: line {line} holds the byte 0x{raw[error.start]:02x}; give the encoding that "
            f"it was saved in, perhaps encoding={likely}, or save it as UTF-8",
            path.name,
        ) from None
    if "\x00" in text[:1000]:
        raise InputError(f"'{path}' holds NUL characters; perhaps it needs encoding={likely}", path.name)
    return text.removeprefix("\ufeff")


class _Untyped(str):
    """A JSON number, true or false, as it stands in the file."""


def _json_columns(text: str, name: str) -> tuple[list[str], dict[str, list[Any]]]:
    """The columns of a JSONL file: strings, what else is one value as it stands, lists and dicts as they are."""
    columns: dict[str, list[Any]] = {}
    count = 0
    decoder = json.JSONDecoder(
        object_pairs_hook=_once, parse_int=_Untyped, parse_float=_Untyped, parse_constant=_constant
    )
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = decoder.decode(line.strip())
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise InputError(f"{name}: line {number}: {reason}") from None
        if not isinstance(row, dict):
            raise InputError(f'{name}: line {number} is not an object, such as {{"text": "...", "label": 1}}')
        for column, cell in row.items():
            values = columns.setdefault(column, [])
            values.extend([None] * (count - len(values)))
            values.append(_Untyped(str(cell).lower()) if isinstance(cell, bool) else cell)
        count += 1
    for values in columns.values():
        values.extend([None] * (count - len(values)))
    return list(columns), columns


def _constant(name: str) -> str | None:
    return None if name == "NaN" else _Untyped(name)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"'{twice}' is given twice")
    return row


def _is_string(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _not_scalar(kind: pa.DataType) -> str | None:
    """What a type holds that is more than one value, or none."""
    import pyarrow as pa

    if pa.types.is_struct(kind) or pa.types.is_map(kind):
        return "records"
    if pa.types.is_nested(kind):
        return "lists"
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return "binary data" if any(is_kind(kind) for is_kind in binary) else None
