"""`report`: tables, pictures and a page from the records."""

from __future__ import annotations

import dataclasses
import shlex
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from harness import installed
from harness.commands.tracking import log
from harness.errors import InputError
from harness.record.chosen import chosen
from harness.record.garbage import uncollected
from harness.record.record import RunRecord
from harness.record.store import Found, RecordStore
from harness.report.forms.latex_cells import checked
from harness.spec import EVERYTHING, Selection

if TYPE_CHECKING:
    from harness.report.board.leaderboard import Board
    from harness.report.board.runs import Run
    from harness.report.tables.differences import Differences
    from harness.report.tables.rank_scores import RankScores
    from harness.report.tables.table import Table

FAILED = ("failed", "diverged", "out_of_memory")
MOST_SHOWN = 1000  # runs of a sweep that ran nothing new whose report is made again, unasked
AGAINST = ("paper",)  # reported results that come with the program
KINDS = {"tables": "table", "pictures": "picture"}  # of a file, by its folder


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What `report` is asked for beside the tables, pictures and the page."""

    sort: str | None = None  # a column of the printed table
    against: str | None = None  # "paper"
    to_mlflow: bool = False
    tracking_uri: str | None = None  # None: the results folder's own
    forms: tuple[str, ...] = ("png", "pdf")  # of the pictures
    every_split: bool = False  # a task's further evaluation splits are columns, too
    rank_agreement: bool = False  # print how far seeds agree on ranks
    selection: Selection = EVERYTHING  # what the tables, pictures and the page show
    is_complete: bool = True  # whether a name of it that matches nothing is a mistake, and not of runs still to come
    latex_style: str = "subscript"  # of the LaTeX tables' cells


def command(
    results: Path, methods: Sequence[str] | None, tasks: Sequence[str] | None, wanted: Wanted | None = None
) -> int:
    """Rebuild everything from the records below `results` and print it.

    Raises InputError where there are no records, or none of a method or task that was named.
    """
    wanted = wanted or Wanted()
    if wanted.against not in (None, *AGAINST):
        raise InputError(f"--against '{wanted.against}' is not known; available: {', '.join(AGAINST)}")
    checked(wanted.latex_style)
    store, found = chosen(results, methods, tasks)
    _show(store, found.records, found, wanted)
    if wanted.to_mlflow:
        log(store, found.records, wanted.tracking_uri, must=True)
    return 0


def show_sweep(
    store: RecordStore, run_ids: Sequence[str], tracking_uri: str | None, selection: Selection = EVERYTHING
) -> int:
    """Print the leaderboard of these runs and log them to MLflow; the files cover every record of the store. Both show
    what the selection does.

    Returns the exit code: 1 where a run of the sweep failed, diverged, ran out of memory or has no record.
    """
    with uncollected():
        found = store.read_all()
    wanted = set(run_ids)
    chosen = [record for record in found.records if record.run_id in wanted]
    trials = {run_id for record in chosen if record.spec.search for run_id in record.spec.search.trials}
    every = wanted | trials
    shown = [record for record in found.records if record.run_id in every]
    unwritten = None
    try:
        _show(store, shown, found, Wanted(forms=("png",), selection=selection, is_complete=False))
    except InputError as error:  # the runs are there to be logged all the same
        unwritten = error
    log(store, shown, tracking_uri)
    if lacking := len(wanted) - len(chosen):
        print(f"{lacking} of {len(wanted)} cells have no record: give the same command again")
    if unwritten is not None:
        raise unwritten
    return int(lacking > 0 or any(record.status in FAILED for record in chosen))


def brief(store: RecordStore, statuses: Mapping[str, str]) -> int:
    """Say in two lines how a sweep stands that ran nothing new: no report is made again. `statuses`: of its finished
    runs, by run_id. Returns the exit code, as `show_sweep` does."""
    counts = Counter(status.replace("_", " ") for status in statuses.values() if status != "done")
    others = "".join(f", {count:,} {status}" for status, count in sorted(counts.items()))
    print(f"{len(statuses):,} runs are finished: {len(statuses) - counts.total():,} done{others}; nothing was new")
    command = f"python -m harness report --results {shlex.quote(str(store.results))}"
    print(f"{command} makes its tables and pictures; with --to-mlflow it logs the runs")
    return int(any(status in FAILED for status in statuses.values()))


def _show(store: RecordStore, shown: list[RunRecord], written: Found, wanted: Wanted) -> None:
    """Print the boards of `shown`; the files are made of `written`. Raises Unwritten where some could not be."""
    from harness.commands.packages import columns, known_of
    from harness.report.board.leaderboard import sorted_by
    from harness.report.board.parents import grouped
    from harness.report.board.runs import every_split, runs_of
    from harness.report.build import Unwritten, boards_of, build_report, to_stderr
    from harness.report.forms import plain
    from harness.report.forms.text import console, terminal_width
    from harness.report.pictures import critical

    naming, table = installed.naming_of(record.spec.method for record in written.records), columns()
    known = known_of(written.records)
    selection, told = wanted.selection, dict[str, None]()
    split = wanted.every_split or any(sign in name for name in selection.columns for sign in (":", ", "))

    def made_of(records: list[RunRecord]) -> tuple[list[Board], _Compared]:
        runs = runs_of(grouped(store, records, naming), naming)
        runs = every_split(runs) if split else runs
        tell = None if wanted.is_complete else lambda line: told.update({line: None})
        told_of = (installed.family_average, installed.metric_of, table, selection, tell)
        made = boards_of(store, runs, *told_of, known.provenance)
        return made, _compared(runs, made, wanted, store, told)

    with uncollected():
        every, of_every = made_of(written.records)
        boards, compared = (every, of_every) if shown is written.records else made_of(shown)
    for line in told:
        to_stderr(line)
    if wanted.sort is not None:
        boards = sorted_by(boards, wanted.sort)
    unwritten = None
    try:
        style, (to_baseline, ranks) = wanted.latex_style, of_every
        paths = build_report(
            store, written, naming, every, wanted.forms, to_stderr, known, to_baseline, latex_style=style, ranks=ranks
        )
    except Unwritten as error:
        paths, unwritten = error.paths, error
    width = terminal_width()
    for board in boards:
        print(f"\n{console(board, written.damaged, width)}")
        refused = critical.refusal(board)
        if refused and len(board.columns) > 1:
            print(textwrap.fill(f"No diagram of mean ranks: {refused}.", width, subsequent_indent="  "))
        for further in _further(board, compared, wanted):
            print(f"\n{plain.console(further, width)}")
    if wanted.against is not None:
        from harness.report.tables.paper import against_paper

        for board in boards:
            print(f"\n{against_paper(board)}")
    print(f"\nrecords   {store.runs}")
    for path in paths:
        print(f"{KINDS.get(path.parent.name, 'page'):<10}{path}")
    if unwritten is not None:
        raise unwritten


class _Compared(NamedTuple):
    """What boards show of comparisons of all rows that their runs have, by the board's key."""

    to_baseline: dict[str, Differences]
    at_ranks: dict[str, RankScores]


