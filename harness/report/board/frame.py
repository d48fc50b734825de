"""The runs of a report as a pandas DataFrame, for whoever works on with pandas."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pandas as pd

from harness.record.record import RunRecord
from harness.report.board.labels import Naming
from harness.report.board.runs import Run, runs_of

METRICS, HOLDOUT = "metrics.", "holdout."  # prefixes of the columns of the metrics
OF_RUN = ("run_id", "label", "column", "setting", "setting_text")
OF_RESULT = ("parameters_initial", "parameters_peak", "parameters_final", "head", "stored_bytes", "rank", "batches")


def to_frame(records: Iterable[RunRecord], naming: Naming | None = None) -> pd.DataFrame:
    """One row per run, see `runs_of`; trials of a search have no row of their own.

    Columns: run_id, label, column, setting, setting_text, method, method_version, method_parameters (JSON), task,
    task_version, task_parameters (JSON), model, model_fingerprint, data_fingerprint, limit, seed, status, headline,
    higher_is_better, score, parameters_initial, parameters_peak, parameters_final, head (parameters), stored_bytes,
    rank (mean live rank over the layers), batches, updates, seconds_training, seconds_total, peak_bytes,
    training_peak_bytes, training_reserved_bytes, optimizer_bytes, backbone_bytes, file_bytes, tokens (of training),
    forgetting (rise of the loss per token on a text sample), seconds_a_generated_token (of the trained model),
    generation_to_backbone (the same over the untouched backbone's), device, started, error, versions (of the packages
    that results depend on), split (the evaluation split of the score), rows (of each split), metrics.*, holdout.*,
    tuning, search_batches, search_seconds (of training), search_peak_bytes; see `Run`. Missing values are None or NaN.
    """
    return pd.DataFrame([_row(run) for run in runs_of(records, naming)])


def _row(run: Run) -> dict[str, Any]:
    record, spec = run.record, run.spec
    return {
        **{name: getattr(run, name) for name in OF_RUN},
        "method": spec.method,
        "method_version": spec.method_version,
        "method_parameters": json.dumps(spec.method_parameters, sort_keys=True),
        "task": spec.task,
        "task_version": spec.task_version,
        "task_parameters": json.dumps(spec.task_parameters, sort_keys=True),
        "model": run.model,
        "model_fingerprint": spec.model_fingerprint,
        "data_fingerprint": spec.data_fingerprint,
        "limit": spec.limit,
        "evaluation_limit": spec.evaluation_limit,
        "seed": spec.seed,
        "status": record.status,
        "headline": record.headline,
        "higher_is_better": record.higher_is_better,
        "score": run.score,
        **{name: getattr(run, name) for name in OF_RESULT},
        "updates": record.updates,
        "seconds_training": record.seconds.training,
        "seconds_total": record.seconds.total,
        "peak_bytes": record.peak_bytes,
        "training_peak_bytes": record.training_peak_bytes,
        "training_reserved_bytes": record.training_reserved_bytes,
        "optimizer_bytes": record.optimizer_bytes,
        "backbone_bytes": record.backbone_bytes,
        "file_bytes": record.file_bytes,
        "tokens": record.tokens,
        "forgetting": run.forgetting,
        "seconds_a_generated_token": run.seconds_a_generated_token,
        "generation_to_backbone": run.generation_to_backbone,
        "device": record.environment.device,
        "started": record.started,
        "error": run.error,
        "versions": run.versions,
        "split": run.split,
        "rows": record.rows,
        **{f"{METRICS}{name}": value for name, value in record.metrics.items()},
        **{f"{HOLDOUT}{name}": value for name, value in record.holdout.items()},
        "tuning": run.tuning,
        "search_batches": run.search_batches,
        "search_seconds": run.search_seconds,
        "search_peak_bytes": run.search_peak_bytes,
    }
