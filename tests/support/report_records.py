"""Run records made up for the tests of the report."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from harness.parameters import ParameterCount
from harness.record.environment import Environment
from harness.record.record import Forgetting, RunRecord, Seconds
from harness.record.store import RecordStore
from harness.report.board.leaderboard import Board, leaderboards
from harness.report.board.notes import with_notes
from harness.report.board.runs import runs_of
from harness.spec import RunSpec, Search, TrainSpec

ENVIRONMENT = Environment(
    harness="0.1.0",
    commit=None,
    dirty=None,
    python="3.11.0",
    platform="Linux",
    processor="a processor",
    packages={},
    device="cpu",
)
DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8, "targets": ("query", "value")},
    "debora": {"tau": 16.0, "rank": 8, "recipe": "ours"},
}


def _named(defaults: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    plain = json.loads(json.dumps(defaults))
    order = [*(key for key in plain if key in parameters), *(key for key in parameters if key not in plain)]
    return {key: parameters[key] for key in order if parameters[key] != plain.get(key)}


NAMING = {method: functools.partial(_named, defaults) for method, defaults in DEFAULTS.items()}


def forgot(rise: float, fingerprint: str = "one") -> Forgetting:
    return Forgetting(sample="s.txt", fingerprint=fingerprint, windows=2, tokens=8, untouched=3.0, trained=3.0 + rise)


def record(
    method: str = "lora", task: str = "digits", seed: int = 0, score: float | None = 0.5, **changes: Any
) -> RunRecord:
    """A run; `changes` are fields of RunSpec and RunRecord, and `numbers`, the adapter's parameters at the end."""
    numbers = changes.pop("numbers", 1000)
    spec = {
        "method_version": 1,
        "method_parameters": {},
        "task_version": 1,
        "task_parameters": {},
        "data_fingerprint": "da7a00000000aaaa",
        "model_fingerprint": "30de100000000000",
        "train": TrainSpec(batches=100),
    }
    spec |= {name: changes.pop(name) for name in list(changes) if name in RunSpec.model_fields}
    made = RunSpec(method=method, task=task, seed=seed, **spec)
    headline = changes.pop("headline", "accuracy")
    values: dict[str, Any] = {
        "run_id": made.run_id,
        "spec": made,
        "status": "done" if score is not None else "failed",
        "headline": headline,
        "score": score,
        "metrics": ({} if score is None else {headline: score}) | changes.pop("others", {}),
        "parameters": ParameterCount(
            adapter_initial=numbers, adapter_peak=numbers, adapter_final=numbers, head=10, total=10**6, stored_bytes=1
        ),
        "batches": 100,
        "seconds": Seconds(training=60.0, total=70.0),
        "peak_bytes": 1_240_000_000,
        "environment": ENVIRONMENT,
        "started": "2025-01-01T00:00:00+00:00",
    }
    return RunRecord(**(values | changes))


def boards(*records: RunRecord) -> list[Board]:
    return [with_notes(each) for each in leaderboards(runs_of(records, NAMING))]


def board(*records: RunRecord) -> Board:
    (only,) = boards(*records)
    return only


def stored(path: Path, *records: RunRecord) -> RecordStore:
    store = RecordStore(path)
    store.make_ready()
    for each in records:
        store.write(each, [], store.draft(each.run_id))
    return store


def predicted(folder: Path, predictions: np.ndarray, references: np.ndarray, split: str = "validation") -> None:
    """Write a run's predictions on one split."""
    arrays = {f"{split}/predictions": predictions, f"{split}/references": references}
    save_file(arrays, folder / "predictions.safetensors")


def rewritten(store: RecordStore, run_id: str, name: str, content: bytes) -> None:
    """Another content of one of a run's files, which the run has written as far as its record knows."""
    (store.folder(run_id) / name).write_bytes(content)
    changed = store.load(run_id)
    changed = changed.model_copy(update={"files": changed.files | {name: hashlib.sha256(content).hexdigest()}})
    (store.folder(run_id) / "record.json").write_text(changed.to_json())


def trial(method: str = "lora", learning_rate: float = 1e-3, holdout: float | None = 0.5, **changes: Any) -> RunRecord:
    """A trial of a search for the learning rate; see `record`. `holdout` None: it diverged."""
    parameters = {**DEFAULTS[method], "learning_rate": learning_rate}
    search = Search(role="trial", parameters=("learning_rate",))
    changes |= {"score": None, "status": "diverged" if holdout is None else "done", "seed": 1_000_000}
    changes |= {"holdout": {} if holdout is None else {"accuracy": holdout}}
    return record(method, method_parameters=parameters, search=search, **changes)


def chosen(trials: Sequence[RunRecord], learning_rate: float, **changes: Any) -> RunRecord:
    """A run of the setting that was chosen by the trials."""
    spec = trials[0].spec
    search = Search(role="chosen", parameters=("learning_rate",), trials=tuple(each.run_id for each in trials))
    parameters = spec.method_parameters | {"learning_rate": learning_rate}
    return record(spec.method, spec.task, method_parameters=parameters, search=search, **changes)
