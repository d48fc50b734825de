"""Methods that take ranks or sizes from another method of the same sweep: `lora[ranks_of=debora]` waits for `debora`.

A label is a method as the command line takes it, so that each is written in one way here, whatever a user wrote.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Sequence

from harness import registry
from harness.errors import InputError, unknown
from harness.method import Method
from harness.notation import parse_choice
from harness.parameters import DEEPEST

Named = tuple[str, Method]  # a method with its name


def key_of(named: Named) -> str:
    """Equal for equal methods."""
    return named[0] + named[1].model_dump_json()


def parents_of(named: Named) -> dict[str, str]:
    """The keys of the methods that this one waits for, by the parameter that names them."""
    return {parameter: key_of(_referred(label)) for parameter, label in named[1].parents.items()}


def with_one_spelling(named: Named) -> Named:
    """The method with its labels as tables write them. One that cannot be read is left, for `check` to tell."""
    name, method = named
    try:
        labels = {parameter: _label_of(_referred(label), label) for parameter, label in method.parents.items()}
    except InputError:
        return named
    return name, method.model_copy(update=labels) if labels else method


def check(methods: Iterable[Named]) -> None:
    """Raises InputError, with the nearest match, for a label that is not among the methods, as every circle has."""
    methods = list(methods)
    if not any(method.parents for _, method in methods):
        return
    known = {key_of(named) for named in methods}
    for named in methods:
        for parameter, label in named[1].parents.items():
            if not _is_among(label, known):
                raise _missing(named, f"{named[0]}.{parameter}", label, methods)


def _is_among(label: str, known: Collection[str]) -> bool:
    try:
        return key_of(_referred(label)) in known
    except InputError:
        return False


def _missing(named: Named, parameter: str, label: str, methods: Sequence[Named]) -> InputError:
    labels = [_label_of(each) for each in methods if each is not named]
    if not _is_circle(named, methods):
        return unknown(f"label of the sweep in {parameter}", label, labels)
    return InputError(
        f"{parameter} = {label} is not allowed: {_label_of(named)} would wait for itself, in a circle; "
        "give a method of the sweep that does not wait for it",
        label,
    )


@functools.cache
def _referred(label: str) -> Named:
    """The method that a label names. Raises InputError where it names none."""
    if label.count("[") > DEEPEST:
        raise InputError(f"'{label}' is nested more than {DEEPEST} deep", label)
    name, parameters = parse_choice(label)
    return with_one_spelling((name, registry.make_method(name, parameters)))


def _label_of(named: Named, written: str = "") -> str:
    """The method as tables name it; as it was written where that says less, as of a large table."""
    name, method = named
    label = registry.label_of(name, method.model_dump(mode="json"))
    if not written or written == label:
        return label
    return label if _is_among(label, (key_of(named),)) else written


def _is_circle(start: Named, methods: Sequence[Named]) -> bool:
    """Whether a method comes back to itself, when labels are taken to mean a method whatever that one waits for: no
    label can be written out that holds itself."""
    seen = {key_of(start)}
    ways = [start]
    while ways:
        for other in _meant(ways.pop(), methods):
            if other is start:
                return True
            if key_of(other) not in seen:
                seen.add(key_of(other))
                ways.append(other)
    return False


def _meant(named: Named, methods: Sequence[Named]) -> Iterator[Named]:
    for label in named[1].parents.values():
        try:
            wanted = _without_labels(_referred(label))
        except InputError:
            continue
        yield from (other for other in methods if _without_labels(other) == wanted)


def _without_labels(named: Named) -> tuple[str, str]:
    name, method = named
    return name, method.model_copy(update=dict.fromkeys(method.waits_for)).model_dump_json()
