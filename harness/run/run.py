"""run_one(spec) -> RunRecord: one run from data to record, whatever becomes of it."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness import registry, storage
from harness.backbone_dtype import held_bytes, lower, pack
from harness.errors import Diverged, InputError
from harness.method import Adaptation, Backbone, Method
from harness.metric import finite
from harness.record.environment import device_of, environment
from harness.record.locks import Progress
from harness.record.record import ADAPTER, HOLDOUT, PREDICTIONS, RETRIED, RunRecord, Seconds, Status, at
from harness.record.store import RecordStore
from harness.run import checkpoint
from harness.run.before_after import BeforeAfter
from harness.run.data import Data, data_of
from harness.run.failure import now
from harness.run.memory import PeakMemory, is_out_of_memory, release
from harness.run.parents import inherited, lacking, parents_of
from harness.run.prediction import predict
from harness.run.rank_curve import rank_curve
from harness.run.streams import TrainingData, derived_seed, seed_everything
from harness.run.training import Training
from harness.spec import RunSpec
from harness.storage import Unwritable

Watch = Callable[[Progress], None]


def run_one(spec: RunSpec, store: RecordStore, watch: Watch = lambda progress: None) -> RunRecord:
    """Carry out one run and keep its record, also when it diverges, runs out of memory or fails.

    An interrupt is passed on, and leaves no record; the next start resumes from a checkpoint, where the spec asks for
    them. Unwritable is passed on too: that the disk is full says nothing of the run.
    """
    with store.writing():
        run = _Run(spec, store, watch)
    try:
        return run.finish(run.outcome())
    finally:
        storage.remove(run.files)  # moved into the run's folder by now, or of no use


@dataclass
class _Run:
    """What is known of a run so far; its record is made of it."""

    spec: RunSpec
    store: RecordStore
    watch: Watch
    started: float = field(default_factory=time.perf_counter)
    date: str = field(default_factory=now)
    training: Training | None = None
    known: dict[str, Any] = field(default_factory=dict)  # fields of the record
    kept: dict[str, np.ndarray] = field(default_factory=dict)  # predictions and references by split
    evaluation_seconds: float = 0.0
    earlier_seconds: float = 0.0  # of the run before it was interrupted
    error: str | None = None
    trace: str | None = None
    unusable: list[Path] = field(default_factory=list)  # checkpoints that do not fit

    def __post_init__(self) -> None:
        self.device = device_of(self.spec.place)
        self.memory = PeakMemory(self.device)
        self.task = registry.task_of(self.spec)
        self.files = self.store.draft(self.spec.run_id)

    def outcome(self) -> Status:
        """Run, and say how it went."""
        torch.set_num_threads(self.spec.threads)
        try:
            return self._attempt()
        except checkpoint.Unusable as error:  # what it has half restored is made anew
            self.unusable.append(error.path)
            return self.outcome()
        except Diverged as error:
            self.error = str(error)
            return "diverged"
        except Unwritable:
            raise
        except (MemoryError, RuntimeError) as error:
            self._keep(error)
            return "out_of_memory" if is_out_of_memory(error) else "failed"
        except Exception as error:
            self._keep(error)
            return "failed"

    def finish(self, status: Status) -> RunRecord:
        """Write the record with everything that is known, and clean up."""
        history = self.training.history if self.training else []
        record = self.store.write(self._record(status), history, self.files)
        if status not in RETRIED:
            checkpoint.delete(self.store.checkpoints / self.spec.run_id)
        self.training = None
        release(self.device)
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
            trajectory=tuple(training.sizes.trajectory) if training else (),
            seconds=Seconds(
                training=training.seconds if training else 0.0,
                evaluation=self.evaluation_seconds,
                total=self.earlier_seconds + time.perf_counter() - self.started,
            ),
            tokens=training.tokens if training else None,
            peak_bytes=self.memory.bytes(),
            training_peak_bytes=peak.taken if (peak := self.memory.of_training()) else None,
            training_reserved_bytes=peak.reserved if peak else None,
            optimizer_bytes=training.sizes.optimizer_bytes if training else None,
            environment=environment(str(self.device)),
            started=self.date,
            error=self.error,
            traceback=self.trace,
            **self.known,
        )

    def _attempt(self) -> Status:
        spec, task, place = self.spec, self.task, self.spec.place
        parents = parents_of(spec, self.store)
        if found := lacking(spec, parents):
            self.error = found.error
            return found.status
        data = data_of(task, place.data_root, spec.limits, place.model)
        if data.splits.fingerprint != spec.data_fingerprint:
            raise InputError(f"the data of '{spec.task}' changed since the run was planned: plan again")
        method = registry.make_method(spec.method, spec.method_parameters)
        seed_everything(derived_seed(spec.seed, "backbone"))
        backbone = task.backbone(place.model, trust_remote_code=place.trust_remote_code)
        lower(backbone, spec.train.backbone_dtype)
        method, self.error = inherited(method, backbone, parents)
        if self.error is not None:
            return "unsupported"
        shapes = {layer: backbone.shape(layer) for layer in backbone.layers}  # before the method changes them
        pack(backbone, self.device)
        self.known["backbone_bytes"] = held_bytes(backbone.module)
        if not spec.is_trial:
            with self.store.writing():
                task.artifacts(backbone.module, place.model, self.files / "artifacts" / "before")
        began = time.perf_counter()
        before = BeforeAfter(spec, task, data, backbone, self.device)
        self.evaluation_seconds += time.perf_counter() - began
        adaptation = self._start(method, backbone, data)
        self._train(adaptation, data)
        self.known["shapes"] = {layer: shape for layer, shape in shapes.items() if layer in self.known["ranks"]}
        if not spec.is_trial:
            self._evaluate(adaptation, data, before)
            with self.store.writing():
                task.artifacts(adaptation.model, place.model, self.files / "artifacts" / "after")
        self._export(adaptation, ADAPTER)
        return "done"

    def _start(self, method: Method, backbone: Backbone, data: Data) -> Adaptation:
        spec, splits = self.spec, data.splits
        encoded = data.encoded("train")
        self.known["data"] = {split: facts for split in splits.by_name if (facts := data.facts(split))}
        lengths = self.task.lengths(encoded) if spec.train.group_by_length else None
        drawn = TrainingData(len(splits.train), spec.train.batch_size, spec.seed, lengths, method.upper_share)
        self.known["rows"] = {name: len(examples) for name, examples in splits.by_name.items()}
        seed_everything(derived_seed(spec.seed, "method"))
        rng = torch.Generator().manual_seed(derived_seed(spec.seed, "method"))
        adaptation = method.start(backbone, spec.train, drawn, rng)
        if spec.place.gradient_checkpointing:  # now that PEFT has not seen it: it would turn on what only costs
            backbone.checkpoint_activations()
        budget = spec.train.budget(len(splits.train))
        self.training = Training(adaptation, self.task, encoded, drawn, spec.train, self.device, budget)
        return adaptation

    def _train(self, adaptation: Adaptation, data: Data) -> None:
        training, place = self.training, self.spec.place
        assert training is not None
        folder, origin = self.store.checkpoints / self.spec.run_id, checkpoint.origin_of(self.spec)
        seed_everything(derived_seed(self.spec.seed, "training"))
        self._resume(training, checkpoint.load_newest(folder, origin, self.unusable))
        self.task.set_training(adaptation.model)
        points = max(self.spec.train.holdout_points, int(self.spec.is_trial))  # a trial is scored at its end
        due = [at for i in range(points) if (at := math.ceil(training.budget * (i + 1) / points)) > training.used]
        next_checkpoint = training.used + place.checkpoint_every

        def after_update(training: Training) -> None:
            nonlocal next_checkpoint
            if due and training.used >= due[0]:
                due[:] = [batches for batches in due if batches > training.used]
                training.settle()
                training.history[-1] |= self._holdout(adaptation, data)
            if place.checkpoint_every and next_checkpoint <= training.used < training.budget:
                next_checkpoint = training.used + place.checkpoint_every
                training.settle()
                self.memory.enter("other")
                total = self.earlier_seconds + time.perf_counter() - self.started
                state = training.state_dict() | {"seconds_total": total, "seconds_evaluation": self.evaluation_seconds}
                with self.store.writing():
                    checkpoint.save(folder, training.used, state, origin)
                self.memory.enter("training")
            self._tell(training)

        self.memory.enter("training")
        training.run(after_update)
        training.settle()
        self.memory.enter("other")
        notes = (*self.known.get("notes", ()), *adaptation.remarks())
        self.known |= {"ranks": adaptation.ranks(), "parameters": training.sizes.parameters(), "notes": notes}

    def _resume(self, training: Training, newest: checkpoint.Newest) -> None:
        """Go on from a checkpoint, where there is one. Raises Unusable for one that does not fit."""
        self.known["notes"], saved, path = newest.notes, newest.state, newest.path
        if saved is None or path is None:
            return
        try:
            training.load_state_dict(saved)
            self.earlier_seconds = float(saved["seconds_total"])
            self.evaluation_seconds += float(saved["seconds_evaluation"])
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise checkpoint.Unusable(path) from error

    def _predictions(self, adaptation: Adaptation, encoded: Any, references: np.ndarray) -> np.ndarray:
        size = self.spec.place.evaluation_batch_size
        return predict(adaptation, self.task, encoded, references, self.spec.train, self.device, size)

    def _holdout(self, adaptation: Adaptation, data: Data) -> dict[str, float]:
        """The holdout's metrics now; the last ones go into the record, and their predictions into the run's files."""
        started = time.perf_counter()
        self.memory.enter("other")
        encoded = data.encoded("holdout")
        references = self.task.gold(data.splits.holdout, encoded)
        predictions = self._predictions(adaptation, encoded, references)
        self.known["holdout"] = finite(self.task.metrics(predictions, references), "the holdout")
        self.kept |= {f"{HOLDOUT}/predictions": predictions, f"{HOLDOUT}/references": references}
        self.memory.enter("training")
        self.evaluation_seconds += time.perf_counter() - started
        return {f"holdout_{name}": value for name, value in self.known["holdout"].items()}

    def _evaluate(self, adaptation: Adaptation, data: Data, before: BeforeAfter) -> None:
        """The one time that the evaluation splits are read."""
        started = time.perf_counter()
        metrics: dict[str, float] = {}
        gold = {name: self.task.gold(rows, data.encoded(name)) for name, rows in data.splits.evaluation.items()}

        def on(name: str) -> tuple[np.ndarray, dict[str, float]]:
            predictions = self._predictions(adaptation, data.encoded(name), gold[name])
            return predictions, self.task.metrics(predictions, gold[name])

        for name, references in gold.items():
            predictions, found = on(name)
            prefix = f"{name}_" if metrics else ""
            metrics |= {f"{prefix}{key}": value for key, value in finite(found, f"split '{name}'").items()}
            self.kept |= {f"{name}/predictions": predictions, f"{name}/references": references}
        first, headline = next(iter(gold)), self.task.headline

        def at_rank(rank: int) -> float:
            self.kept[f"{first}/{at(rank)}"], found = on(first)
            self._export(adaptation, f"{ADAPTER}_{at(rank)}")
            return found[headline]

        curve = rank_curve(adaptation, self.spec.place.rank_curve, at_rank)
        if self.spec.place.predict_test:
            for name, examples in self.task.test(self.spec.place.data_root).items():
                encoded = self.task.encode(examples, self.spec.place.model)
                if facts := self.task.facts(encoded):
                    self.known["data"][name] = facts
                self.kept[f"{name}/predictions"] = self._predictions(adaptation, encoded, examples.labels)
        fields, notes = before.of(adaptation.model, self.kept)
        self.known |= fields
        self.known["notes"] += notes
        with self.store.writing():
            storage.save_arrays(self.kept, self.files / PREDICTIONS)
        self.known |= {"metrics": metrics, "score": metrics[headline], "rank_curve": curve}
        self.evaluation_seconds += time.perf_counter() - started

    def _export(self, adaptation: Adaptation, name: str) -> None:
        """Keep the adapter as it is now, where the spec asks for it."""
        if self.spec.place.save_adapter:
            with self.store.writing():
                adaptation.export(self.files / name)
            if name == ADAPTER:
                weights = (self.files / name).rglob("*.safetensors")
                self.known["file_bytes"] = sum(path.stat().st_size for path in weights)

    def _tell(self, training: Training) -> None:
        if training.index % 10 and training.used < training.budget:
            return
        size = training.sizes.trajectory[-1]
        progress = Progress(
            run_id=self.spec.run_id,
            batches=training.used,
            budget=training.budget,
            loss=training.history[-1].get("loss") if training.history else None,
            holdout=self.known.get("holdout", {}).get(self.task.headline),
            rank=size.rank,
            adapter_parameters=size.adapter_parameters,
        )
        self.watch(progress)

    def _keep(self, error: BaseException) -> None:
        lines = str(error).strip().splitlines()
        self.error = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        self.trace = traceback.format_exc()
