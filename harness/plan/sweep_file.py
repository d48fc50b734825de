"""Sweeps written in TOML: a user's `--config` file and the presets that come with the program."""

from __future__ import annotations

import json
import re
import stat
import tomllib
from pathlib import Path
from typing import Any

from harness.errors import InputError, unknown
from harness.parameters import check_size, from_toml
from harness.plan.sweep import MOST_SEEDS, Sweep
from harness.spec import Selection, TrainSpec

LARGEST = 1_000_000  # bytes of a sweep
PRESETS = Path(__file__).parent / "presets"


def presets() -> dict[str, Path]:
    """Preset files by name; one in a folder is "folder/name"."""
    return {path.relative_to(PRESETS).with_suffix("").as_posix(): path for path in sorted(PRESETS.rglob("*.toml"))}


def preset(name: str) -> Path:
    """A preset's file. Raises InputError for an unknown name."""
    known = presets()
    if name not in known:
        raise unknown("preset", name, known)
    return known[name]


def read(path: Path) -> dict[str, Any]:
    """The sweep in a TOML file, as `Sweep` takes it; only what the file sets.

    Raises InputError, with the file's name and line, for a mistake in TOML, an unknown key or a wrong value.
    """
    text = read_text(path, LARGEST, "sweep file")
    try:
        values = from_toml(text, str(path))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not TOML: {error}") from None
    try:
        if type(count := values.get("seeds")) is int:
            check_size(count, "seeds", "seeds")
            if not 1 <= count <= MOST_SEEDS:
                raise InputError(f"seeds = {count} is not allowed: a count is 1 to {MOST_SEEDS:,}", "seeds")
            values["seeds"] = list(range(count))
        if isinstance(values.get("train"), dict):
            TrainSpec.of(values["train"], "train")
        if isinstance(values.get("report"), dict):
            Selection.of(values["report"], "report")
        Sweep.of(values, "sweep")
    except InputError as error:
        raise located(error, path) or InputError(f"{path}: {error}") from None
    return values


def read_text(path: Path, largest: int, what: str) -> str:
    """A file's text. Raises InputError for one that is no regular file, cannot be read, is no UTF-8 or has more than
    `largest` bytes. `what`: what the message calls it."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{what} '{path}' cannot be read: it is not a file")
        with path.open("rb") as stream:
            raw = stream.read(largest + 1)
        if len(raw) > largest:
            raise InputError(f"{what} '{path}' cannot be read: it has more than {largest:,} bytes")
        return raw.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what} '{path}' cannot be read: {getattr(error, 'strerror', None) or error}") from None


def located(error: InputError, path: Path) -> InputError | None:
    """The same error with the file and the line of the mistake; None where the file does not mention it."""
    if error.mention:
        written = re.escape(error.mention), re.escape(json.dumps(error.mention)[1:-1])  # with its signs escaped
        pattern = re.compile(rf"(?<![\w-])({'|'.join(written)})(?![\w-])")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.lstrip().startswith("#") and pattern.search(line):
                return InputError(f"{path}, line {number}: {error}")
    return None
