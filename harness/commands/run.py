"""`run`: plan, check, train what is missing, report."""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

from harness.commands.run_options import execution_of, place_of, sweep_of
from harness.errors import InputError
from harness.execute import machine
from harness.plan import sweep_file
from harness.plan.sweep import cells_of
from harness.spec import Execution, Place, RunSpec

if TYPE_CHECKING:
    from rich.console import Console

    from harness.execute.protocol import Execute
    from harness.plan.plan import Planned
    from harness.record.store import RecordStore, Skim


def command(options: argparse.Namespace) -> int:
    """Carry out `run`. Returns 0, or 1 where a run failed, diverged or ran out of memory."""
    sweep, place, execution = sweep_of(options), place_of(options), execution_of(options)
    try:
        cells_of(sweep)  # names and values are checked before anything heavy is imported
        machine.check(execution, sweep.threads)

        from rich.console import Console

        from harness.commands import dry_run
        from harness.plan.plan import plan_sweep
        from harness.record.store import RecordStore

        console, store = Console(), RecordStore(options.results)
        with console.status("checking data, models and methods"):
            planned = plan_sweep(sweep, place, store, try_models=not options.dry_run)
        return dry_run.show(planned, store) if options.dry_run else _run(planned, store, execution, options, console)
    except InputError as error:
        raise (sweep_file.located(error, options.config) if options.config else None) or error from None


class _Found(NamedTuple):
    """Which of some runs are finished, by run_id, and which are not."""

    finished: dict[str, Skim]
    missing: list[RunSpec]


def _run(
    planned: Planned, store: RecordStore, execution: Execution, options: argparse.Namespace, console: Console
) -> int:
    """Carry the plan out and report."""
    from harness.commands.report import MOST_SHOWN, brief, show_sweep
    from harness.execute import session
    from harness.record.record import RETRIED

    with contextlib.ExitStack() as stack:

        def start() -> Execute:
            return stack.enter_context(session.session(execution, planned.sweep.threads, planned.place.device))

        retried = RETRIED if options.retry_failed else ()
        specs, found = _carry_out(planned, store, retried, functools.cache(start), console)
    if not found.missing and len(specs) > MOST_SHOWN:
        return brief(store, {run_id: skim.status for run_id, skim in found.finished.items()})
    return show_sweep(store, [spec.run_id for spec in specs], options.tracking_uri, planned.sweep.report)


def _carry_out(
    planned: Planned, store: RecordStore, retried: Collection[str], start: Callable[[], Execute], console: Console
) -> tuple[list[RunSpec], _Found]:
    """Make the records that are missing. Returns the runs of the report, and what was there of them before.

    `start`: starts the executor, once however often it is called.
    """
    from harness.execute import view
    from harness.record.cells import write as write_cells

    for number, specs in enumerate(planned.stages(store)):
        found = _found(store, specs, retried)
        execute = start() if found.missing else None  # Ray has the last word, before anything is written
        if number == 0:
            store.make_ready()
            _say(planned, console)
        write_cells(store, specs, planned.waiting(specs, store))
        _say_what_lacks(store, found.finished, planned.place, console)
        done = len(found.finished)
        console.print(f"{len(specs)} runs: {done} finished before, {len(found.missing)} to do", highlight=False)
        if execute is not None:
            with view.view(found.missing, console) as shown:
                execute(found.missing, store, shown)
    return specs, found


def _found(store: RecordStore, specs: list[RunSpec], retried: Collection[str]) -> _Found:
    """`retried`: statuses of runs that are to be made again."""
    skimmed = {spec.run_id: store.skim(spec.run_id) for spec in specs}
    finished = {run_id: skim for run_id, skim in skimmed.items() if skim and skim.status not in retried}
    return _Found(finished, [spec for spec in specs if spec.run_id not in finished])


def _say(planned: Planned, console: Console) -> None:
    """What was read, and what is searched for."""
    for line in (*planned.summaries, *planned.said):
        console.out(line, highlight=False)  # print makes a picture of the name in "text:x: ..."
    if number := len(planned.searches):
        console.print(f"tuning: {planned.sweep.tune} trials for each of {number} method-task pairs", highlight=False)


def _say_what_lacks(store: RecordStore, finished: Mapping[str, Skim], place: Place, console: Console) -> None:
    """A finished run is not run again for the sake of what it has not kept: say so."""
    text = place.forgetting, place.forgetting_windows
    wanted: dict[str, tuple[object, Callable[[str], object]]] = {
        "adapter": (place.save_adapter, lambda run_id: (store.folder(run_id) / "adapter").exists()),
        "predictions for the test set": (place.predict_test, store.test_splits),
        "such losses on a text sample": (place.forgetting, lambda run_id: finished[run_id].forgetting == text),
        "such rank curve": (place.rank_curve, lambda run_id: finished[run_id].rank_curve == place.rank_curve),
    }
    for what, (asked, kept) in wanted.items():
        lacking = sum(not kept(run_id) for run_id in finished) if asked else 0
        if lacking:
            console.print(f"{lacking} of the finished runs have kept no {what}; delete their folders to run them again")
