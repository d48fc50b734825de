"""Labels of rows and titles of columns: what the records of a comparison need to be told apart, and no more."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from harness.notation import label
from harness.record.record import RunRecord
from harness.report.redact import cut
from harness.spec import RunSpec

Naming = Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]  # method -> those parameters that a label must name


class _Variant(NamedTuple):
    """A method or a task, to the last parameter."""

    name: str
    version: int
    parameters: str  # JSON, keys sorted
    data: str = ""
    tuned: int = 0  # trials of the search; the hyperparameters searched over are then left out above
    parents: tuple[_Variant, ...] = ()  # of the runs that it took ranks or sizes from: one a seed, of one configuration
    lacking: bool = False  # whether a parent, or one of its own, has no record


def labels_of(records: Iterable[RunRecord], naming: Naming | None = None) -> dict[str, str]:
    """run_id -> label of the configuration.

    `naming` tells the hyperparameters that a method's label must name: "debora[tau=8]" has all others at their default.
    Of a method without an entry (an uninstalled plugin), the label names those that vary between its records. A version
    is named where the records hold several of one method or task.
    """
    specs = {record.run_id: record.spec for record in records}
    variants: dict[str, _Variant] = {}
    for run_id in specs:
        _method(run_id, specs, variants)
    variants = _with_parents(variants)
    labels = _labels(set(variants.values()), naming or {})
    return {run_id: labels[variant] for run_id, variant in variants.items()}


def columns_of(records: Iterable[RunRecord]) -> dict[str, str]:
    """run_id -> title of the column of the task on its data, in the same way."""
    variants = {record.run_id: _task(record.spec) for record in records}
    columns = _labels(set(variants.values()), {})
    return {run_id: columns[variant] for run_id, variant in variants.items()}


def _method(run_id: str, specs: Mapping[str, RunSpec], known: dict[str, _Variant]) -> _Variant:
    """The configuration of a run; kept in `known`."""
    if run_id in known:
        return known[run_id]
    spec = specs[run_id]
    parents = tuple(_method(parent, specs, known) for _, parent in sorted(spec.parents.items()) if parent in specs)
    lacking = len(parents) < len(spec.parents) or any(parent.lacking for parent in parents)
    searched = spec.search.parameters if spec.search else ()
    fixed = {name: value for name, value in spec.method_parameters.items() if name not in searched}
    tuned = len(spec.search.trials) if spec.search else 0
    text = json.dumps(fixed, sort_keys=True)
    known[run_id] = _Variant(spec.method, spec.method_version, text, tuned=tuned, parents=parents, lacking=lacking)
    return known[run_id]


def _with_parents(variants: Mapping[str, _Variant]) -> dict[str, _Variant]:
    """The same, for a parent without a record tells nothing apart: its child is what the others of its label are, where
    these are one configuration."""
    whole: dict[_Variant, set[_Variant]] = defaultdict(set)
    for variant in variants.values():
        if variant.parents and not variant.lacking:
            whole[variant._replace(parents=())].add(variant)
    found = {}
    for run_id, variant in variants.items():
        alone = variant._replace(parents=(), lacking=False) if variant.lacking else variant
        others = whole[alone] if variant.lacking else ()
        found[run_id] = next(iter(others)) if len(others) == 1 else alone
    return found


def _task(spec: RunSpec) -> _Variant:
    parameters = json.dumps(spec.task_parameters, sort_keys=True)
    return _Variant(spec.task, spec.task_version, parameters, spec.data_fingerprint)


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
