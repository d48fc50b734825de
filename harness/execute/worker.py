"""The worker's side of Ray Tune: a process that carries out one run after the other."""

from __future__ import annotations

import contextlib
import faulthandler
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune

from harness import registry
from harness.execute.cluster import unseen
from harness.record import processes
from harness.record.store import RecordStore
from harness.run import data
from harness.spec import RunSpec
from harness.storage import Unreadable, Unwritable

if TYPE_CHECKING:
    from harness.run.data import Key


class RunFailed(Exception):
    """A run's record says failed: Tune is to take it up again."""


class Worker(tune.Trainable):
    """A process that carries out runs. A trial's configuration is {"spec": a RunSpec as JSON}."""

    def setup(
        self,
        config: dict[str, Any],
        results: str = "",
        marker: str = "",
        sweep: str = "",
        run_timeout: float | None = None,
        shared: Mapping[Key, Any] | None = None,
    ) -> None:
        """Called once a process. `marker`: a file below `results`, there where this machine sees the folder.
        `sweep`: the driver's name in run locks. `shared`: references to the encoded data of each task."""
        from harness.execute.process import quiet_environment

        quiet_environment()
        self.store = RecordStore(Path(results))
        self.marker = Path(marker)
        self.sweep = sweep
        self.run_timeout = run_timeout
        self.shared = shared or {}
        self.reset_config(config)
        self._warm_up()

    def _warm_up(self) -> None:
        """Import what a run needs, which is not the first run's time. What is wrong, the run itself tells."""
        import harness.run.run  # noqa: F401

        with contextlib.suppress(Exception):
            registry.method_class(self.spec.method)
            task = registry.task_of(self.spec)
            task.backbone(self.spec.place.model, meta=True, trust_remote_code=self.spec.place.trust_remote_code)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next run."""
        self.spec = RunSpec.model_validate_json(new_config["spec"])
        return True

    def step(self) -> dict[str, Any]:
        """Carry out the run. Raises RunFailed where it failed, and ends the process where it hangs."""
        from harness.execute.once import run_once

        if not self.marker.exists():
            raise unseen(self.store.results, [socket.gethostname()])
        self._take_data()
        try:
            stack = self.store.running / processes.own_name(self.spec.run_id, "stack")
            with self.store.writing(), _watched(stack, self.run_timeout):
                record = run_once(self.spec, self.store, sweep=self.sweep)
        except (Unwritable, Unreadable) as error:  # ends the sweep: no other attempt would do better
            return {"done": True, "unwritable": str(error)}
        if record is not None and record.may_do_better:
            raise RunFailed(record.error)
        return {"done": True, "busy": record is None}

    def _take_data(self) -> None:
        """The task's data from the object store, where this process does not have it."""
        place = self.spec.place
        task = registry.task_of(self.spec)
        key = data.key_of(task, place.data_root, self.spec.limits, place.model)
        if key in self.shared and not data.is_kept(key):
            data.keep(key, ray.get(self.shared[key]))


@contextmanager
def _watched(stack: Path, seconds: float | None) -> Iterator[None]:
    """End this process after so many seconds, with the stack of every thread in a file: a hanging extension would not
    let Python raise an exception."""
    if seconds is None:
        yield
        return
    with stack.open("w") as stream:
        faulthandler.dump_traceback_later(seconds, exit=True, file=stream)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
    stack.unlink(missing_ok=True)
