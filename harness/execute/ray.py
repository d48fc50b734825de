"""Runs as trials of Ray Tune: on the CPUs and GPUs of this machine, or of a cluster.

A worker is a process that carries out one run after the other (Tune's `reuse_actors`), so that it imports torch once.
What the runs of a task share, their encoded data, is in Ray's object store, once a machine. Records, checkpoints and
progress go through the results folder, which every machine must see; Tune's own files are of no use afterwards.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from ray import tune

from harness.errors import InputError
from harness.execute.cluster import bundle, connect, marker, own_folder, slots
from harness.execute.protocol import Execute, wait_for_others
from harness.execute.worker import RunFailed, Worker
from harness.record import locks
from harness.record.record import RunRecord
from harness.record.store import RecordStore
from harness.spec import Execution, RunSpec
from harness.storage import Unwritable

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

    from harness.execute.view import View
    from harness.run.data import Key

LOOK_SECONDS = 0.5  # between looks at the progress of the runs
DIED = "the worker process died: killed, out of memory, or its machine left"
TUNE_SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupt is the command line's
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # the records are the state
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # each is one line of ours
    "RAY_AIR_NEW_OUTPUT": "0",  # which would print a banner
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


class _End(tune.Stopper):
    """Ends a pass for all of its runs, once there is a reason."""

    def __init__(self) -> None:
        self.reason: InputError | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No run is ended for what it has reported."""
        return False

    def stop_all(self) -> bool:
        """Asked for by Tune again and again."""
        return self.reason is not None


