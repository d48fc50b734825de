"""Strict, frozen parameters: what methods, tasks, specs and records are made of."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, to_jsonable_python

from harness.errors import InputError, unknown


class Parameters(BaseModel):
    """A frozen set of named values. An unknown name or a value out of range is an error, never a guess."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def of(cls, values: dict[str, Any], owner: str) -> Self:
        """Validate `values`; `owner` is what the one-line error calls them ("lora", "[train]").

        Raises InputError, naming the parameter, the value given, what is allowed and the nearest match.
        """
        for name in values:
            if name not in cls.model_fields:
                raise unknown(f"parameter of {owner}", name, cls.model_fields)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            names = [part for part in first["loc"] if isinstance(part, str) and part in str(values)]
            mention = names[-1] if names else None
            raise InputError(_one_line(first, owner), mention) from None

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The parameters that have a default, as JSON values."""
        fields = {name: field.default for name, field in cls.model_fields.items() if not field.is_required()}
        plain: dict[str, Any] = to_jsonable_python(fields)
        return plain


def _one_line(first: ErrorDetails, owner: str) -> str:
    where = ".".join(str(part) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    subject = f"{owner}.{where}" if where else owner
    if first["type"] == "missing":
        return f"{subject} is missing"
    if first["type"] == "value_error":
        return f"{subject}: {reason}"
    return f"{subject} = {first['input']!r} is not allowed: it should be {reason}"
