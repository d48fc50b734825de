"""Sweeps written in TOML: a user's `--config` file and the presets that come with the program."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from harness.errors import InputError, unknown
from harness.plan import Sweep
from harness.spec import TrainSpec

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
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"sweep file '{path}' cannot be read: {error}") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not TOML: {error}") from None
    if type(values.get("seeds")) is int:
        values["seeds"] = list(range(values["seeds"]))
    try:
        if isinstance(values.get("train"), dict):
            TrainSpec.of(values["train"], "train")
        Sweep.of(values, "sweep")
    except InputError as error:
        raise located(error, path) or InputError(f"{path}: {error}") from None
    return values


def located(error: InputError, path: Path) -> InputError | None:
    """The same error with the file and the line of the mistake; None where the file does not mention it."""
    if error.mention:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.lstrip().startswith("#") and re.search(rf"(?<![\w-]){re.escape(error.mention)}(?![\w-])", line):
                return InputError(f"{path}, line {number}: {error}")
    return None
