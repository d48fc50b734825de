"""Logging of finished records to MLflow, for `run` and `report`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from harness.errors import InputError
from harness.record.record import RunRecord
from harness.record.store import RecordStore

OFF = "off"


def log(store: RecordStore, records: Sequence[RunRecord], uri: str | None, must: bool = False) -> None:
    """Log to `uri` (None: the results folder's own database; "off": nothing) and say so in one line.

    Whatever goes wrong is one line on stderr, since the records are all there; with `must`, InputError.
    """
    from harness.record.mlflow import Unreachable, default_uri, log_records

    if uri == OFF:
        return
    try:
        logged = log_records(store, records, uri, sorted((store.results / "pictures").glob("*.png")))
    except Unreachable as error:
        if must:
            raise InputError(f"MLflow cannot be used at {error}") from None
        kept = "the records are kept: `report --to-mlflow` logs them later"
        print(f"MLflow cannot be used at {error}; {kept}", file=sys.stderr)
        return
    print(f"mlflow    {uri or default_uri(store.results)}: {logged} of {len(records)} runs new")
