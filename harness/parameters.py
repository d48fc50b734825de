"""Strict, frozen parameters: what methods, tasks, specs and records are made of."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, to_jsonable_python

from harness.errors import InputError, plain, unknown

DEEPEST = 32  # tables and lists within one another
LONGEST_KEY = 64  # parts of a key with dots
LONGEST_PATH, LONGEST_NAME = 4000, 255  # bytes of a path, and of one folder's or file's name in it


class Range(NamedTuple):
    """The values that a search tries for a hyperparameter: between `low` and `high`, whole numbers for an int."""

    low: float
    high: float
    log: bool = False  # evenly spread over orders of magnitude


# What a search tries, by hyperparameter: a range, or a tuple of choices. The learning rate is always among it.
SearchSpace = Mapping[str, Range | tuple[Any, ...]]


class Strict(BaseModel):
    """A frozen set of named values. An unknown name or a value out of range is an error, never a guess."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def of(cls, values: dict[str, Any], owner: str) -> Self:
        """Validate `values`; `owner` is what the one-line error calls them ("lora", "train"; "--" for options of the
        command line). Types are strict: no "4" or true for a number.

        Raises InputError, naming the parameter, the value given, what is allowed and the nearest match.
        """
        own, written = cls._by_own_names(values, owner)
        for name, value in own.items():
            check_size(value, _subject(written[name], owner), written[name])
        try:
            # From JSON, since only there does strict take a list for a tuple, as TOML and brackets give it.
            return cls.model_validate_json(json.dumps(own, default=str), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            first["loc"] = tuple(written.get(str(part), part) for part in first["loc"][:1]) + first["loc"][1:]
            names = [part for part in first["loc"] if isinstance(part, str) and part in str(values)]
            named = [written[name] for name in own if name in first["msg"]]
            raise InputError(_one_line(first, owner), next(reversed(names + named), None)) from None

    @classmethod
    def peft_names(cls) -> dict[str, str]:
        """PEFT's names of parameters, which `of` takes for ours: {"r": "rank"}. A field declares its own by
        `json_schema_extra={"peft": "r"}`."""
        extras = {name: field.json_schema_extra for name, field in cls.model_fields.items()}
        return {
            str(extra["peft"]): name for name, extra in extras.items() if isinstance(extra, dict) and "peft" in extra
        }

    @classmethod
    def _by_own_names(cls, values: Mapping[str, Any], owner: str) -> tuple[dict[str, Any], dict[str, str]]:
        """The values by the parameters' own names, and by these the names as they were written.

        Raises InputError for an unknown name, and where one parameter is given by two names."""
        peft_names, written = cls.peft_names(), dict[str, str]()
        for name in values:
            own = name if name in cls.model_fields else peft_names.get(name)
            if own is None:
                raise unknown(f"parameter of {owner}", name, [*cls.model_fields, *peft_names])
            if own in written:
                raise InputError(f"{written[own]} and {name} of {owner} are one parameter: give one of them", name)
            written[own] = name
        return {own: values[name] for own, name in written.items()}, written

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The parameters that have a default, as JSON values."""
        fields = {name: field.default for name, field in cls.model_fields.items() if not field.is_required()}
        plain: dict[str, Any] = to_jsonable_python(fields)
        return plain


def checked_path(text: str) -> str:
    """A path as a user writes it, that a file system can have and that can be shown. Raises ValueError with the
    reason."""
    if not text.strip():
        raise ValueError(f"'{text}' is no path")
    if plain(text) != text:
        raise ValueError(f"'{text}' holds signs that cannot be shown")
    names = [len(name.encode()) for name in text.split("/")]
    if max(names) > LONGEST_NAME or sum(names) > LONGEST_PATH:
        raise ValueError(f"'{text}' is longer than a path can be")
    try:
        Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"'{text}' begins with a user who is not here: write the path out") from None
    return text


def from_toml(text: str, what: str) -> dict[str, Any]:
    """What TOML holds. Raises tomllib.TOMLDecodeError, and InputError for numbers, lists or tables of absurd size;
    `what`: what its message calls the text."""
    # A key that long takes TOML's reader time by the square.
    if re.search(rf"(?<![\w\"' .-])(?:[\w\"' -]++\.){{{LONGEST_KEY}}}", text):
        raise InputError(f"{what} holds a key of more than {LONGEST_KEY} parts")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except RecursionError:
        raise InputError(f"{what} is nested more than {DEEPEST} deep") from None
    except ValueError as error:  # Python's own limit on the digits of a number, or a date that is none
        raise InputError(f"{what} holds a value that cannot be read ({error})") from None


def check_size(value: Any, subject: str, mention: str) -> None:
    """Raises InputError where a value cannot be written as JSON, or not as any use of it would need."""
    level, depth = [value], 0
    while level:
        for each in level:
            if isinstance(each, int) and each.bit_length() > 63:
                shown = f"{each}" if each.bit_length() < 256 else f"a number of {each.bit_length():,} bits"
                raise InputError(f"{subject} = {shown} is not allowed: a whole number is below 2^63", mention)
            if isinstance(each, str) and not each.isascii() and each != each.encode("utf-8", "replace").decode():
                raise InputError(f"{subject} = '{each}' is not allowed: it is not text in UTF-8", mention)
        if depth == DEEPEST:
            raise InputError(f"{subject} is nested more than {DEEPEST} deep", mention)
        level = [part for each in level for part in _parts(each)]
        depth += 1


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return list(value) if isinstance(value, (list, tuple)) else []


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, in their order: {"train.batches": 4}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _subject(where: str, owner: str) -> str:
    """What a message calls a parameter: an option, or the owner's."""
    return f"--{where.replace('_', '-')}" if owner == "--" else f"{owner}.{where}" if where else owner


def _one_line(first: ErrorDetails, owner: str) -> str:
    subject = _subject(".".join(str(part) for part in first["loc"]), owner)
    if first["type"] == "missing":
        return f"{subject} is missing"
    if first["type"] == "value_error":
        return f"{subject}: {first['msg'].removeprefix('Value error, ')}"
    reason = re.sub("^Input should be ", "it should be ", first["msg"])
    reason = reason.replace("a valid array", 'a list, such as ["query", "value"]')
    return f"{subject} = {first['input']!r} is not allowed: {reason}"


class ParameterCount(Strict):
    """How many parameters a run trains and keeps. The head (new for the task) is never part of the adapter."""

    adapter_initial: int = Field(ge=0, description="adapter parameters at the start")
    adapter_peak: int = Field(ge=0, description="most adapter parameters at any time")
    adapter_final: int = Field(ge=0, description="adapter parameters in effect after training: the tables' default")
    head: int = Field(ge=0, description="parameters of the task's head, trained by every method")
    total: int = Field(ge=0, description="all parameters of the deployed model: backbone, head and adapter")
    stored_bytes: int = Field(ge=0, description="bytes to keep for this run beside the shared backbone")


class Size(NamedTuple):
    """How large an adapter was from a batch on."""

    batches: int  # of the budget, used until then
    adapter_parameters: int
    rank: int | None  # live rank of all layers together; None where there is no rank


class Finished(NamedTuple):
    """What an earlier run ended with: the live rank of each adapted layer ({} where there is none), and the counts."""

    ranks: dict[str, int]
    parameters: ParameterCount | None

    def own_ranks(self) -> dict[str, int]:
        """The ranks. Raises InputError where there are none."""
        if not self.ranks:
            raise InputError("what it waits for has no ranks: name a method that has a rank")
        return self.ranks

    def adapter_parameters(self) -> int:
        """Parameters of the adapter at the end. Raises InputError where there is none."""
        if self.parameters is None or not (self.parameters.adapter_final or self.ranks):  # ranks may begin with 0
            raise InputError("what it waits for has no adapter: name a method that has one")
        return self.parameters.adapter_final
