"""What a command refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.cli import main


def assert_refused(method: str, message: str, folder: Path, capsys: Any, *options: str) -> None:
    """`run` of this method on the synthetic task ends with exit code 2 and one line with the message in it, and writes
    no results."""
    results = folder / "results"
    assert main(["run", "--tasks", "synthetic", "--methods", method, "--results", str(results), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not results.exists()
