"""`validate`: is this sweep file or record in order?"""

from __future__ import annotations

from pathlib import Path

from harness.errors import InputError, unknown
from harness.method import Method
from harness.plan import sweep_file
from harness.plan.sweep import Sweep, cells_of
from harness.registry import label_of
from harness.spec import EVERYTHING, Selection
from harness.task import Task

LARGEST_RECORD = 100_000_000  # bytes


def command(path: Path) -> int:
    """Check a sweep (.toml) or a record (.json) and say what it holds. Raises InputError with the mistake."""
    if not path.is_file():
        raise InputError(f"'{path}' is not a file: give a sweep (.toml) or a record (record.json)")
    if path.suffix == ".json":
        return _record(path)
    if path.suffix != ".toml":
        raise InputError(f"file '{path}' is neither a sweep (.toml) nor a record (record.json)")
    values = sweep_file.read(path)
    try:
        sweep = Sweep.of(values, "sweep")
        methods, tasks = cells_of(sweep)
        _check_report(sweep.report, methods, tasks)
    except InputError as error:
        raise sweep_file.located(error, path) or InputError(f"{path}: {error}") from None
    runs = len(methods) * len(tasks) * len(sweep.seeds)
    print(f"{path}: in order: {len(methods)} methods x {len(tasks)} tasks x {len(sweep.seeds)} seeds = {runs} runs")
    return 0


def _check_report(selection: Selection, methods: list[tuple[str, Method]], tasks: list[tuple[str, Task]]) -> None:
    """Raises InputError for a row, a column or a group of the [report] table that this sweep has not."""
    if selection == EVERYTHING:
        return
    from harness.commands.packages import columns
    from harness.report.board.selection import matches, missed_rows
    from harness.report.redact import cut

    for error in missed_rows(selection, (label_of(name, method.model_dump(mode="json")) for name, method in methods)):
        raise error
    beside, titles = [column.name for column in columns()], [str(cut(name)) for name, _ in tasks]
    for name in selection.columns:
        of_task = any(name.startswith(f"{title}{sign}") for title in titles for sign in ":[, ")  # of its data or splits
        if not of_task and not any(matches(name, each) for each in (*beside, *titles)):
            raise unknown("column to show", name, [*beside, *titles])


def _record(path: Path) -> int:
    from pydantic import ValidationError

    from harness.record.record import RunRecord

    try:
        record = RunRecord.model_validate_json(sweep_file.read_text(path, LARGEST_RECORD, "record"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(f"record '{path}': {where}: {first['msg']}") from None
    if record.run_id != record.spec.run_id:
        raise InputError(
            f"record '{path}': run_id is {record.run_id}, but its spec's content gives {record.spec.run_id}"
        )
    print(f"{path}: in order: {record.spec.method} on {record.spec.task}, seed {record.spec.seed}, {record.status}")
    return 0
