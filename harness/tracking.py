"""Finished records in MLflow: the only file that imports it. A view: everything in it can be made again from records.

A parent run for each setting (the runs that share everything but method, seed and task), in it a run for each record,
found again by its tag `harness.run_id`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.record import RunRecord
from harness.record_store import RecordStore

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, Run

EXPERIMENT = "rank-adaptive-harness"
RUN_ID, CONTENT, SETTING, PARENT = "harness.run_id", "harness.content", "harness.setting", "mlflow.parentRunId"
MOST_POINTS = 100  # of a curve: MLflow takes a tenth of a millisecond for each
MOST_METRICS, MOST_PARAMETERS = 900, 100  # of one call, to which MLflow allows 1000 of both together
LONGEST_VALUE = 6000  # signs of a parameter, as MLflow allows


class Unreachable(RuntimeError):
    """The tracking server or database cannot be used; the message is one line."""


def default_uri(results: Path) -> str:
    """The results folder's own database."""
    return f"sqlite:///{(results / 'mlflow.db').resolve()}"


def log_records(
    store: RecordStore,
    records: Sequence[RunRecord],
    uri: str | None = None,
    pictures: Sequence[Path] = (),
    told: Callable[[int], None] = lambda done: None,
) -> int:
    """Log every record that the tracking server does not have as it is, with its curves, thinned, and its files.

    A record that has changed since (a failed run made again) replaces what was logged of it. `pictures` go to the
    parents. `told` is called after each record with their number so far. Returns how many were logged.

    Raises Unreachable where the server or the database cannot be used; what was logged until then stays.
    """
    _be_quick_and_quiet()
    import mlflow  # takes seconds
    from sqlalchemy.exc import SQLAlchemyError

    failures = (mlflow.exceptions.MlflowException, SQLAlchemyError, OSError)
    try:
        client = mlflow.MlflowClient(tracking_uri=uri or default_uri(store.results))
        experiment = _experiment(client, store.results)
        return _Log(client, experiment, store).all(records, pictures, told)
    except failures as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Unreachable(f"{uri or default_uri(store.results)}: {first}") from None


