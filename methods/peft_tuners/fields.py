"""The fields of PEFT's configurations as strict parameters."""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Annotated, Any

from pydantic import Field, create_model

from harness.parameters import Strict

MOST_RANK = 65_536  # above the sides of any layer, and prompts that any model takes
MOST = 1_000_000_000
MAY_BE_ZERO = ("init_warmup", "final_warmup", "num_frozen_tokens", "psoft_svd_lowrank_niter")


@functools.cache
def fields_of(config_class: Any) -> type[Strict]:
    """A configuration's fields as strict parameters, those left out that the gateway sets itself."""
    from peft import PeftConfig

    own = {field.name for field in dataclasses.fields(PeftConfig)} | {"target_modules", "modules_to_save"}
    hints = typing.get_type_hints(config_class)
    definitions: dict[str, Any] = {
        field.name: (
            _with_range(field.name, hints[field.name], field.default),
            field.default if factory is dataclasses.MISSING else Field(default_factory=factory),
        )
        for field in dataclasses.fields(config_class)
        if field.name not in own
        for factory in [field.default_factory]
    }
    return create_model(config_class.__name__, __base__=Strict, **definitions)


def _with_range(name: str, hint: Any, default: Any) -> Any:
    """A field's type with the values that can be right for some backbone: PEFT has no ranges of its own.

    A size is at least 1, or as small as its default; a seed is one; a dropout is a share below 1.
    """
    if "dropout" in name:
        return Annotated[hint, Field(ge=0, lt=1)]
    if hint == list[int]:
        return list[Annotated[int, Field(ge=0)]]
    if "rank" in name and hint == int | float | None:
        return Annotated[hint, Field(gt=0)]
    if hint is float and name.startswith("init_"):
        return Annotated[hint, Field(ge=0)]
    if hint not in (int, int | None):
        return hint
    if "seed" in name or "prng" in name:
        return Annotated[hint, Field(ge=0)]
    least = 0 if name in MAY_BE_ZERO else min(1, 1 if default in (None, dataclasses.MISSING) else default)
    most = MOST_RANK if name in ("r", "mini_r") or "rank" in name or "virtual" in name else MOST
    return Annotated[hint, Field(ge=least, le=most)]
