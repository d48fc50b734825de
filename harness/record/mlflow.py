"""Finished records in MLflow, which this file and `tracking_database` alone import. A view: everything in it can be
made again from records, and no failure of it is a failure of the runs.

A parent run for each setting (the runs that share everything but method, seed and task), in it a run for each record,
found again by its tag `harness.run_id`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.record import mlflow_database as database
from harness.record.record import RunRecord
from harness.record.store import RecordStore

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, Run

EXPERIMENT = "rank-adaptive-harness"
RUN_ID, CONTENT, SETTING, PARENT = "harness.run_id", "harness.content", "harness.setting", "mlflow.parentRunId"
MOST_POINTS = 100  # of a curve: MLflow takes a tenth of a millisecond for each
MOST_METRICS, MOST_PARAMETERS = 900, 100  # of one call, to which MLflow allows 1000 of both together
LONGEST_VALUE = 6000  # signs of a parameter, as MLflow allows
HIGHEST_STEP, LARGEST = 2**53, sys.float_info.max  # beyond them a curve's point is garbled


class Unreachable(RuntimeError):
    """The tracking server or database cannot be used; the message is one line."""


def default_uri(results: Path) -> str:
    """The results folder's own database."""
    return database.address(results / database.DATABASE)


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
    One process at a time logs a results folder. Its own database (`uri` None) is made again where it is broken, with
    every record of the store, and a line on stderr says so.

    Raises Unreachable, and nothing else, where the server or the database cannot be used, or refuses a record; what
    was logged until then stays, and a record that is refused does not keep the others out.
    """
    try:
        with database.quick_and_quiet(), database.alone(store.results):
            return _log(store, records, uri, pictures, told)
    except Exception as error:
        raise Unreachable(f"{uri or store.results / database.DATABASE}: {database.first_line(error)}") from None


def _log(
    store: RecordStore,
    records: Sequence[RunRecord],
    uri: str | None,
    pictures: Sequence[Path],
    told: Callable[[int], None],
) -> int:
    refused: list[str] = []

    def fill(draft: str) -> None:
        given = {record.run_id for record in records}
        _Log(draft, store, refused).all([record for record in store.records() if record.run_id not in given])

    if uri is None:
        database.make_sound(store.results, EXPERIMENT, fill)
    logged = _Log(uri or default_uri(store.results), store, refused).all(records, pictures, told)
    if refused:
        raise ValueError(f"{len(refused)} of the records could not be logged, the first of them {refused[0]}")
    return logged


def thinned(rows: Sequence[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """At most `most` of the points, evenly spread, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(place * (len(rows) - 1) / (most - 1))] for place in range(most)]


