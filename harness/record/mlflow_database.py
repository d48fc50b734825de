"""The results folder's own MLflow database: for one process at a time, made as a draft, made again where broken."""

from __future__ import annotations

import logging
import os
import sqlite3
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from harness import storage

LOCK, DATABASE, FILES = ".mlflow.lock", "mlflow.db", "mlflow"  # in the results folder
BROKEN = "mlflow.db.broken"  # the last one that was replaced, should somebody have logged something else into it
BESIDE = ("-journal", "-wal", "-shm")  # what SQLite keeps beside a database and would apply to one that takes its place
# Any other code of SQLite's, such as busy, is no fault of the file.
FAULTS = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
PATIENCE, LONGEST_WAIT = 5, 600  # seconds for another process: without a word, and with one
BUSY = 20  # seconds that SQLite waits, as in MLflow


def address(path: Path) -> str:
    """SQLAlchemy's address of an SQLite file, with what means something else in an address quoted."""
    plain = str(path.parent.resolve() / path.name)
    quoted = quote(plain)
    # MLflow makes the parent folders of "sqlite:///" without reading its %XX: other folders than these.
    return f"{'sqlite' if quoted == plain else 'sqlite+pysqlite'}:///{quoted}"


def files_of(results: Path) -> str:
    """Where MLflow keeps the runs' files, as an address, since it takes "%", "?" and "#" of a path for one's."""
    return (results.resolve() / FILES).as_uri()


@contextmanager
def quick_and_quiet() -> Iterator[None]:
    """A server that is down is given up after seconds, not minutes; a database need not survive a power cut, since it
    can be made again, and waits for no disk: 20 times as fast. What goes wrong is told once, by who called."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _be_quick()
            yield
    finally:
        logging.disable(before)


def _be_quick() -> None:
    from mlflow.store.db import utils  # takes seconds
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    utils.MAX_RETRY_COUNT = 2  # of a connection to a database; MLflow's own takes 100 seconds
    if not event.contains(Engine, "connect", _wait_for_no_disk):
        event.listen(Engine, "connect", _wait_for_no_disk)


def _wait_for_no_disk(connection: Any, _: object) -> None:
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous=OFF")


@contextmanager
def alone(results: Path) -> Iterator[None]:
    """Keep every other process from logging this folder meanwhile.

    Raises TimeoutError where another process keeps it for minutes, and OSError where the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(results / LOCK)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        say(f"another process is logging '{results}' to MLflow: waiting for it")
        try:
            lock.acquire(timeout=LONGEST_WAIT)
        except Timeout:
            raise TimeoutError(f"another process has been logging it for {LONGEST_WAIT // 60} minutes") from None
    try:
        yield
    finally:
        lock.release()


def make_sound(results: Path, experiment: str, fill: Callable[[str], None]) -> None:
    """See to it that the folder has a database which MLflow can use; for the one that is `alone`.

    A broken one is told, kept under another name, and made again: `fill` gets the new one's address, to log what it
    must have before it is put in place.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    # No connection outlives its use, so that none goes on with a file that has been replaced.
    os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
    path, broken = results / DATABASE, results / BROKEN
    for left in results.glob(f".*-{DATABASE}*"):  # a killed process's draft, as `storage.replaced` names it
        storage.remove(left)
    fault = _fault(path)
    if fault is not None:
        say(f"'{path}' cannot be used ({fault}): made again from the records, the old one kept as {BROKEN}")
        _move(path, broken)
    if not path.exists():
        for end in BESIDE:
            storage.remove(path.with_name(path.name + end))
        with storage.replaced(path) as draft:
            SqlAlchemyStore(address(draft), files_of(results))
            if os.path.lexists(broken):  # also where a process was killed while it made one again
                fill(address(draft))
    _bring_home(path, experiment, files_of(results))


def say(line: str) -> None:
    """A line for the user that is no result."""
    print(line, file=sys.stderr)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    if not lines or isinstance(error, LookupError):  # a KeyError's text is the key alone
        return " ".join([type(error).__name__, *lines[:1]])
    return " ".join(lines[0].split())


def _fault(path: Path) -> str | None:
    """Why a database is of no use; None for a sound one, or none. Raises what is no fault of the file: it is busy."""
    from mlflow.exceptions import MlflowException
    from mlflow.store.db.base_sql_model import Base
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy.exc import SQLAlchemyError

    if not os.path.lexists(path):
        return None
    if not path.is_file():
        return "it is no file"
    try:
        with closing(sqlite3.connect(path, timeout=BUSY)) as connection:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            query = "SELECT t.name, c.name FROM sqlite_master t, pragma_table_xinfo(t.name) c WHERE t.type = 'table'"
            columns = set(connection.execute(query))
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF not in FAULTS:  # the low byte: its kind
            raise
        return first_line(error)
    if found != "ok":
        return " ".join(found.split())
    needed = {(table.name, column.name) for table in Base.metadata.tables.values() for column in table.columns}
    if lacking := sorted(needed - columns):
        return "it lacks " + ".".join(lacking[0])
    try:
        SqlAlchemyStore(address(path), files_of(path.parent))
    except MlflowException as error:  # of another version of MLflow
        if isinstance(error.__cause__, SQLAlchemyError):
            raise
        return first_line(error)
    return None


def _move(path: Path, target: Path) -> None:
    """Put a database, or what is in its place, under another name, with what SQLite keeps beside it."""
    for end in ("", *BESIDE):
        old, new = (each.with_name(each.name + end) for each in (path, target))
        storage.remove(new)
        if os.path.lexists(old):
            old.rename(new)


def _bring_home(path: Path, experiment: str, files: str) -> None:
    """Runs that were logged before the results folder was moved or copied have their files in the folder as it is."""
    with closing(sqlite3.connect(path, timeout=BUSY)) as connection, connection:
        found = connection.execute("SELECT artifact_location FROM experiments WHERE name = ?", [experiment]).fetchone()
        if found is None or found[0] in (None, files):
            return
        old = found[0]
        connection.execute("UPDATE experiments SET artifact_location = ? WHERE name = ?", [files, experiment])
        change = "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) WHERE substr(artifact_uri, 1, ?) = ?"
        connection.execute(change, [files, len(old) + 1, len(old), old])
