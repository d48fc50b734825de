"""`report`: tables and pictures from the records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import registry
from harness.errors import InputError, unknown
from harness.record import Found, RecordStore, RunRecord

FAILED = ("failed", "diverged", "out_of_memory")


def command(results: Path, methods: Sequence[str] | None, tasks: Sequence[str] | None) -> int:
    """Rebuild everything from the records below `results` and print it.

    Raises InputError where there are no records, or none of a method or task that was named.
    """
    if not results.is_dir():
        raise InputError(f"--results '{results}' is not a folder; runs are made by `python -m harness run`")
    store = RecordStore(results)
    records, damaged = store.read_all()
    if methods and records:
        _check("method", methods, {record.spec.method for record in records})
        records = [record for record in records if record.spec.method in methods]
    if tasks and records:
        _check("task", tasks, {record.spec.task for record in records} | {r.spec.task.split("/")[0] for r in records})
        records = [r for r in records if r.spec.task in tasks or r.spec.task.split("/")[0] in tasks]
    _show(store, records, Found(records, damaged))
    return 0


def show_sweep(store: RecordStore, run_ids: Sequence[str]) -> int:
    """Print the leaderboard of these runs; the files cover every record of the store.

    Returns the exit code: 1 where a run of the sweep failed, diverged, ran out of memory or has no record.
    """
    found = store.read_all()
    wanted = set(run_ids)
    chosen = [record for record in found.records if record.run_id in wanted]
    trials = {run_id for record in chosen if record.spec.search for run_id in record.spec.search.trials}
    _show(store, [record for record in found.records if record.run_id in wanted | trials], found)
    if lacking := len(wanted) - len(chosen):
        print(f"{lacking} of {len(wanted)} cells have no record: give the same command again")
    return int(lacking > 0 or any(record.status in FAILED for record in chosen))


def _show(store: RecordStore, shown: list[RunRecord], written: Found) -> None:
    """Print the boards of `shown`; the files are made of `written`."""
    from harness.report.build import build_report
    from harness.report.frame import to_frame
    from harness.report.leaderboard import leaderboards
    from harness.report.text import console

    defaults = _defaults({record.spec.method for record in written.records})
    paths = build_report(store, written, defaults)
    for board in leaderboards(to_frame(shown, defaults)):
        print(f"\n{console(board, written.damaged)}")
    print(f"\nrecords   {store.runs}")
    for path in paths:
        print(f"{'table' if path.parent.name == 'tables' else 'picture':<10}{path}")


def _defaults(methods: set[str]) -> dict[str, dict[str, Any]]:
    """Default parameters of the methods that are installed."""
    known = registry.registered(registry.METHODS)
    found = {}
    for name in methods & known.keys():
        try:
            found[name] = registry.method_class(name).defaults()
        except InputError:  # a plugin that no longer imports: its records are still shown
            continue
    return found


def _check(kind: str, given: Sequence[str], present: set[str]) -> None:
    for name in given:
        if name not in present:
            raise unknown(f"{kind} among the records", name, present)
