"""A method that goes wrong once, at a given update, for the tests of the executors."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from harness.method import Adaptation, Backbone, Step, TrainData
from methods.head import Head

if TYPE_CHECKING:
    import torch

    from harness.spec import TrainSpec


class Faulty(Head):
    """The head, with a fault at one update."""

    fault: Literal["raise", "kill", "hang", "always"] = Field("raise", description="what happens")
    update: int = Field(12, ge=0, description="after which update")
    marks: str = Field(".", description="folder; a file there says that the fault has happened")

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        adaptation = super().start(backbone, train, data, rng)
        return FaultyAdaptation(self, adaptation, backbone)


class FaultyAdaptation(Adaptation):
    """Goes wrong where there is no mark yet."""

    def __init__(self, method: Faulty, healthy: Adaptation, backbone: Backbone) -> None:
        self.method = method
        super().__init__(healthy.model, healthy.optimizer, backbone)

    def after_step(self, step: Step) -> dict[str, Any]:
        """See `Adaptation.after_step`."""
        if step.index == self.method.update:
            mark = Path(self.method.marks) / self.method.fault
            if not mark.exists():
                if self.method.fault != "always":
                    mark.touch()
                go_wrong(self.method.fault)
        return {}


def go_wrong(fault: str) -> None:
    """Carry out the fault."""
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "hang":
        time.sleep(3600)
    else:
        raise RuntimeError(f"the fault '{fault}'")