def _compared(
    runs: Sequence[Run], boards: Sequence[Board], wanted: Wanted, store: RecordStore, told: dict[str, None]
) -> _Compared:
    """Differences to a baseline, where there is one, and scores at ranks. Raises InputError where no board has the
    baseline, or, where its runs may be still to come, puts a line into `told`."""
    from harness.commands.packages import is_lora
    from harness.report.board.leaderboard import leaderboards
    from harness.report.evidence.compare import ExampleReader
    from harness.report.tables.differences import as_shown, differences
    from harness.report.tables.rank_scores import rank_scores

    whole, read = leaderboards(runs), ExampleReader(store, installed.metric_of)
    found: dict[str, Differences] = {}
    if wanted.selection.baseline is not None:
        try:
            found = differences(whole, wanted.selection.baseline, read)
        except InputError as error:
            if wanted.is_complete:
                raise
            told[f"shown without it: {error}"] = None
    baselines = {key: each.baseline for key, each in found.items()}
    ranks = {board.key: rank_scores(board, baselines.get(board.key), read, is_lora) for board in whole}
    at_ranks = {board.key: made._replace(board=board) for board in boards if (made := ranks.get(board.key))}
    return _Compared(as_shown(found, boards), at_ranks)


def _further(board: Board, compared: _Compared, wanted: Wanted) -> Iterator[Table]:
    """The tables that are printed after a board."""
    from harness.report.tables.differences import differences_table
    from harness.report.tables.rank_agreement import agreement_table, agreements
    from harness.report.tables.rank_scores import rank_tables

    if (found := compared.to_baseline.get(board.key)) is not None:
        yield differences_table(found, board)
    if (at_ranks := compared.at_ranks.get(board.key)) is not None:
        yield from rank_tables(at_ranks._replace(board=board))
    if wanted.rank_agreement and (agreed := list(agreements(board))):
        yield agreement_table(board, agreed)
