"""How methods, tasks and values are written on the command line and in a sweep file: "debora[tau=8]", "text:PATH"."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.errors import InputError, plain
from harness.parameters import LONGEST_PATH, from_toml

MOST_ENTRIES = 3  # of a table that a label spells out

OWN_DATA = re.compile(r"\s*[\w.-]+:")  # what begins a task that is called with a path
WRITE = 'write name[parameter=value,parameter=value], and a path with brackets in double quotes: text:"PATH"'
QUOTED = re.compile(r'(\s*[\w.-]+:)"([^"]*)"')


def split_list(text: str) -> list[str]:
    """The parts of a comma-separated list: "a,b[x=1,y=2]" -> ["a", "b[x=1,y=2]"]. Commas inside brackets
    are left alone, and all signs inside double quotes."""
    return _split(text, lambda begin: begin)


def split_tasks(text: str) -> list[str]:
    """`split_list`, in which the path of "text:PATH" may hold commas and brackets: it is the longest part of the text
    that is there, or what stands in double quotes."""
    return _split(text, lambda begin: _end_of_path(text, begin))


def _split(text: str, skipped: Callable[[int], int]) -> list[str]:
    """`skipped`: where the signs of a part that begins there begin to mean something."""
    parts, begin, depth, quoted = [], 0, 0, False
    place = skipped(begin)
    while place < len(text) and depth >= 0:
        character = text[place]
        quoted ^= character == '"'
        if not quoted:
            depth += (character in "[{(") - (character in "]})")
        place += 1
        if character == "," and depth == 0 and not quoted:
            parts.append(text[begin : place - 1])
            begin, place = place, skipped(place)
    if depth != 0:
        raise InputError(f"'{text}' has an unbalanced bracket; {WRITE}", text)
    return [part.strip() for part in [*parts, text[begin:]] if part.strip()]


def parse_value(text: str) -> Any:
    """A value as TOML reads it (8, 0.5, true, ["query", "value"], "text"); null is none, another bare word a string.

    Raises InputError for a number, list or table of absurd size.
    """
    if text == "null":
        return None
    try:
        values = from_toml(f"value = {text}", f"'{text}'")
    except tomllib.TOMLDecodeError:
        return text
    return values["value"] if len(values) == 1 else text  # another line of it would be lost


def parse_choice(text: str) -> tuple[str, dict[str, Any]]:
    """A name and its parameters: "debora[tau=8,rank=4]" -> ("debora", {"tau": 8, "rank": 4}). Of "text:PATH" the path
    is the longest part that is there, or what stands in double quotes."""
    end = _end_of_path(text, 0)
    start, bracket, given = text[end:].partition("[")
    quoted = QUOTED.fullmatch(text[:end])
    name = (quoted[1] + quoted[2] if quoted else text[:end]) + start
    if not bracket:
        return name, {}
    if not given.endswith("]") or not name:
        raise InputError(f"'{text}' cannot be read; {WRITE}", text)
    parameters: dict[str, Any] = {}
    for part in split_list(given[:-1]):
        key, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"'{part}' in '{text}' has no value; write name[parameter=value]", text)
        if key.strip() in parameters:
            raise InputError(f"parameter '{key.strip()}' is given twice in '{text}'", text)
        parameters[key.strip()] = parse_value(value.strip())
    return name, parameters


def _end_of_path(text: str, begin: int) -> int:
    """Where the path of "text:PATH" ends that begins there, if it is in quotes or there; else `begin`."""
    if quoted := QUOTED.match(text, begin):
        return quoted.end()
    family = OWN_DATA.match(text, begin)
    if family is None:
        return begin
    longest = text[: family.end() + LONGEST_PATH]
    ends = [found.start() for found in re.compile(r"[,\[]").finditer(longest, family.end())]
    for end in [len(longest), *reversed(ends)]:
        if _is_there(longest[family.end() : end].strip()):
            return end
    return begin


def _is_there(path: str) -> bool:
    try:
        return bool(path) and Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # no path that a system can have
        return False


def label(name: str, parameters: dict[str, Any]) -> str:
    """A method or task with some of its parameters, as the command line takes it: "debora[tau=8,rank=4]"."""
    values = ",".join(f"{key}={value_text(value)}" for key, value in parameters.items())
    return f"{name}[{values}]" if values else name


def value_text(value: Any) -> str:
    """A parameter's value as TOML writes it, as short as it can be without a change; of a large table only its size."""
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    if isinstance(value, dict) and len(value) > MOST_ENTRIES:
        return f"{{{len(value)} entries}}"
    return plain(value) if isinstance(value, str) else json.dumps(value, separators=(",", "="))


def duration(seconds: float) -> str:
    """12 s, 3.1 min, 5.2 h, 4.0 days."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
