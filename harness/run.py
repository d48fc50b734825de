"""run_one(spec) -> RunRecord: one run from data to record, whatever becomes of it."""

from __future__ import annotations

import functools
import gc
import math
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from harness import checkpoint, registry
from harness.environment import environment
from harness.errors import Diverged, InputError
from harness.memory import PeakMemory
from harness.method import Adaptation, Backbone, Method
from harness.record import RETRIED, RecordStore, RunRecord, Seconds, Status
from harness.spec import Place, RunSpec
from harness.task import Splits, Task, make_splits
from harness.training import Training, TrainingData, derived_seed, predict, seed_everything


@dataclass
class Progress:
    """Where a run is, for whoever watches it."""

    spec: RunSpec
    batches: int
    budget: int
    loss: float | None
    holdout: float | None  # headline metric, last time it was taken
    adapter_numbers: int


Watch = Callable[[Progress], None]


@functools.lru_cache(maxsize=8)
def splits_of(task: Task, data_root: str | None, limit: int | None) -> Splits:
    """The task's splits, kept for the next run of this process."""
    return make_splits(task, data_root, limit)


def device_of(place: Place) -> torch.device:
    """The torch device of a place; "auto" is the first GPU, else the CPU. Raises InputError for one not there."""
    if place.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(place.device)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        there = ["auto", "cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise InputError(f"--device '{place.device}' is not on this machine; available: {', '.join(there)}") from None
    return device


def run_one(spec: RunSpec, store: RecordStore, watch: Watch = lambda progress: None) -> RunRecord:
    """Carry out one run and keep its record, also when it diverges, runs out of memory or fails.

    An interrupt is passed on, and leaves no record; a checkpoint, if the spec asks for them, is taken up next time.
    """
    run = _Run(spec, store, watch)
    try:
        return run.finish(run.outcome())
    finally:
        shutil.rmtree(run.files, ignore_errors=True)  # moved into the run's folder by now, or of no use


@dataclass
class _Run:
    """What is known of a run so far; its record is made of it."""

    spec: RunSpec
    store: RecordStore
    watch: Watch
    started: float = field(default_factory=time.perf_counter)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    training: Training | None = None
    known: dict[str, Any] = field(default_factory=dict)  # fields of the record
    evaluation_seconds: float = 0.0
    earlier_seconds: float = 0.0  # of the run before it was interrupted
    error: str | None = None
    trace: str | None = None

    def __post_init__(self) -> None:
        self.device = device_of(self.spec.place)
        self.memory = PeakMemory(self.device)
        self.task = registry.make_task(self.spec.task, self.spec.task_parameters)
        self.files = self.store.draft(self.spec.run_id)

    def outcome(self) -> Status:
        """Run, and say how it went."""
        torch.set_num_threads(self.spec.threads)
        try:
            return self._attempt()
        except Diverged as error:
            self.error = str(error)
            return "diverged"
        except (MemoryError, RuntimeError) as error:
            self._keep(error)
            return "out_of_memory" if _is_out_of_memory(error) else "failed"
        except Exception as error:
            self._keep(error)
            return "failed"

    def finish(self, status: Status) -> RunRecord:
        """Write the record with everything that is known, and clean up."""
        record = self._record(status)
        self.store.write(record, _json_rows(self.training.history if self.training else []), self.files)
        if status not in RETRIED:
            checkpoint.delete(self.store.checkpoints / self.spec.run_id)
        self.training = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return record

    def _record(self, status: Status) -> RunRecord:
        training = self.training
        return RunRecord(
            run_id=self.spec.run_id,
            spec=self.spec,
            status=status,
            headline=self.task.headline,
            higher_is_better=self.task.higher_is_better,
            batches=training.used if training else 0,
            updates=training.index if training else 0,
            seconds=Seconds(
                training=training.seconds if training else 0.0,
                evaluation=self.evaluation_seconds,
                total=self.earlier_seconds + time.perf_counter() - self.started,
            ),
            peak_bytes=self.memory.bytes(),
            environment=environment(str(self.device)),
            started=self.date,
            error=self.error,
            traceback=self.trace,
            **self.known,
        )

    def _attempt(self) -> Status:
        spec, task, place = self.spec, self.task, self.spec.place
        splits = splits_of(task, place.data_root, spec.limit)
        if splits.fingerprint != spec.data_fingerprint:
            raise InputError(f"the data of '{spec.task}' changed since the run was planned: plan again")
        method = registry.make_method(spec.method, spec.method_parameters)
        seed_everything(derived_seed(spec.seed, "backbone"))
        backbone = task.backbone(place.model, trust_remote_code=place.trust_remote_code)
        self.error = method.unsupported(backbone)
        if self.error is not None:
            return "unsupported"
        backbone.module.to(self.device)
        task.artifacts(backbone.module, place.model, self.files / "artifacts" / "before")
        adaptation = self._start(method, backbone, splits)
        self._train(adaptation, splits)
        self._evaluate(adaptation, splits)
        task.artifacts(adaptation.model, place.model, self.files / "artifacts" / "after")
        if place.save_adapter:
            adaptation.export(self.files / "adapter")
        return "done"

    def _start(self, method: Method, backbone: Backbone, splits: Splits) -> Adaptation:
        spec = self.spec
        data = TrainingData(len(splits.train), spec.train.batch_size, spec.seed)
        self.known["rows"] = {"train": len(splits.train), "holdout": len(splits.holdout)} | {
            name: len(examples) for name, examples in splits.evaluation.items()
        }
        seed_everything(derived_seed(spec.seed, "method"))
        rng = torch.Generator().manual_seed(derived_seed(spec.seed, "method"))
        adaptation = method.start(backbone, spec.train, data, rng)
        encoded = self.task.encode(splits.train, spec.place.model)
        budget = spec.train.budget(len(splits.train))
        self.training = Training(adaptation, self.task, encoded, data, spec.train, self.device, budget)
        return adaptation

    def _train(self, adaptation: Adaptation, splits: Splits) -> None:
        training, place = self.training, self.spec.place
        assert training is not None
        folder = self.store.checkpoints / self.spec.run_id
        seed_everything(derived_seed(self.spec.seed, "training"))
        saved = checkpoint.load_newest(folder)
        if saved is not None:
            training.load_state_dict(saved)
            self.earlier_seconds, self.evaluation_seconds = saved["seconds_total"], saved["seconds_evaluation"]
        self.task.set_training(adaptation.model)
        points = self.spec.train.holdout_points
        due = [math.ceil(training.budget * (i + 1) / points) for i in range(points)]
        due = [batches for batches in due if batches > training.used]
        next_checkpoint = training.used + place.checkpoint_every

        def after_update(training: Training) -> None:
            nonlocal next_checkpoint
            if due and training.used >= due[0]:
                due[:] = [batches for batches in due if batches > training.used]
                training.fetch()
                training.history[-1] |= self._holdout(adaptation, splits)
            if place.checkpoint_every and next_checkpoint <= training.used < training.budget:
                next_checkpoint = training.used + place.checkpoint_every
                total = self.earlier_seconds + time.perf_counter() - self.started
                seconds = {"seconds_total": total, "seconds_evaluation": self.evaluation_seconds}
                checkpoint.save(folder, training.used, training.state_dict() | seconds)
            self._tell(training)

        training.run(after_update)
        self.known |= {"ranks": adaptation.ranks(), "parameters": adaptation.parameter_count()}

    def _holdout(self, adaptation: Adaptation, splits: Splits) -> dict[str, float]:
        """The holdout's metrics now; the last ones go into the record."""
        started = time.perf_counter()
        encoded = self.task.encode(splits.holdout, self.spec.place.model)
        references = splits.holdout.labels
        predictions = predict(adaptation, self.task, encoded, references, self.spec.train, self.device)
        self.known["holdout"] = _finite(self.task.metrics(predictions, references), "the holdout")
        self.evaluation_seconds += time.perf_counter() - started
        return {f"holdout_{name}": value for name, value in self.known["holdout"].items()}

    def _evaluate(self, adaptation: Adaptation, splits: Splits) -> None:
        """The one time that the evaluation splits are read."""
        started = time.perf_counter()
        metrics: dict[str, float] = {}
        arrays: dict[str, np.ndarray] = {}
        for name, examples in splits.evaluation.items():
            encoded = self.task.encode(examples, self.spec.place.model)
            predictions = predict(adaptation, self.task, encoded, examples.labels, self.spec.train, self.device)
            prefix = f"{name}_" if metrics else ""
            found = _finite(self.task.metrics(predictions, examples.labels), f"split '{name}'")
            metrics |= {f"{prefix}{key}": value for key, value in found.items()}
            arrays |= {f"{name}/predictions": predictions, f"{name}/references": examples.labels}
        save_file(
            {key: np.ascontiguousarray(value) for key, value in arrays.items()}, self.files / "predictions.safetensors"
        )
        self.known |= {"metrics": metrics, "score": metrics[self.task.headline]}
        self.evaluation_seconds += time.perf_counter() - started

    def _tell(self, training: Training) -> None:
        if training.index % 10 and training.used < training.budget:
            return
        last = training.history[-1] if training.history else {}
        holdout = self.known.get("holdout", {}).get(self.task.headline)
        numbers = training.adaptation.adapter_numbers()
        self.watch(Progress(self.spec, training.used, training.budget, last.get("loss"), holdout, numbers))

    def _keep(self, error: BaseException) -> None:
        lines = str(error).strip().splitlines()
        self.error = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        self.trace = traceback.format_exc()


def _finite(metrics: dict[str, float], where: str) -> dict[str, float]:
    """The metrics as plain numbers. Raises Diverged where one is not finite."""
    plain = {name: float(value) for name, value in metrics.items()}
    for name, value in plain.items():
        if not math.isfinite(value):
            raise Diverged(f"{name} is {value} on {where}")
    return plain


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text or "out of memory" in text
    )


def _json_rows(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """History rows as JSON allows them: a non-finite number becomes null."""

    def allowed(value: Any) -> Any:
        if isinstance(value, list):
            return [allowed(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return [{key: allowed(value) for key, value in row.items()} for row in history]
