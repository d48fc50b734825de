"""The record of a run that could not make its own."""

from __future__ import annotations

from datetime import UTC, datetime

from harness import registry
from harness.record.environment import environment
from harness.record.record import RunRecord
from harness.spec import RunSpec


def failed_record(spec: RunSpec, error: str, trace: str) -> RunRecord:
    """The record of a run whose process could not make it. `error`: one line."""
    return RunRecord(
        run_id=spec.run_id,
        spec=spec,
        status="failed",
        headline=registry.task_of(spec).headline,
        environment=environment("unknown"),
        started=now(),
        error=error,
        traceback=trace,
    )


def now() -> str:
    """The time as a record has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
