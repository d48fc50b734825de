"""Strict, frozen parameters: what methods, tasks, specs and records are made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, to_jsonable_python

from harness.errors import InputError, unknown


class Range(NamedTuple):
    """The values that a search tries for a hyperparameter: between `low` and `high`, whole numbers for an int."""

    low: float
    high: float
    log: bool = False  # evenly spread over orders of magnitude


# What a search tries, by hyperparameter: a range, or a tuple of choices. The learning rate is always among it.
SearchSpace = Mapping[str, Range | tuple[Any, ...]]


class Parameters(BaseModel):
    """A frozen set of named values. An unknown name or a value out of range is an error, never a guess."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def of(cls, values: dict[str, Any], owner: str) -> Self:
        """Validate `values`; `owner` is what the one-line error calls them ("lora", "train"; "--" for options of the
        command line). Types are strict: no "4" or true for a number.

        Raises InputError, naming the parameter, the value given, what is allowed and the nearest match.
        """
        for name in values:
            if name not in cls.model_fields:
                raise unknown(f"parameter of {owner}", name, cls.model_fields)
        try:
            # From JSON, since only there does strict take a list for a tuple, as TOML and brackets give it.
            return cls.model_validate_json(json.dumps(values, default=str), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            names = [part for part in first["loc"] if isinstance(part, str) and part in str(values)]
            named = [name for name in values if name in first["msg"]]
            raise InputError(_one_line(first, owner), next(reversed(names + named), None)) from None

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The parameters that have a default, as JSON values."""
        fields = {name: field.default for name, field in cls.model_fields.items() if not field.is_required()}
        plain: dict[str, Any] = to_jsonable_python(fields)
        return plain


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, in their order: {"train.batches": 4}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _one_line(first: ErrorDetails, owner: str) -> str:
    where = ".".join(str(part) for part in first["loc"])
    subject = f"--{where.replace('_', '-')}" if owner == "--" else f"{owner}.{where}" if where else owner
    if first["type"] == "missing":
        return f"{subject} is missing"
    if first["type"] == "value_error":
        return f"{subject}: {first['msg'].removeprefix('Value error, ')}"
    reason = first["msg"].removeprefix("Input should be ")
    reason = reason.replace("a valid array", 'a list, such as ["query", "value"]')
    return f"{subject} = {first['input']!r} is not allowed: it should be {reason}"
