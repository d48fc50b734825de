"""Tables and folders of images for tests of the user's own data."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from harness import registry
from harness.errors import InputError
from harness.notation import parse_choice
from harness.task import Task
from tests.support import tiny

WORDS = ("bad", "good", "odd")


def reviews(count: int, labels: Sequence[Any] = WORDS) -> list[dict[str, Any]]:
    """A word of the text gives its label away."""
    return [
        {"review": f"the film {n} was {WORDS[n % len(labels)]}", "stars": labels[n % len(labels)], "by": n // 2}
        for n in range(count)
    ]


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix in (".csv", ".tsv"):
        return write_csv(path, rows, "\t" if path.suffix == ".tsv" else ",")
    if path.suffix == ".jsonl":
        return write_jsonl(path, rows)
    tiny.write_parquet(path, {name: [row[name] for row in rows] for name in rows[0]})
    return path


def write_photos(folder: Path, count: int = 12, classes: Sequence[str] = ("cat", "dog")) -> Path:
    """Pictures of different sizes; the class sets the colour."""
    generator = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            pixels = generator.integers(0, 60, (40 + n, 36, 3)).astype(np.uint8) + np.uint8(150 * number % 196)
            Image.fromarray(pixels).save(folder / name / f"{n}.png")
    return folder


def task_of(text: str) -> Any:
    return registry.make_task(*parse_choice(text))


def both_splits(task: Task) -> Any:
    train, evaluation = task.load(None)
    return train, next(iter(evaluation.values()))


@contextlib.contextmanager
def told(*pieces: str) -> Iterator[None]:
    with pytest.raises(InputError) as caught:
        yield
    assert [piece for piece in pieces if piece not in str(caught.value)] == [], str(caught.value)
    assert "\n" not in str(caught.value)
