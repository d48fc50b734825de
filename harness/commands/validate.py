"""`validate`: is this sweep file or record in order?"""

from __future__ import annotations

from pathlib import Path

from harness.errors import InputError
from harness.plan import sweep_file
from harness.plan.sweep import Sweep, cells_of

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
    except InputError as error:
        raise sweep_file.located(error, path) or InputError(f"{path}: {error}") from None
    runs = len(methods) * len(tasks) * len(sweep.seeds)
    print(f"{path}: in order: {len(methods)} methods x {len(tasks)} tasks x {len(sweep.seeds)} seeds = {runs} runs")
    return 0


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
