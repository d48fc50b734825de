"""The options of `report` that say what it shows, and the [report] table of a sweep. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from harness.errors import InputError
from harness.notation import split_tasks
from harness.plan import sweep_file
from harness.spec import Selection


def selection_of(options: argparse.Namespace) -> Selection:
    """Options over the [report] table of the --config file. Raises InputError."""
    values: dict[str, Any] = {}
    if options.config is not None:
        values |= sweep_file.read(options.config).get("report", {})
    lists = {name: split_tasks(text) for name in ("rows", "columns") if (text := getattr(options, name)) is not None}
    for name, patterns in lists.items():
        if not patterns:
            raise InputError(f"--{name} '' is not allowed: give names, comma-separated")
    given: dict[str, Any] = {**lists, **({"group": _groups(options.group)} if options.group else {})}
    Selection.of(given, "--")
    return Selection.of(values | given, "report")


def _groups(texts: Iterable[str]) -> dict[str, str]:
    """Patterns by the title of their group; one that is given twice has all of its patterns."""
    groups: dict[str, str] = {}
    for text in texts:
        title, equals, patterns = (part.strip() for part in text.partition("="))
        if not (equals and title and patterns.strip("| ")):
            raise InputError(f"--group '{text}' cannot be read; write TITLE=PATTERN|PATTERN: controls=ranks_of|size_of")
        groups[title] = f"{groups[title]}|{patterns}" if title in groups else patterns
    return groups


def add_to(parser: argparse.ArgumentParser, path: Callable[[str], Path]) -> None:
    """Add the options. `path`: reads a path that is given."""
    text = "order the printed rows by a task, or by parameters, rank, seconds and so on"
    parser.add_argument("--sort", metavar="COLUMN", help=text)
    text = 'only these rows, in this order: "lora,debora[*]", * for any signs and ? for any one'
    parser.add_argument("--rows", metavar="A,B", help=text)
    text = "only these columns, in this order: tasks, a task's further split as glue/mnli:mismatched, and the others"
    parser.add_argument("--columns", metavar="A,B", help=text)
    text = "give a task's further evaluation splits (MNLI's mismatched one) columns of their own"
    parser.add_argument("--every-split", action="store_true", help=text)
    text = "rows under a heading of their own, by labels or by parameters that they name; may be repeated"
    parser.add_argument("--group", action="append", metavar="TITLE=P|Q", help=text)
    parser.add_argument("--config", type=path, metavar="FILE", help="the [report] table of a sweep; options win")
    text = "of LaTeX cells: subscript (default), side, siunitx"
    parser.add_argument("--latex-style", default="subscript", metavar="STYLE", help=text)
    parser.add_argument("--against", metavar="paper", help="print what the paper reports beside ours")
    parser.add_argument("--to-mlflow", action="store_true", help="log every record that MLflow does not have yet")