def thinned(rows: Sequence[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """At most `most` of the points, evenly spread, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(place * (len(rows) - 1) / (most - 1))] for place in range(most)]


def curves(history: Iterable[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(batches, value) by name, thinned, of everything in a history that is one finite number."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in history:
        for name, value in row.items():
            if name not in ("batches", "update") and isinstance(value, (int, float)) and abs(value) < float("inf"):
                found.setdefault(name, []).append((row["batches"], float(value)))
    return {name: thinned(points) for name, points in found.items()}


class _Log:
    def __init__(self, client: MlflowClient, experiment: str, store: RecordStore) -> None:
        self.client, self.experiment, self.store = client, experiment, store
        self.parents: dict[str, str] = {}
        self.known: dict[str, Run] = {}
        for run in self._runs():
            tags = run.data.tags
            if RUN_ID in tags:
                self.known[tags[RUN_ID]] = run
            elif SETTING in tags:
                self.parents[tags[SETTING]] = run.info.run_id

    def all(self, records: Sequence[RunRecord], pictures: Sequence[Path], told: Callable[[int], None]) -> int:
        logged = 0
        for done, record in enumerate(records, 1):
            logged += self._one(record)
            told(done)
        parents = {record.spec.setting_key: self._parent(record) for record in records} if logged else {}
        for key, parent in parents.items():
            for path in pictures:
                own = re.search(r"_([0-9a-f]{8})$", path.stem)  # of several settings each has its own pictures
                if own[1] == key if own else len(parents) == 1:
                    self.client.log_artifact(parent, str(path), "pictures")
        return logged

    def _runs(self) -> Iterator[Run]:
        token = None
        while True:
            page = self.client.search_runs([self.experiment], max_results=1000, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _one(self, record: RunRecord) -> bool:
        content = hashlib.sha256(record.model_dump_json().encode()).hexdigest()[:16]
        known = self.known.get(record.run_id)
        if known is not None:
            if known.data.tags.get(CONTENT) == content and known.info.status != "RUNNING":
                return False
            self.client.delete_run(known.info.run_id)  # changed since, or cut off while it was logged
        started = _milliseconds(record.started)
        name = f"{record.spec.method} {record.spec.task} seed {record.spec.seed}"
        tags = {RUN_ID: record.run_id, CONTENT: content, PARENT: self._parent(record), "harness.status": record.status}
        run = self.client.create_run(self.experiment, start_time=started, tags=tags, run_name=name)
        self._content(run.info.run_id, record, started)
        status = "FINISHED" if record.status in ("done", "unsupported") else "FAILED"
        self.client.set_terminated(run.info.run_id, status, started + round(1000 * record.seconds.total))
        return True

    def _content(self, mlflow_id: str, record: RunRecord, started: int) -> None:
        parameters = list(_parts(_parameters(record), MOST_PARAMETERS))
        metrics = list(_parts(_metrics(record, self._history(record.run_id), started), MOST_METRICS))
        for some_parameters, some_metrics in itertools.zip_longest(parameters, metrics, fillvalue=()):
            self.client.log_batch(mlflow_id, params=some_parameters, metrics=some_metrics)
        folder = self.store.folder(record.run_id)
        for path in (folder / "record.json", folder / "adapter", folder / "artifacts"):
            if path.is_dir():
                self.client.log_artifacts(mlflow_id, str(path), path.name)
            elif path.is_file():
                self.client.log_artifact(mlflow_id, str(path))

    def _history(self, run_id: str) -> list[dict[str, Any]]:
        try:
            return self.store.history(run_id)
        except (OSError, ValueError):
            return []

    def _parent(self, record: RunRecord) -> str:
        key = record.spec.setting_key
        if key not in self.parents:
            run = self.client.create_run(self.experiment, tags={SETTING: key}, run_name=f"setting {key}")
            self.client.set_terminated(run.info.run_id)
            self.parents[key] = run.info.run_id
        return self.parents[key]


def _parts(values: Sequence[Any], most: int) -> Iterator[Sequence[Any]]:
    return (values[first : first + most] for first in range(0, len(values), most))


def _parameters(record: RunRecord) -> list[Param]:
    from mlflow.entities import Param

    spec = record.spec.model_dump(mode="json", exclude={"place", "search"})
    flat = {name: value for name, value in spec.items() if not isinstance(value, dict)}
    flat["search"] = record.spec.search.role if record.spec.search else "none"
    for group in ("method_parameters", "task_parameters", "train"):
        flat |= {f"{group.removesuffix('_parameters')}.{name}": value for name, value in spec[group].items()}
    environment = record.environment.model_dump(mode="json", exclude={"packages"}) | record.environment.packages
    flat |= {f"environment.{name}": value for name, value in environment.items()}
    return [
        Param(name, value if isinstance(value, str) else json.dumps(value)[:LONGEST_VALUE])
        for name, value in flat.items()
    ]


def _metrics(record: RunRecord, history: list[dict[str, Any]], started: int) -> list[Metric]:
    """Curves by batches, at the time in which the run reached them, evenly; then what holds at the end, the rank curve
    by ranks."""
    from mlflow.entities import Metric

    total, last = 1000 * record.seconds.total, max(1, record.batches)
    found = [
        Metric(name, value, started + round(total * step / last), step)
        for name, points in curves(history).items()
        for step, value in points
    ]
    final: dict[str, float | None] = {"score": record.score, "rank_total": sum(record.ranks.values()) or None}
    final |= {f"evaluation.{name}": value for name, value in record.metrics.items()}
    final |= {f"holdout.{name}": value for name, value in record.holdout.items()}
    final |= {f"seconds.{name}": value for name, value in record.seconds.model_dump().items()}
    final |= {f"parameters.{name}": value for name, value in (record.parameters or {})}
    final |= {f"rank.{layer}": float(rank) for layer, rank in record.ranks.items()}
    final |= {"peak_bytes": record.peak_bytes, "batches": record.batches, "updates": record.updates}
    end = started + round(total)
    found += [Metric("score_at_rank", value, end, rank) for rank, value in record.rank_curve.items()]
    return found + [
        Metric(name, float(value), end, record.batches) for name, value in final.items() if value is not None
    ]


def _experiment(client: MlflowClient, results: Path) -> str:
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    local = client.tracking_uri.startswith("sqlite:")
    return client.create_experiment(EXPERIMENT, str((results / "mlflow").resolve()) if local else None)


def _milliseconds(date: str) -> int:
    return round(1000 * datetime.fromisoformat(date).timestamp())


def _be_quick_and_quiet() -> None:
    """A server that is down is given up after seconds, not minutes; the database need not survive a power cut, since it
    can be made again, and waits for no disk: 20 times as fast."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    for name in ("mlflow", "alembic"):  # the variable is too late where Ray has imported mlflow
        logging.getLogger(name).setLevel(logging.ERROR)
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    if not event.contains(Engine, "connect", _no_waiting):
        event.listen(Engine, "connect", _no_waiting)


def _no_waiting(connection: Any, _: object) -> None:
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous=OFF")
