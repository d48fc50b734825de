"""What `advise` asks a method: how its adapter is trained by stock PEFT."""

from __future__ import annotations

from typing import Any, NamedTuple


class PeftForm(NamedTuple):
    """An adapter of given ranks as a configuration of PEFT, and as one of this benchmark.

    config: fields of `peft.LoraConfig`, as JSON has them; its scaling in every layer is the method's own.
    method, parameters: what trains the same here, with its hyperparameters. Of another name than the method that found
    the ranks, it is not what was measured.
    """

    config: dict[str, Any]
    method: str
    parameters: dict[str, Any]
