"""A few rows through a model before the first run: what it says of a row must not depend on the rows beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harness.backbone import PACKED, Backbone
from harness.backbone_dtype import lower
from harness.errors import InputError
from harness.run.memory import is_out_of_memory
from harness.run.training import autocast
from harness.spec import TrainSpec
from harness.task import Task

TOLERANCE = 1e-4  # in fp32: absolute, of outputs above 1 relative
OF_SMALL = 1e-3  # relative, where outputs are so small that the absolute tolerance would hide anything
CPU = torch.device("cpu")  # the driver leaves accelerators to the runs


class Difference(NamedTuple):
    """largest: between what a model says of a row alone and in a batch; repeated: between two passes of the batch.
    size: of the largest output. All in the outputs' own unit."""

    largest: float
    repeated: float
    size: float

    @property
    def allowed(self) -> float:
        """Up to here rounding explains a difference."""
        return min(TOLERANCE * max(1.0, self.size), OF_SMALL * self.size)

    @property
    def reason(self) -> str | None:
        """Why it is too large; None where it is not. What is not finite is too large."""
        if self.largest <= self.allowed:
            return None
        if not self.repeated <= self.allowed:
            return "two passes over the same rows differ too, so it draws random numbers or its numbers are not finite"
        return "so it reads the padding, or the rows beside it"


def check_rows(task: Task, module: nn.Module, encoded: Any, train: TrainSpec, where: str) -> list[str]:
    """Compare a few rows of an encoded split alone and in one batch; lines to say. `where`: the messages' beginning.

    Raises InputError where they differ in fp32, or where the model cannot take them at all. What a lower precision
    adds is measured and said.
    """
    found = _tried(task, module, encoded, TrainSpec(), where)
    if found is None:
        return []
    if found.reason is not None:
        raise InputError(
            f"{where} gives a row alone and the same row in a batch outputs that differ by {found.largest:.2g}, where "
            f"{found.allowed:.0e} is allowed: {found.reason}"
        )
    if train.precision == "fp32":
        return []
    return _said(f"{where}: in {train.precision}", _tried(task, module, encoded, train, where))


def check_held(task: Task, backbone: Backbone, encoded: Any, train: TrainSpec, where: str) -> list[str]:
    """As `check_rows`, of the backbone in the type that the runs hold it in, which it has afterwards; of one that they
    pack, in bf16. Raises InputError where it cannot take the rows."""
    if train.backbone_dtype == "fp32":
        return []
    lower(backbone, train.backbone_dtype)
    held = "bf16" if train.backbone_dtype in PACKED else train.backbone_dtype
    return _said(f"{where}: held in {held}", _tried(task, backbone.module, encoded, train, f"{where} held in {held}"))


def _said(where: str, found: Difference | None) -> list[str]:
    if found is None:
        return []
    return [f"{where} the outputs of a row alone and in a batch differ by {found.largest:.2g}"]


def _tried(task: Task, module: nn.Module, encoded: Any, train: TrainSpec, where: str) -> Difference | None:
    """The `difference` of the shortest, the middle and the longest row; None where there is nothing to compare."""
    lengths = task.lengths(encoded)
    if lengths is None:
        return None
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    rows = sorted({order[0], order[len(order) // 2], order[-1]})
    try:
        return difference(task, module, encoded, rows, train)
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error):  # says nothing of the rows; the runs will tell
            return None
        line = " ".join(str(error).split())[:200]
        raise InputError(f"{where} cannot take a batch of its rows: {type(error).__name__}: {line}") from error


def difference(task: Task, module: nn.Module, encoded: Any, rows: Sequence[int], train: TrainSpec) -> Difference | None:
    """Of these rows, on the CPU in the spec's precision; None where the task has nothing to compare."""

    def outputs(some: Sequence[int]) -> Tensor | None:
        found = task.outputs(module, task.collate(encoded, some, None))
        return None if found is None else found.float()

    module.eval()
    with torch.no_grad(), autocast(train, CPU):
        together = outputs(rows)
        if together is None:
            return None
        apart = torch.cat([one for row in rows if (one := outputs([row])) is not None])
        again = outputs(rows)
    assert again is not None
    largest, repeated, size = (float(x.abs().max()) for x in (together - apart, together - again, together))
    return Difference(largest, repeated, size)