def curves(history: Iterable[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(batches, value) by name, thinned, of everything in a history that is one finite number."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in history:
        if not 0 <= row["batches"] <= HIGHEST_STEP:
            continue
        for name, value in row.items():
            if name not in ("batches", "update") and isinstance(value, (int, float)) and abs(value) <= LARGEST:
                found.setdefault(name, []).append((row["batches"], float(value)))
    return {name: thinned(points) for name, points in found.items()}


class _Log:
    """One experiment, and what it has. `refused` is given a line for each record that MLflow does not take."""

    def __init__(self, uri: str, store: RecordStore, refused: list[str]) -> None:
        from mlflow import MlflowClient

        self.client, self.store, self.refused = MlflowClient(tracking_uri=uri), store, refused
        self.experiment = _experiment(self.client, store.results)
        self.parents: dict[str, str] = {}
        self.known: dict[str, Run] = {}
        for run in self._runs():
            tags = run.data.tags
            if RUN_ID in tags:
                self.known[tags[RUN_ID]] = run
            elif SETTING in tags:
                self.parents[tags[SETTING]] = run.info.run_id

    def all(
        self,
        records: Sequence[RunRecord],
        pictures: Sequence[Path] = (),
        told: Callable[[int], None] = lambda done: None,
    ) -> int:
        logged = 0
        for done, record in enumerate(records, 1):
            try:
                logged += self._one(record)
            except Exception as error:
                if not _of_the_record(error):
                    raise
                self.refused.append(f"{record.run_id!r}: {database.first_line(error)}")
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
        if known is not None and known.data.tags.get(CONTENT) == content and known.info.status != "RUNNING":
            return False
        started = _milliseconds(record.started)
        parameters = list(_parts(_parameters(record), MOST_PARAMETERS))
        metrics = list(_parts(_metrics(record, self._history(record.run_id), started), MOST_METRICS))
        if known is not None:
            self.client.delete_run(known.info.run_id)  # changed since, or cut off while it was logged
        name = f"{record.spec.method} {record.spec.task} seed {record.spec.seed}"
        tags = {RUN_ID: record.run_id, CONTENT: content, PARENT: self._parent(record), "harness.status": record.status}
        run = self.client.create_run(self.experiment, start_time=started, tags=tags, run_name=name)
        try:
            for some_parameters, some_metrics in itertools.zip_longest(parameters, metrics, fillvalue=()):
                self.client.log_batch(run.info.run_id, params=some_parameters, metrics=some_metrics)
            for path, place in self._files(record.run_id):
                self.client.log_artifact(run.info.run_id, str(path), place)
            status = "FINISHED" if record.status in ("done", "unsupported") else "FAILED"
            self.client.set_terminated(run.info.run_id, status, started + round(1000 * record.seconds.total))
        except Exception as error:
            if _of_the_record(error):
                self.client.delete_run(run.info.run_id)
            raise
        return True

    def _folder(self, run_id: str) -> Path | None:
        """The run's folder; None for a foreign record whose run_id leads elsewhere."""
        folder = self.store.folder(run_id).resolve()
        return folder if folder.parent == self.store.runs.resolve() else None

    def _files(self, run_id: str) -> Iterator[tuple[Path, str | None]]:
        """(file, its folder in MLflow) of what is logged; nothing that a link takes from outside of the run."""
        folder = self._folder(run_id)
        if folder is None:
            return
        for part in ("record.json", "adapter", "artifacts"):
            for path in [folder / part, *sorted((folder / part).rglob("*"))]:
                if path.is_file() and path.resolve().is_relative_to(folder):
                    place = path.parent.relative_to(folder).as_posix()
                    yield path, None if place == "." else place

    def _history(self, run_id: str) -> list[dict[str, Any]]:
        """The run's history; none where it is garbled."""
        try:
            return self.store.history(run_id) if self._folder(run_id) else []
        except (OSError, ValueError, RecursionError):
            return []

    def _parent(self, record: RunRecord) -> str:
        key = record.spec.setting_key
        if key not in self.parents:
            run = self.client.create_run(self.experiment, tags={SETTING: key}, run_name=f"setting {key}")
            self.client.set_terminated(run.info.run_id)
            self.parents[key] = run.info.run_id
        return self.parents[key]


def _of_the_record(error: Exception) -> bool:
    """Whether one record is at fault, a foreign one perhaps, and not the server or the disk."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    if isinstance(error, MlflowException):
        return error.error_code == "INVALID_PARAMETER_VALUE" or isinstance(error.__cause__, (ValueError, OverflowError))
    return not isinstance(error, (OSError, SQLAlchemyError))


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
        Param(_key(name), (value if isinstance(value, str) else json.dumps(value))[:LONGEST_VALUE])
        for name, value in flat.items()
    ]


def _metrics(record: RunRecord, history: list[dict[str, Any]], started: int) -> list[Metric]:
    """Curves by batches, at the time in which the run reached them, evenly; then what holds at the end, the rank curve
    by ranks."""
    from mlflow.entities import Metric

    total, last = 1000 * record.seconds.total, max(1, record.batches)
    found = [
        Metric(_key(name), value, started + round(total * min(1, step / last)), step)
        for name, points in curves(history).items()
        for step, value in points
    ]
    final: dict[str, float | None] = {"score": record.score, "rank_total": sum(record.ranks.values()) or None}
    final |= {f"evaluation.{name}": value for name, value in record.metrics.items()}
    final |= {f"holdout.{name}": value for name, value in record.holdout.items()}
    final |= {f"seconds.{name}": value for name, value in record.seconds.model_dump().items()}
    final |= {f"parameters.{name}": value for name, value in (record.parameters or {})}
    final |= {f"rank.{layer}": float(rank) for layer, rank in record.ranks.items()}
    for name in (
        "tokens",
        "peak_bytes",
        "training_peak_bytes",
        "training_reserved_bytes",
        "optimizer_bytes",
        "backbone_bytes",
        "file_bytes",
    ):
        final[name] = getattr(record, name)
    final |= {"batches": record.batches, "updates": record.updates}
    if record.forgetting is not None:
        final |= {"forgetting": record.forgetting.rise}
    if (timed := record.generation) is not None:
        name = "seconds_a_generated_token"
        final |= {f"{name}.untouched": timed.untouched, f"{name}.trained": timed.trained}
    end = started + round(total)
    found += [Metric("score_at_rank", value, end, rank) for rank, value in record.rank_curve.items()]
    return found + [
        Metric(_key(name), float(value), end, record.batches) for name, value in final.items() if value is not None
    ]


def _experiment(client: MlflowClient, results: Path) -> str:
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    local = client.tracking_uri.startswith("sqlite")
    return client.create_experiment(EXPERIMENT, database.files_of(results) if local else None)


def _key(name: str) -> str:
    """A name with the signs that MLflow takes."""
    return re.sub(r"[^\w./ -]", "_", name)


def _milliseconds(date: str) -> int:
    """Since 1970, at least 1, as for what is no date: MLflow takes 0 for now."""
    try:
        return max(1, round(1000 * datetime.fromisoformat(date).timestamp()))
    except (ValueError, OverflowError, OSError):
        return 1
