"""`compare`: is one configuration better than another, and how sure is that?"""

from __future__ import annotations

import itertools
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness import installed, registry
from harness.errors import InputError
from harness.notation import parse_choice, split_list

if TYPE_CHECKING:
    from harness.report.board.rows import Row


def command(results: Path, first: str, second: str, tasks: Sequence[str] | None) -> int:
    """Print the verdict on each task and the numbers behind it, of each of `first` against each of `second`, for every
    setting that has runs of both.

    `first`, `second`: rows of the leaderboard, "debora[tau=8]", or methods that have one row, several with commas;
    hyperparameters as on the command line, so that "lora[r=4]" is the row "lora[rank=4]". Raises InputError for an
    unknown one, and where no setting has a pair.
    """
    from harness.commands.boards import boards_below
    from harness.report.evidence.compare import ExampleReader, compare, in_words, rows_of, unused
    from harness.report.forms.text import CONSOLE_WIDTH

    store, boards = boards_below(results, tasks=tasks)
    if not boards:
        raise InputError(f"no records in {store.runs}: run `python -m harness run ...` first")
    labels = {row.label for board in boards for row in board.rows}
    firsts, seconds = (
        [rows_of(boards, name if name in labels else _label(name)) for name in split_list(text)]
        for text in (first, second)
    )
    known, read = 0, ExampleReader(store, installed.metric_of)
    for board in boards:
        pairs = _pairs(board.key, firsts, seconds)
        for (one, other), comparisons in zip(pairs, compare(board, pairs, read), strict=True):
            if comparisons:
                known += 1
                heading = f"{one.label} against {other.label}. {board.caption}"
                print("\n" + textwrap.fill(heading, CONSOLE_WIDTH, break_on_hyphens=False) + "\n")
                print("\n".join(in_words(one.label, other.label, comparisons)))
    for run_id, reason in sorted(read.damaged.items()):
        print(unused(run_id, reason), file=sys.stderr)
    if known:
        return 0
    if any(one[key] is other[key] for one in firsts for other in seconds for key in one.keys() & other.keys()):
        raise InputError(f"'{first}' and '{second}' are the same row: give two")
    raise InputError(f"'{first}' and '{second}' have no task in common")


def _pairs(
    key: str, firsts: Sequence[Mapping[str, Row]], seconds: Sequence[Mapping[str, Row]]
) -> list[tuple[Row, Row]]:
    """Each of the first rows of this board with each of the second, but none with itself and no two twice."""
    pairs: dict[frozenset[str], tuple[Row, Row]] = {}
    for one, other in itertools.product(firsts, seconds):
        if key in one and key in other and one[key] is not other[key]:
            pairs.setdefault(frozenset({one[key].label, other[key].label}), (one[key], other[key]))
    return list(pairs.values())


def _label(name: str) -> str:
    """The label that tables give to "method[parameter=value]"; of anything else the name as it is."""
    try:
        method, parameters = parse_choice(name)
        made = registry.make_method(method, parameters)
    except InputError:
        return name
    return registry.label_of(method, made.model_dump(mode="json"))
