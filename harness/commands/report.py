"""`report`: tables and pictures from the records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def command(results: Path, methods: Sequence[str] | None, tasks: Sequence[str] | None) -> int:
    """Rebuild everything from the records below `results`. Raises InputError where there are none."""
    raise NotImplementedError
