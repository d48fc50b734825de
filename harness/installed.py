"""What the installed methods and tasks tell of their records, for whoever shows them: the report knows none by name.

Of a method or task that is not installed any more, or no longer imports, there is nothing; its records are shown all
the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import registry
from harness.errors import InputError
from harness.method import Method
from harness.metric import Metric, declared
from harness.peft_form import PeftForm
from harness.provenance import NOT_STATED
from harness.trace import Trace

if TYPE_CHECKING:
    import numpy as np

Naming = Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]


def naming_of(methods: Iterable[str]) -> Naming:
    """By method, what gives of hyperparameters those that a label must name; see `registry.shown_parameters`."""
    return {name: functools.partial(registry.shown_parameters, name) for name, _ in _classes(methods)}


def provenance_of(methods: Iterable[str]) -> dict[str, str]:
    """By method, where it comes from, see `Method.provenance`; NOT_STATED for those that are not installed."""
    names = set(methods)
    return dict.fromkeys(names, NOT_STATED) | {name: method.provenance for name, method in _classes(names)}


def loaders_of(method: str) -> Mapping[str, str]:
    """What loads its exports, see `Method.loaders`; {} where it is not installed."""
    return next((found.loaders for _, found in _classes([method])), {})


def traces_of(methods: Iterable[str]) -> dict[str, tuple[Trace, ...]]:
    """By method, the values of the history that it declares."""
    return {name: method.traces for name, method in _classes(methods)}


def singular_values(method: str, folder: Path) -> Mapping[str, np.ndarray]:
    """Of a kept adapter of the method, see `Method.singular_values`."""
    return next((found.singular_values(folder) for _, found in _classes([method])), {})


def shown_parameters(method: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters that are not at their defaults; all, of a method that is not installed."""
    named = naming_of([method]).get(method, dict)
    return named(dict(parameters))


def peft_form(method: str, parameters: dict[str, Any], ranks: Mapping[str, int]) -> PeftForm | None:
    """Of a configuration, see `Method.peft_form`; None, too, where the installed method knows no such parameters."""
    try:
        return registry.make_method(method, parameters).peft_form(ranks)
    except InputError:
        return None


def is_lora(method: str, parameters: dict[str, Any], ranks: Mapping[str, int]) -> bool:
    """Whether a configuration trains a LoRA at its ranks from the first step, as `Method.peft_form` says."""
    form = peft_form(method, parameters, ranks)
    return form is not None and form.method == method


@functools.cache
def metric_of(task: str, name: str) -> Metric | None:
    """The metric of this name, as the task declares it or as a common one; None where there is neither."""
    try:
        measures = registry.task_class(task).measures
    except InputError:
        measures = ()
    return declared(name, measures)


def family_average(family: str, metrics: Mapping[str, Mapping[str, float]]) -> float | None:
    """The family's own average, see `Task.average`; None where it has none."""
    try:
        return registry.task_class(family).average(metrics)
    except InputError:
        return None


def _classes(methods: Iterable[str]) -> Iterator[tuple[str, type[Method]]]:
    """(name, class) of those that are installed."""
    for name in sorted(set(methods) & registry.registered(registry.METHODS).keys()):
        try:
            yield name, registry.method_class(name)
        except InputError:
            continue
