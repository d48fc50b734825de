"""`compare`: is one configuration better than another, and how sure is that?"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from harness import installed, registry
from harness.errors import InputError
from harness.notation import parse_choice
from harness.record.chosen import chosen
from harness.record.garbage import uncollected


def command(results: Path, first: str, second: str, tasks: Sequence[str] | None) -> int:
    """Print the verdict on each task and the numbers behind it, for every setting that has runs of both.

    `first`, `second`: rows of the leaderboard, "debora[tau=8]", or a method that has one row; hyperparameters as on the
    command line, so that "lora[r=4]" is the row "lora[rank=4]". Raises InputError for an unknown row, and where no
    setting has both.
    """
    from harness.report.board.leaderboard import leaderboards
    from harness.report.board.parents import grouped
    from harness.report.board.runs import runs_of
    from harness.report.evidence.compare import ExampleReader, compare, in_words, row_of, unused
    from harness.report.forms.text import CONSOLE_WIDTH

    store, found = chosen(results, None, tasks)
    naming = installed.naming_of(record.spec.method for record in found.records)
    with uncollected():
        boards = leaderboards(runs_of(grouped(store, found.records, naming), naming))
    if not boards:
        raise InputError(f"no records in {store.runs}: run `python -m harness run ...` first")
    labels = {row.label for board in boards for row in board.rows}
    names = [name if name in labels else _label(name) for name in (first, second)]
    known, failure, read = 0, None, ExampleReader(store, installed.metric_of)
    for board in boards:
        try:
            rows = row_of(board, names[0]), row_of(board, names[1])
        except InputError as error:
            failure = failure or error
            continue
        if rows[0] is rows[1]:
            raise InputError(f"'{first}' and '{second}' are the same row: give two")
        comparisons = compare(board, *rows, read)
        if comparisons:
            known += 1
            heading = f"{rows[0].label} against {rows[1].label}. {board.caption}"
            print("\n" + textwrap.fill(heading, CONSOLE_WIDTH, break_on_hyphens=False) + "\n")
            print("\n".join(in_words(rows[0].label, rows[1].label, comparisons)))
    for run_id, reason in sorted(read.damaged.items()):
        print(unused(run_id, reason), file=sys.stderr)
    if not known:
        raise failure or InputError(f"'{first}' and '{second}' have no task in common")
    return 0


def _label(name: str) -> str:
    """The label that tables give to "method[parameter=value]"; of anything else the name as it is."""
    try:
        method, parameters = parse_choice(name)
        made = registry.make_method(method, parameters)
    except InputError:
        return name
    return registry.label_of(method, made.model_dump(mode="json"))
