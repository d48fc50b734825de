"""`report`: tables, pictures and a page from the records."""

from __future__ import annotations

import dataclasses
import functools
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import registry
from harness.commands.tracking import log
from harness.errors import InputError, unknown
from harness.record.record import RunRecord
from harness.record.store import Found, RecordStore
from harness.report.garbage import uncollected

if TYPE_CHECKING:
    from harness.report.board.columns import TableColumn
    from harness.report.board.leaderboard import Board

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


def command(
    results: Path, methods: Sequence[str] | None, tasks: Sequence[str] | None, wanted: Wanted | None = None
) -> int:
    """Rebuild everything from the records below `results` and print it.

    Raises InputError where there are no records, or none of a method or task that was named.
    """
    wanted = wanted or Wanted()
    if wanted.against not in (None, *AGAINST):
        raise InputError(f"--against '{wanted.against}' is not known; available: {', '.join(AGAINST)}")
    store, found = chosen(results, methods, tasks)
    _show(store, found.records, found, wanted)
    if wanted.to_mlflow:
        log(store, found.records, wanted.tracking_uri, must=True)
    return 0


def chosen(results: Path, methods: Sequence[str] | None, tasks: Sequence[str] | None) -> tuple[RecordStore, Found]:
    """The store and its records of these methods and tasks (None: all). Raises InputError for names without records."""
    store = RecordStore.existing(results)
    with uncollected():
        records, damaged = store.read_all()
    if methods and records:
        _check("method", methods, {record.spec.method for record in records})
        records = [record for record in records if record.spec.method in methods]
    if tasks and records:
        _check("task", tasks, {record.spec.task for record in records} | {r.spec.task.split("/")[0] for r in records})
        records = [r for r in records if r.spec.task in tasks or r.spec.task.split("/")[0] in tasks]
    return store, Found(records, damaged)


def show_sweep(store: RecordStore, run_ids: Sequence[str], tracking_uri: str | None) -> int:
    """Print the leaderboard of these runs and log them to MLflow; the files cover every record of the store.

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
        _show(store, shown, found, Wanted(forms=("png",)))
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
    from harness.report.board.leaderboard import sorted_by
    from harness.report.board.runs import every_split, runs_of
    from harness.report.build import Unwritten, boards_of, build_report
    from harness.report.forms.text import console
    from harness.report.pictures import critical

    naming, table = naming_of(written.records), _columns()

    def boards_with(records: Sequence[RunRecord]) -> list[Board]:
        runs = runs_of(records, naming)
        return boards_of(store, every_split(runs) if wanted.every_split else runs, family_average, table)

    with uncollected():
        every = boards_with(written.records)
        boards = every if shown is written.records else boards_with(shown)
    if wanted.sort is not None:
        boards = sorted_by(boards, wanted.sort)
    unwritten = None
    try:
        paths = build_report(store, written, naming, every, wanted.forms)
    except Unwritten as error:
        paths, unwritten = error.paths, error
    for board in boards:
        print(f"\n{console(board, written.damaged)}")
        refused = critical.refusal(board)
        if refused and len(board.columns) > 1:
            print(f"No diagram of mean ranks: {refused}.")
    if wanted.against is not None:
        from harness.report.tables.paper import against_paper

        for board in boards:
            print(f"\n{against_paper(board)}")
    print(f"\nrecords   {store.runs}")
    for path in paths:
        print(f"{KINDS.get(path.parent.name, 'page'):<10}{path}")
    if unwritten is not None:
        raise unwritten


def _columns() -> tuple[TableColumn, ...]:
    """The columns beside the scores, with those of packages; what is wrong with these is a line on stderr."""
    from harness.report.board.columns import with_added

    added, told = registry.extensions(registry.COLUMNS)
    columns, refused = with_added(added)
    for line in (*told, *refused):
        print(line, file=sys.stderr)
    return columns


def naming_of(records: Iterable[RunRecord]) -> dict[str, Callable[[dict[str, Any]], dict[str, Any]]]:
    """What the labels of the records' methods must name, of the methods that are installed."""
    known = registry.registered(registry.METHODS)
    found: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {}
    for name in {record.spec.method for record in records} & known.keys():
        try:
            registry.method_class(name)
        except InputError:  # a plugin that no longer imports: its records are still shown
            continue
        found[name] = functools.partial(registry.shown_parameters, name)
    return found


def family_average(family: str, metrics: Mapping[str, Mapping[str, float]]) -> float | None:
    """The family's own average, see `Task.average`; None where it has none or is not installed."""
    try:
        return registry.task_class(family).average(metrics)
    except InputError:
        return None


def _check(kind: str, given: Sequence[str], present: set[str]) -> None:
    for name in given:
        if name not in present:
            raise unknown(f"{kind} among the records", name, present)
