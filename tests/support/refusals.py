"""What a command refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.cli import main
from harness.errors import InputError


def assert_refused(method: str, message: str, folder: Path, capsys: Any, *options: str) -> None:
    """`run` of this method on the synthetic task ends with exit code 2 and one line with the message in it, and writes
    no results."""
    results = folder / "results"
    assert main(["run", "--tasks", "synthetic", "--methods", method, "--results", str(results), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not results.exists()


def least_that_does(told: Callable[[int], Any]) -> int:
    """The budget that the refusal of a single batch names: it does, and a batch less does not. told: what a dry run
    says of so many batches."""
    with pytest.raises(InputError, match="takes at least") as raised:
        told(1)
    least = int(str(raised.value).split()[-1])
    told(least)
    with pytest.raises(InputError):
        told(least - 1)
    return least