class _Observer(tune.Callback):
    """The driver's side: tells the view of every run, and makes the record of one whose worker died."""

    def __init__(self, specs: Mapping[str, RunSpec], store: RecordStore, view: View, driver: _Driver) -> None:
        self.specs = specs  # by their JSON
        self.store = store
        self.view = view
        self.driver = driver
        self.end = _End()
        self.busy: list[RunSpec] = []
        self._at_work: set[str] = set()  # run_ids
        self._next_look = 0.0

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A worker begins with a run."""
        self._at_work.add(self._spec(trial).run_id)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Many times a second: pass on what the runs have told of their progress."""
        if time.monotonic() < self._next_look:
            return
        if not self.driver.marker.exists():
            self._unwritable(f"--results '{self.store.results}' has gone while the sweep ran")
        for run_id in self._at_work:
            progress = locks.progress(self.store.running, run_id)
            if progress is not None and progress.budget:
                self.view.step(progress)
        self._next_look = time.monotonic() + LOOK_SECONDS + len(self._at_work) / 100

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A run has its record, or belongs to another process."""
        spec = self._spec(trial)
        self._at_work.discard(spec.run_id)
        if message := trial.last_result.get("unwritable"):
            self._unwritable(message)
            return
        record = self._read(spec)
        if trial.last_result.get("busy") or record is None:
            self.busy.append(spec)
        else:
            self.view.ended(record)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A run failed and will be resumed."""
        spec = self._spec(trial)
        self._at_work.discard(spec.run_id)
        locks.release(self.store.running, spec.run_id, self.driver.sweep)
        reason, _ = self._reason(spec, trial)
        self.view.retried(spec, reason, trial.num_failures, self.driver.execution.max_retries)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A run failed for the last time."""
        from harness.execute.view import title
        from harness.run.failure import failed_record

        spec = self._spec(trial)
        self._at_work.discard(spec.run_id)
        locks.release(self.store.running, spec.run_id, self.driver.sweep)
        reason, trace = self._reason(spec, trial)
        record = self._read(spec)
        if record is None or record.error != reason:
            try:
                with self.store.writing():
                    draft = self.store.draft(spec.run_id)
                record = self.store.write(failed_record(spec, reason, trace), [], draft)
            except InputError as error:
                self.view.note(f"{title(spec)}: {reason}; no record could be kept of it")
                self._unwritable(str(error))
                return
        self.view.ended(record)

    def _read(self, spec: RunSpec) -> RunRecord | None:
        try:
            return self.store.read(spec.run_id)
        except InputError as error:
            self.end.reason = error
            return None

    def _unwritable(self, message: str) -> None:
        """The results folder cannot be written: no run can be kept, so that none is worth its time."""
        self.end.reason = self.end.reason or Unwritable(message)

    def _spec(self, trial: Trial) -> RunSpec:
        return self.specs[trial.config["spec"]]

    def _reason(self, spec: RunSpec, trial: Trial) -> tuple[str, str]:
        """Why the last attempt failed: one line, and the traceback."""
        for stack in self.store.running.glob(f"{spec.run_id}-*-stack"):
            if hanging := stack.read_text():
                stack.unlink()
                return f"it did not end within --run-timeout {self.driver.execution.run_timeout:g} s", hanging
        text = Path(trial.error_file).read_text().rpartition("Failure # ")[2]
        lines = [line for line in text.splitlines()[1:] if line.strip()]
        record = self._read(spec)
        if RunFailed.__name__ in lines[-1] and record is not None and record.error:
            return record.error, record.traceback or text
        if "died" in lines[0] or "unavailable" in lines[0]:
            return DIED, text
        return re.sub(r"^[\w.]+\.(\w+:)", r"\1", lines[-1].strip()), text  # the error's name without its module


class _Driver(NamedTuple):
    """The process that plans and watches."""

    execution: Execution
    sweep: str  # its name in its workers' run locks
    marker: Path  # a file below the results folder, there as long as the folder is


class _Session:
    """A connection to Ray, and what its passes share."""

    def __init__(self, execution: Execution, resources: dict[str, float], folder: Path) -> None:
        self.execution = execution
        self.resources = resources
        self.folder = folder
        self.shared: dict[Key, Any] = {}

    def execute(self, specs: Sequence[RunSpec], store: RecordStore, view: View) -> None:
        """See `harness.execute.protocol.Execute`."""
        missing = [_with_absolute_paths(spec) for spec in specs]
        for spec, absolute in zip(specs, missing, strict=True):
            self._share(spec, absolute)
        with marker(store) as seen:
            while missing:
                driver = _Driver(self.execution, uuid.uuid4().hex, seen)
                missing = wait_for_others(self._pass(missing, store, view, driver), store, view)

    def _share(self, spec: RunSpec, absolute: RunSpec) -> None:
        """Put the encoded data of the run's task into the object store, once."""
        from harness import registry
        from harness.run import data

        task = registry.task_of(spec)
        key = data.key_of(task, absolute.place.data_root, spec.limits, absolute.place.model)
        if key not in self.shared:
            whole = data.data_of(task, spec.place.data_root, spec.limits, spec.place.model)
            self.shared[key] = ray.put(whole.without_texts())

    def _pass(self, specs: Sequence[RunSpec], store: RecordStore, view: View, driver: _Driver) -> list[RunSpec]:
        """Carry out the runs, but those in progress elsewhere: returns these. Raises Unwritable and Unreadable."""
        execution = self.execution
        observer = _Observer({spec.model_dump_json(): spec for spec in specs}, store, view, driver)
        worker = tune.with_parameters(
            Worker,
            results=str(store.results.resolve()),
            marker=str(driver.marker),
            sweep=driver.sweep,
            run_timeout=execution.run_timeout,
            shared=self.shared,
        )
        tune.run(  # not Tuner, which would write the callback to disk
            worker,
            config={"spec": tune.grid_search(list(observer.specs))},
            resources_per_trial=tune.PlacementGroupFactory([self.resources]),
            reuse_actors=True,
            max_failures=execution.max_retries,
            raise_on_failed_trial=False,
            callbacks=[observer],
            stop=observer.end,
            name=uuid.uuid4().hex[:8],
            storage_path=str(self.folder),
            trial_name_creator=_trial_id,
            trial_dirname_creator=_trial_id,
            verbose=0,
        )
        if observer.end.reason is not None:
            raise observer.end.reason
        return observer.busy


@contextmanager
def session(execution: Execution, threads: int, device: str) -> Iterator[Execute]:
    """Start Ray on this machine or join a cluster; see `harness.execute.protocol.Execute`."""
    os.environ.update(TUNE_SETTINGS)
    with own_folder() as folder:
        connect(execution, folder)
        try:
            resources = bundle(execution, threads, device)
            if execution.address is None:  # workers to come need not be asked for ahead
                os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", str(slots(resources)))
            yield _Session(execution, resources, folder / "tune").execute
        finally:
            ray.shutdown()


def _trial_id(trial: Trial) -> str:
    return str(trial.trial_id)


def _with_absolute_paths(spec: RunSpec) -> RunSpec:
    """The same run for a process with another working folder."""
    paths = {}
    for name in ("data_root", "model"):
        path = getattr(spec.place, name)
        if path is not None and Path(path).expanduser().is_dir():
            paths[name] = str(Path(path).expanduser().resolve())
    return spec.model_copy(update={"place": spec.place.model_copy(update=paths)})
