"""`export-glue`: predictions of finished runs for the hidden test sets, as a benchmark's submission."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness import registry
from harness.errors import InputError
from harness.record import RunRecord
from harness.record_store import RecordStore

if TYPE_CHECKING:
    import numpy as np

ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # the oldest a zip can hold: equal predictions make equal files


def command(family: str, run_ids: Sequence[str], results: Path, to: Path) -> int:
    """Write the submission of a family of tasks into one zip. Raises InputError for runs that do not fit."""
    store = RecordStore(results)
    records: dict[str, RunRecord] = {}
    for run_id in run_ids:
        record = _finished(store, run_id, family)
        other = records.setdefault(record.spec.task, record)
        if other.run_id != run_id:
            raise InputError(f"runs '{other.run_id}' and '{run_id}' are both on {record.spec.task}; give one", run_id)
    predictions = {task: _test_predictions(store, record.run_id) for task, record in records.items()}
    files, notes = registry.task_class(family).submission(predictions)
    _write(to, files)
    for task, record in records.items():
        print(f"{task}: {record.spec.method}, seed {record.spec.seed}, run {record.run_id}")
    for note in notes:
        print(note)
    print(f"{to}: {len(files)} files")
    return 0


def _finished(store: RecordStore, run_id: str, family: str) -> RunRecord:
    record = store.find(run_id)
    if record.spec.task.partition("/")[0] != family:
        raise InputError(f"run '{run_id}' is on {record.spec.task}, which is no task of {family}", run_id)
    if record.status != "done":
        raise InputError(f"run '{run_id}' on {record.spec.task} is {record.status}: it has no predictions", run_id)
    return record


def _test_predictions(store: RecordStore, run_id: str) -> dict[str, np.ndarray]:
    """By split: those that come without references."""
    from safetensors.numpy import load_file

    found = store.test_splits(run_id)
    if not found:
        raise InputError(
            f"run '{run_id}' kept no predictions for the test set: delete its folder and run it again with "
            "--predict-test",
            run_id,
        )
    arrays = load_file(store.folder(run_id) / "predictions.safetensors")
    return {split: arrays[f"{split}/predictions"] for split in found}


def _write(to: Path, files: dict[str, str]) -> None:
    """The zip appears whole or not at all."""
    draft = to.with_name(f".{to.name}.draft")
    try:
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(zipfile.ZipInfo(name, ZIP_DATE), content, zipfile.ZIP_DEFLATED)
        draft.replace(to)
    except OSError as error:
        raise InputError(f"--to '{to}' cannot be written: {error.strerror}") from None
    finally:
        draft.unlink(missing_ok=True)
