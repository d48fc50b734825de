"""The store of records below a results folder: one folder per run, in place by one rename."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from harness import storage
from harness.errors import InputError, unknown
from harness.record import locks
from harness.record.processes import own_name
from harness.record.record import (
    HISTORY,
    PREDICTIONS,
    RECORD,
    RETRIED,
    RUN_ID,
    SCHEMA,
    SEALED_FROM,
    STATUSES,
    RunRecord,
    Status,
    check_identity,
)
from harness.spec import identity_hash
from harness.storage import DISK_ERRORS, Damaged, Unreadable, Unwritable


class Found(NamedTuple):
    """What a store holds: the readable records, and the run folders without one, each with the reason where it is not
    plain damage."""

    records: list[RunRecord]
    damaged: list[str]


class Skim(NamedTuple):
    """What is read of a finished run to know that it is finished."""

    status: Status
    seconds: float  # in all
    rank_curve: tuple[int, ...]  # the ranks asked for
    forgetting: tuple[str | None, int | None]  # the text sample asked for, and how many windows of it
    files: dict[str, str]  # see RunRecord; empty for a record from before there were checksums


class RecordStore:
    """The records below a results folder: `runs/<run_id>/` with record.json, history.jsonl and
    predictions.safetensors. A folder appears whole or not at all."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self.runs = results / "runs"
        self.checkpoints = results / "checkpoints"
        self.running = results / "running"
        self.sweeps = results / "sweeps"

    @classmethod
    def existing(cls, results: Path) -> RecordStore:
        """The store of a folder that is there. Raises InputError where it is not."""
        if not results.is_dir():
            raise InputError(f"--results '{results}' is not a folder; runs are made by `python -m harness run`")
        return cls(results)

    def make_ready(self) -> None:
        """Create the folder and clear what has been left in it. Raises Unwritable where it cannot be written."""
        with self.writing():
            for folder in (self.runs, self.running, self.sweeps):
                folder.mkdir(parents=True, exist_ok=True)
            self.draft("probe").rmdir()
            self._clear()

    def _clear(self) -> None:
        """Remove what dead processes have left, and the checkpoints of finished runs."""
        locks.clear_abandoned(self.running)
        for path in self.sweeps.glob(".*"):  # drafts of earlier versions
            storage.remove(path)
        for folder in self.checkpoints.iterdir() if self.checkpoints.is_dir() else ():
            if not folder.is_dir() or locks.progress(self.running, folder.name):
                continue
            locks.clear_abandoned(folder)
            with contextlib.suppress(Unreadable):
                found = self.skim(folder.name)
                if found is not None and found.status not in RETRIED:
                    storage.remove(folder)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Where something is written below the results folder: a full disk, a folder that has gone or may not be
        written is Unwritable, whatever library met it."""
        try:
            with storage.os_errors():
                yield
        except OSError as error:
            if not self._is_own(error):
                raise
            raise self.unwritable(error) from error

    def _is_own(self, error: OSError) -> bool:
        """Whether an error is one of the disk or the folder that results go to."""
        if error.errno is not None and error.errno not in DISK_ERRORS:
            return False
        name = error.filename
        return not isinstance(name, (str, os.PathLike)) or Path(name).absolute().is_relative_to(self.results.absolute())

    def draft(self, run_id: str) -> Path:
        """A new folder for a run's files, which `write` moves into place."""
        path = self.running / own_name(run_id, "draft")
        path.mkdir()
        return path

    def clear(self, run_id: str) -> None:
        """Remove what dead processes have left of a run; for the holder of its lock."""
        locks.clear_abandoned(self.running, f"{run_id}-")

    def folder(self, run_id: str) -> Path:
        """Where a run's files are, or will be."""
        return self.runs / run_id

    def read(self, run_id: str) -> RunRecord | None:
        """The run's record; None where there is none or it is damaged (it is then made again).

        Raises Unreadable for one that is there and cannot be read, or is of a newer version.
        """
        try:
            return self.load(run_id)
        except (FileNotFoundError, Damaged):
            return None

    def load(self, run_id: str) -> RunRecord:
        """The run's record. Raises FileNotFoundError, Damaged or Unreadable."""
        record = RunRecord.parse(self._raw(run_id), self._named(run_id))
        check_identity(self._named(run_id), record.run_id, run_id)
        return record

    def skim(self, run_id: str) -> Skim | None:
        """What `read` would find, without the whole: a sweep of many cells is passed over quickly."""
        try:
            content = storage.unseal(self._raw(run_id), SCHEMA, self._named(run_id), SEALED_FROM)
            if not content["run_id"] == run_id == identity_hash(content["spec"]) or content["status"] not in STATUSES:
                return None
            place, seconds = content["spec"]["place"], float(content["seconds"]["total"])
            text = place.get("forgetting"), place.get("forgetting_windows")
            ranks = tuple(place.get("rank_curve", ()))
            return Skim(content["status"], seconds, ranks, text, dict(content.get("files", {})))
        except (FileNotFoundError, Damaged, KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, Unreadable):
                raise
            return None

    def _raw(self, run_id: str) -> bytes:
        """Raises FileNotFoundError, Damaged where a file stands in the run's place, and Unreadable."""
        try:
            return (self.folder(run_id) / RECORD).read_bytes()
        except FileNotFoundError:
            raise
        except NotADirectoryError:
            raise Damaged(f"{self._named(run_id)} is in no folder") from None
        except OSError as error:
            raise Unreadable(f"{self._named(run_id)} is there and cannot be read ({error.strerror})") from None

    def _named(self, run_id: str) -> str:
        return f"the record of run '{run_id}' in '{self.results}'"

    def find(self, run_id: str) -> RunRecord:
        """The run's record. Raises InputError, with the nearest match, where there is none."""
        names = self.run_ids()
        if run_id not in names:
            raise unknown(f"run in '{self.results}'", run_id, names)
        try:
            return self.load(run_id)
        except (FileNotFoundError, Damaged):
            raise InputError(
                f"the record of run '{run_id}' in '{self.results}' is damaged: make the run again", run_id
            ) from None

    def verified(self, run_id: str, name: str, record: RunRecord | None = None) -> Path:
        """A file of the run's folder ("predictions.safetensors", "adapter/README.md"), which is what the run wrote.

        record: the run's, where it was read before. Raises Damaged where the file is not what it says, and
        FileNotFoundError where the run has no such file. Of a run from before there were checksums, the file as it is.
        """
        found, path = record or self.skim(run_id), self.folder(run_id) / name
        if found is None:
            raise Damaged(f"{self._named(run_id)} is damaged")
        if found.files and name not in found.files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        if found.files and (path.is_symlink() or not path.is_file() or storage.file_sum(path) != found.files[name]):
            raise Damaged(f"'{name}' of run '{run_id}' is not what the run wrote: make the run again")
        return path

    def write(self, record: RunRecord, history: list[dict[str, Any]], draft: Path) -> RunRecord:
        """Put a finished run in place in one rename: the draft's files, its history and its record.

        A record of the same run that another process has put there meanwhile stays; a failed or damaged one is
        replaced. Returns the record as it was written. Raises Unwritable where the disk is full or cannot be written.
        """
        try:
            with self.writing():
                (draft / HISTORY).write_text("".join(json.dumps(row) + "\n" for row in _json_rows(history)))
                record = record.model_copy(update={"schema_version": SCHEMA, "files": storage.file_sums(draft)})
                with (draft / RECORD).open("w") as stream:
                    stream.write(record.to_json())
                    stream.flush()
                    os.fsync(stream.fileno())
                self._place(draft, self.folder(record.run_id))
        finally:
            storage.remove(draft)
        return record

    def _place(self, draft: Path, place: Path) -> None:
        while True:
            try:
                draft.rename(place)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
            there = self.read(place.name)
            if there is not None and there.status not in RETRIED:
                return
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                old = self.running / own_name(place.name, "old")
                place.rename(old)
                storage.remove(old)

    def unwritable(self, error: OSError) -> Unwritable:
        """The one line that says why nothing can be kept here."""
        return Unwritable(
            f"--results '{self.results}' cannot be written ({error.strerror or error}); give a folder that you may "
            "write to",
            is_gone=error.errno in (errno.ENOENT, errno.ENOTDIR),
        )

    def history(self, run_id: str) -> list[dict[str, Any]]:
        """The run's rows of step, loss, learning rate and whatever its method reported. Raises Damaged (a ValueError)
        for a file that holds anything else, and OSError."""
        rows = []
        with self.verified(run_id, HISTORY).open() as stream:
            for line in stream:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if not isinstance(row, dict) or not isinstance(row.get("batches"), int):
                    raise Damaged(f"the history of run '{run_id}' has a row without its number of batches")
                rows.append(row)
        return rows

    def test_splits(self, run_id: str) -> list[str]:
        """The splits that a run kept predictions for and that have no references: unlabelled test sets. Of a
        damaged file none."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.verified(run_id, PREDICTIONS), "numpy") as file:
                keys = set(file.keys())
        except (OSError, Damaged, SafetensorError):
            return []
        splits = sorted(key.removesuffix("/predictions") for key in keys if key.endswith("/predictions"))
        return [split for split in splits if f"{split}/references" not in keys]

    def read_all(self) -> Found:
        """Every run folder read once, by run_id."""
        found = Found([], [])
        for run_id in self.run_ids():
            try:
                found.records.append(self.load(run_id))
            except Unreadable as error:
                found.damaged.append(f"{run_id} ({error})")
            except (FileNotFoundError, Damaged):
                if self.folder(run_id).exists():  # not where another process is just replacing it
                    found.damaged.append(run_id)
        return found

    def records(self) -> list[RunRecord]:
        """Every readable record, by run_id."""
        return self.read_all().records

    def damaged(self) -> list[str]:
        """Run folders whose record cannot be read."""
        return self.read_all().damaged

    def run_ids(self) -> list[str]:
        """The run folders; what else lies beside them (an operating system's files) is no run."""
        if not self.runs.is_dir():
            return []
        return sorted(path.name for path in self.runs.iterdir() if RUN_ID.fullmatch(path.name))


def _json_rows(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """History rows as JSON allows them: a non-finite number becomes null."""

    def allowed(value: Any) -> Any:
        if isinstance(value, list):
            return [allowed(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return [{key: allowed(value) for key, value in row.items()} for row in history]
