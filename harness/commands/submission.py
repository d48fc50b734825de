"""`export-glue`: predictions of finished runs for the hidden test sets, as a benchmark's submission."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness import registry
from harness.commands import target
from harness.errors import InputError
from harness.record.record import RunRecord
from harness.record.store import RecordStore
from harness.storage import Damaged

if TYPE_CHECKING:
    import numpy as np

ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # the oldest a zip can hold: equal predictions make equal files


def command(family: str, run_ids: Sequence[str], results: Path, to: Path) -> int:
    """Write the submission of a family of tasks into one zip: equal predictions make equal bytes.

    Raises InputError for runs that do not fit, predictions that do not hold together, or a `to` that cannot be made.
    """
    target.check_new(to, replaces=True)
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
    """By split: those that come without references, whole or real numbers, a row each."""
    arrays = _arrays(store, run_id)
    splits = [key.removesuffix("/predictions") for key in sorted(arrays) if key.endswith("/predictions")]
    found = {split: arrays[f"{split}/predictions"] for split in splits if f"{split}/references" not in arrays}
    if not found:
        raise InputError(
            f"run '{run_id}' kept no predictions for the test set: delete its folder and run it again with "
            "--predict-test",
            run_id,
        )
    for split, predictions in found.items():
        if predictions.ndim != 1 or predictions.dtype.kind not in "iuf":
            raise _damaged(run_id, f"'{split}' is {predictions.dtype} of shape {predictions.shape}")
    return found


def _arrays(store: RecordStore, run_id: str) -> dict[str, np.ndarray]:
    """What a run's predictions.safetensors holds; nothing where it has none."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = store.folder(run_id) / "predictions.safetensors"
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise _damaged(run_id, f"'{path}' is no plain file")
        return load(store.verified(run_id, path.name).read_bytes())
    except Damaged as error:
        raise InputError(str(error), run_id) from None
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({error.strerror})", run_id) from None
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:  # the last three: a type NumPy has not
        raise _damaged(run_id, str(error).splitlines()[0]) from None


def _damaged(run_id: str, reason: str) -> InputError:
    return InputError(f"the predictions of run '{run_id}' are damaged ({reason}): make the run again", run_id)


def _write(to: Path, files: dict[str, str]) -> None:
    """The zip appears whole or not at all."""
    with target.made(to, replaces=True) as draft, zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, ZIP_DATE), content, zipfile.ZIP_DEFLATED)
