"""Run records as a pandas DataFrame, one row per run: what tables and pictures are made of.

The frame also decides what may stand together. Runs with one `setting` share everything but method, seed and task;
within it, runs with one `label` are one configuration of a method, and runs with one `column` one task on one data set.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import pandas as pd

from harness.notation import label, value_text
from harness.record.record import RunRecord
from harness.report.redact import cut, error_text, model_name
from harness.spec import NOT_SETTING, RunSpec, TrainSpec

Naming = Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]  # method -> those parameters that a label must name

METRICS = "metrics."  # prefix of the columns of the evaluation's metrics
HOLDOUT = "holdout."
VERSIONED = ("torch", "peft", "transformers")  # packages whose versions the tables tell apart in a note


class _Variant(NamedTuple):
    """A method or a task, to the last parameter."""

    name: str
    version: int
    parameters: str  # JSON, keys sorted
    data: str = ""
    tuned: int = 0  # trials of the search; the hyperparameters searched over are then left out above


def to_frame(records: Iterable[RunRecord], naming: Naming | None = None) -> pd.DataFrame:
    """One row per run_id (of a run given twice, the last).

    `naming` tells the parameters that a method's label must name: "debora[tau=8]" has all others at their default. Of a
    method without an entry (an uninstalled plugin), the label names the parameters that vary between its records. A
    version is named where the records hold several of one method or task.

    Columns: run_id, label, column, setting (the three explained above; `setting` is 8 hexadecimal digits),
    setting_text, method, method_version, method_parameters (JSON), task, task_version, task_parameters (JSON),
    model, model_fingerprint, data_fingerprint, limit, seed, status, headline, higher_is_better, score, metrics.*,
    holdout.*, parameters_initial, parameters_peak, parameters_final, head (numbers), stored_bytes, rank (mean live
    rank over the layers), batches, updates, seconds_training, seconds_total, peak_bytes, device, started, error,
    versions (of the packages that results depend on), split (the evaluation split of the score), rows (of each split),
    tuning ("tuned K" after K trials, "default" where every parameter is at its default, else "as given"),
    search_batches, search_seconds (of training), search_peak_bytes (of the search's trials together: 0 without one,
    None where a trial's record is gone). Trials of a search have no row of their own. Missing values are None or NaN.
    """
    every = {record.run_id: record for record in records}
    unique = {run_id: record for run_id, record in every.items() if not record.spec.is_trial}
    labels, columns = labels_of(unique.values(), naming), columns_of(every.values())
    settings: dict[tuple[Any, ...], dict[str, str]] = {}  # worked out once each: thousands of runs share a few
    defaults: dict[tuple[str, str], bool] = {}
    rows = []
    for run_id, record in unique.items():
        spec = record.spec
        row = {"run_id": run_id, "label": labels[run_id], "column": columns[run_id]}
        row |= (settings.get(key := _setting(spec)) or settings.setdefault(key, _of_setting(spec))) | _of_spec(spec)
        method = spec.method, row["method_parameters"]
        if method not in defaults:
            named = (naming or {}).get(spec.method)
            defaults[method] = named is not None and not named(spec.method_parameters)
        tuning = {"tuning": _tuning(spec, defaults[method])}
        rows.append(row | _of_result(record) | tuning | _search_cost(spec, every))
    return pd.DataFrame(rows)


def labels_of(records: Iterable[RunRecord], naming: Naming | None = None) -> dict[str, str]:
    """run_id -> label of the configuration, see `to_frame`."""
    variants = {record.run_id: _method(record.spec) for record in records}
    labels = _labels(set(variants.values()), naming or {})
    return {run_id: labels[variant] for run_id, variant in variants.items()}


def columns_of(records: Iterable[RunRecord]) -> dict[str, str]:
    """run_id -> column of the task on its data, see `to_frame`."""
    variants = {record.run_id: _task(record.spec) for record in records}
    columns = _labels(set(variants.values()), {})
    return {run_id: columns[variant] for run_id, variant in variants.items()}


def _method(spec: RunSpec) -> _Variant:
    searched = spec.search.parameters if spec.search else ()
    fixed = {name: value for name, value in spec.method_parameters.items() if name not in searched}
    tuned = len(spec.search.trials) if spec.search else 0
    return _Variant(spec.method, spec.method_version, json.dumps(fixed, sort_keys=True), tuned=tuned)


def _task(spec: RunSpec) -> _Variant:
    parameters = json.dumps(spec.task_parameters, sort_keys=True)
    return _Variant(spec.task, spec.task_version, parameters, spec.data_fingerprint)


def _setting(spec: RunSpec) -> tuple[Any, ...]:
    return tuple(getattr(spec, name) for name in RunSpec.model_fields if name not in NOT_SETTING)


def _of_setting(spec: RunSpec) -> dict[str, str]:
    return {"setting": spec.setting_key, "setting_text": _setting_text(spec)}


def _of_spec(spec: RunSpec) -> dict[str, Any]:
    return {
        "method": spec.method,
        "method_version": spec.method_version,
        "method_parameters": json.dumps(spec.method_parameters, sort_keys=True),
        "task": spec.task,
        "task_version": spec.task_version,
        "task_parameters": json.dumps(spec.task_parameters, sort_keys=True),
        "model": model_name(spec.place.model),
        "model_fingerprint": spec.model_fingerprint,
        "data_fingerprint": spec.data_fingerprint,
        "limit": spec.limit,
        "seed": spec.seed,
    }


def _of_result(record: RunRecord) -> dict[str, Any]:
    count = record.parameters
    return {
        "status": record.status,
        "headline": record.headline,
        "higher_is_better": record.higher_is_better,
        "score": record.score if record.status == "done" else None,
        "parameters_initial": count and count.adapter_initial,
        "parameters_peak": count and count.adapter_peak,
        "parameters_final": count and count.adapter_final,
        "head": count and count.head,
        "stored_bytes": count and count.stored_bytes,
        "rank": sum(record.ranks.values()) / len(record.ranks) if record.ranks else None,
        "batches": record.batches,
        "updates": record.updates,
        "seconds_training": record.seconds.training,
        "seconds_total": record.seconds.total,
        "peak_bytes": record.peak_bytes,
        "device": record.environment.device,
        "started": record.started,
        "error": error_text(record),
        "versions": _versions(record),
        "split": next((name for name in record.rows if name not in ("train", "holdout")), None),
        "rows": record.rows,
        **{f"{METRICS}{name}": value for name, value in record.metrics.items()},
        **{f"{HOLDOUT}{name}": value for name, value in record.holdout.items()},
    }


def _versions(record: RunRecord) -> str:
    packages = record.environment.packages
    named = [f"{name} {packages[name]}" for name in VERSIONED if name in packages]
    return ", ".join([f"harness {record.environment.harness}", *named])


def _tuning(spec: RunSpec, is_default: bool) -> str:
    """How the hyperparameters came about."""
    if spec.search is not None:
        return f"tuned {len(spec.search.trials)}"
    return "default" if is_default else "as given"


def _search_cost(spec: RunSpec, every: Mapping[str, RunRecord]) -> dict[str, float | None]:
    """What the trials took by which a run's setting was chosen."""
    trials = [every.get(run_id) for run_id in (spec.search.trials if spec.search else ())]
    known = [trial for trial in trials if trial is not None]
    names = ("search_batches", "search_seconds", "search_peak_bytes")
    if len(known) < len(trials):
        return dict.fromkeys(names)
    seconds = math.fsum(trial.seconds.training for trial in known)
    peak = max((trial.peak_bytes or 0 for trial in known), default=0)
    return dict(zip(names, (sum(trial.batches for trial in known), seconds, peak), strict=True))


def _setting_text(spec: RunSpec) -> str:
    """The setting in words, the model left out; every value that is not a default is named."""
    train, limit, threads = spec.train, spec.limit, spec.threads
    words = [
        f"{train.batches} batches" if train.batches is not None else f"{train.epochs:g} epochs",
        f"batch size {train.batch_size}",
        "all rows" if limit is None else f"at most {limit} rows of each split",
        "1 thread" if threads == 1 else f"{threads} threads",
    ]
    for name, field in TrainSpec.model_fields.items():
        value = getattr(train, name)
        if name not in ("batches", "epochs", "batch_size") and value != field.default:
            words.append(f"{name} {value_text(value)}")
    known = {"limit", "threads", "train", "model_fingerprint"}
    words += [f"{name} {value_text(value)}" for name, value in spec.setting.items() if name not in known]
    return ", ".join(words)


def _labels(variants: set[_Variant], naming: Naming) -> dict[_Variant, str]:
    """A label of its own for each variant, as short as the others allow."""
    by_name: dict[str, list[_Variant]] = defaultdict(list)
    for variant in sorted(variants):
        by_name[variant.name].append(variant)
    labels: dict[_Variant, str] = {}
    for name, group in by_name.items():
        parameters = {variant: json.loads(variant.parameters) for variant in group}
        shown = (
            {variant: naming[name](values) for variant, values in parameters.items()}
            if name in naming
            else _varying(parameters)
        )
        several_versions = len({variant.version for variant in group}) > 1
        some_tuned = len({variant.tuned for variant in group}) > 1
        for variant in group:
            labels[variant] = label(cut(name), cut(shown[variant])) + (
                f" (v{variant.version})" if several_versions else ""
            )
            if some_tuned:
                untuned = "as given" if shown[variant] else "default"
                labels[variant] += f" ({f'tuned {variant.tuned}' if variant.tuned else untuned})"
    return _told_apart(labels)


def _varying(parameters: Mapping[_Variant, dict[str, Any]]) -> dict[_Variant, dict[str, Any]]:
    """The parameters that are not the same in all variants."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for values in parameters.values():
        for name, value in values.items():
            seen[name][json.dumps(value)] += 1
    everywhere = {name for name, counts in seen.items() if list(counts.values()) == [len(parameters)]}
    return {
        variant: {name: value for name, value in values.items() if name not in everywhere}
        for variant, values in parameters.items()
    }


def _told_apart(labels: dict[_Variant, str]) -> dict[_Variant, str]:
    """Labels that several variants share get the data's fingerprint and, where that is not enough, a hash."""
    data = defaultdict(set)
    for variant, name in labels.items():
        data[name].add(variant.data)
    shared = Counter((name, variant.data) for variant, name in labels.items())
    told = {}
    for variant, name in labels.items():
        suffix = f" (data {variant.data[:8]})" if len(data[name]) > 1 else ""
        told[variant] = name + suffix + (f" #{_digest(variant)}" if shared[name, variant.data] > 1 else "")
    assert len(set(told.values())) == len(told), "two variants share a label: their scores would be averaged"
    return told


def _digest(variant: _Variant) -> str:
    return hashlib.sha256(repr(tuple(variant)).encode()).hexdigest()[:6]
