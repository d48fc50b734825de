"""A whole run of a method on a small task, without a record."""

from __future__ import annotations

from pathlib import Path

from harness.contracts import Subject, start
from harness.contracts.subject import Started


def trained(name: str, folder: Path = Path(), *, seed: int = 0, batches: int = 24) -> Started:
    """The run when its budget is spent. name: a method with its parameters in brackets."""
    started = start(Subject(name, folder), seed=seed, batches=batches)
    started.training.run(lambda training: None)
    return started
