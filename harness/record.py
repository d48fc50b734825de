"""RunRecord, the truth about one run, and the store that keeps one folder per run."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from harness import running
from harness.environment import Environment
from harness.errors import InputError, unknown
from harness.method import ParameterCount
from harness.parameters import Parameters
from harness.spec import RunSpec

Status = Literal["done", "unsupported", "diverged", "out_of_memory", "failed"]
RETRIED: tuple[Status, ...] = ("failed", "out_of_memory")  # what --retry-failed runs again


class Seconds(Parameters):
    """Wall-clock seconds of one run."""

    training: float = Field(0.0, ge=0, description="updates alone: no loading, no evaluation")
    evaluation: float = Field(0.0, ge=0, description="holdout and evaluation passes")
    total: float = Field(0.0, ge=0, description="everything")


class RunRecord(Parameters):
    """What one run gave. Tables, pictures and MLflow are views of these."""

    schema_version: Literal[1] = 1
    run_id: str
    spec: RunSpec
    status: Status
    headline: str = Field(description="name of the metric that `score` is")
    higher_is_better: bool = Field(True, description="whether a higher score is the better one")
    score: float | None = Field(None, description="headline metric on the first evaluation split")
    metrics: dict[str, float] = Field({}, description="on the evaluation splits; a second split's carry its name")
    holdout: dict[str, float] = Field({}, description="on the holdout, at the end of training")
    rank_curve: dict[int, float] = Field(
        {}, description="rank -> headline metric on the first evaluation split, each layer cut to at most that rank"
    )
    parameters: ParameterCount | None = None
    ranks: dict[str, int] = Field({}, description="live rank per adapted layer at the end")
    batches: int = Field(0, ge=0, description="batches put through forward and backward: the budget's unit")
    updates: int = Field(0, ge=0, description="optimizer steps")
    rows: dict[str, int] = Field({}, description="rows per split, as used")
    data: dict[str, dict[str, Any]] = Field({}, description="what the task says of each split: see Task.facts")
    seconds: Seconds = Seconds()
    peak_bytes: int | None = Field(None, description="peak memory of the run: resident on a CPU, allocated on a GPU")
    environment: Environment
    started: str = Field(description="ISO 8601, UTC")
    notes: tuple[str, ...] = Field((), description="what a person should know of how the run went, a line each")
    error: str | None = Field(None, description="one line")
    traceback: str | None = None

    def merit(self, score: float) -> float:
        """A value of the headline metric, turned so that more is better."""
        return score if self.higher_is_better else -score

    def result(self) -> dict[str, Any]:
        """The record without times and places: equal for equal runs."""
        return self.model_dump(
            mode="json",
            exclude={
                "seconds": True,
                "peak_bytes": True,
                "environment": True,
                "started": True,
                "notes": True,
                "spec": {"place"},
            },
        )


class Found(NamedTuple):
    """What a store holds: the readable records, and the names of the run folders without one."""

    records: list[RunRecord]
    damaged: list[str]


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
        """Create the folder and clear what killed processes of this machine left in it. Raises InputError where it
        cannot be written."""
        try:
            for folder in (self.runs, self.running, self.sweeps):
                folder.mkdir(parents=True, exist_ok=True)
            self.draft("probe").rmdir()
            running.clear_abandoned(self.running)
        except OSError as error:
            raise self.unwritable(error) from None

    def draft(self, run_id: str) -> Path:
        """A new folder for a run's files, which `write` moves into place."""
        path = self.running / running.own_name(run_id, "draft")
        path.mkdir()
        return path

    def clear(self, run_id: str) -> None:
        """Remove what dead processes have left of a run that nobody is at; for the holder of its claim."""
        for path in self.running.glob(f"{run_id}-*-draft"):
            shutil.rmtree(path, ignore_errors=True)

    def folder(self, run_id: str) -> Path:
        """Where a run's files are, or will be."""
        return self.runs / run_id

    def read(self, run_id: str) -> RunRecord | None:
        """The run's record; None where there is none or it does not hold together (it is then made again)."""
        try:
            return RunRecord.model_validate_json((self.folder(run_id) / "record.json").read_bytes())
        except (OSError, ValidationError):
            return None

    def find(self, run_id: str) -> RunRecord:
        """The run's record. Raises InputError, with the nearest match, where there is none."""
        names = [path.name for path in self._folders()]
        record = self.read(run_id) if run_id in names else None
        if record is None and run_id in names:
            raise InputError(f"the record of run '{run_id}' in '{self.results}' is damaged: make the run again", run_id)
        if record is None:
            raise unknown(f"run in '{self.results}'", run_id, names)
        return record

    def write(self, record: RunRecord, history: list[dict[str, Any]], draft: Path) -> None:
        """Put a finished run in place in one rename: the draft's files, its history and its record.

        A record of the same run that another process has put there meanwhile stays; a failed or damaged one is
        replaced. Raises InputError where the disk is full or cannot be written.
        """
        try:
            (draft / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _json_rows(history)))
            with (draft / "record.json").open("w") as stream:
                stream.write(record.model_dump_json(indent=1))
                stream.flush()
                os.fsync(stream.fileno())
            self._place(draft, self.folder(record.run_id))
        except OSError as error:
            raise self.unwritable(error) from None
        finally:
            shutil.rmtree(draft, ignore_errors=True)

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
                old = draft.with_name(f"{draft.name}-old")
                place.rename(old)
                shutil.rmtree(old) if old.is_dir() else old.unlink()

    def unwritable(self, error: OSError) -> InputError:
        """The one line that says why nothing can be kept here."""
        return InputError(
            f"--results '{self.results}' cannot be written ({error.strerror}); give a folder that you may write to"
        )

    def history(self, run_id: str) -> list[dict[str, Any]]:
        """The run's rows of step, loss, learning rate and whatever its method reported. Raises ValueError for a file
        that holds anything else."""
        with (self.folder(run_id) / "history.jsonl").open() as stream:
            rows = [json.loads(line) for line in stream]
        if not all(isinstance(row, dict) and isinstance(row.get("batches"), int) for row in rows):
            raise ValueError(f"the history of run '{run_id}' has a row without its number of batches")
        return rows

    def test_splits(self, run_id: str) -> list[str]:
        """The splits that a run kept predictions for and that have no references: unlabelled test sets. Of a
        damaged file none."""
        from safetensors import SafetensorError, safe_open

        path = self.folder(run_id) / "predictions.safetensors"
        if not path.exists():
            return []
        try:
            with safe_open(path, "numpy") as file:
                keys = set(file.keys())
        except SafetensorError:
            return []
        splits = sorted(key.removesuffix("/predictions") for key in keys if key.endswith("/predictions"))
        return [split for split in splits if f"{split}/references" not in keys]

    def read_all(self) -> Found:
        """Every run folder read once, by run_id."""
        read = {path.name: self.read(path.name) for path in self._folders()}
        return Found([record for record in read.values() if record], [name for name in read if read[name] is None])

    def records(self) -> list[RunRecord]:
        """Every readable record, by run_id."""
        return self.read_all().records

    def damaged(self) -> list[str]:
        """Run folders whose record cannot be read."""
        return self.read_all().damaged

    def _folders(self) -> list[Path]:
        if not self.runs.is_dir():
            return []
        return sorted(self.runs.iterdir())


def _json_rows(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """History rows as JSON allows them: a non-finite number becomes null."""

    def allowed(value: Any) -> Any:
        if isinstance(value, list):
            return [allowed(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return [{key: allowed(value) for key, value in row.items()} for row in history]
