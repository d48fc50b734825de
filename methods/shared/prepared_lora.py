"""A LoRA whose layers and ranks are found from the data before the first update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from harness.method import Backbone, Method, Step, TrainData
from methods.shared.lora_adaptation import LoraAdaptation
from methods.shared.peft_names import PREFIX

if TYPE_CHECKING:
    import torch
    from torch import nn


class PreparedLora(LoraAdaptation):
    """One run. A subclass changes the model in `prepare`, has the optimizer follow it, and calls `follow`.

    It starts with the ranks that it may have before it has seen any data; these are its initial size.

    found: what `prepare` found out, a number for each layer by the name of its trace, for the first update's history.
    """

    written_by_peft = False

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        backbone: Backbone,
        targets: tuple[str, ...],
        data: TrainData,
    ) -> None:
        super().__init__(model, optimizer, backbone, targets)
        self.method = method
        self.data = data
        self.found: dict[str, list[float]] = {}

    def build(self, ranks: Mapping[str, int]) -> None:
        """Bring model and optimizer from the start to these ranks, by layer, as `prepare` did; values do not matter."""
        raise NotImplementedError

    def follow(self) -> None:
        """Hold the adapters that are in the model now: of a layer without one the base layer is back in its place."""
        at = {name: self.model.get_submodule(PREFIX + name) for name in self.layers}
        self.layers = {name: layer for name, layer in self.layers.items() if at[name] is layer}

    def after_step(self, step: Step) -> dict[str, Any]:
        """See `Adaptation.after_step`. The history of the first update has `rank`, their sum, `ranks`, and
        what was found."""
        ranks = list(self.ranks().values())
        return {"rank": sum(ranks), "ranks": ranks} | self.found if step.index == 0 else {}

    def state_dict(self) -> dict[str, Any]:
        """See `Adaptation.state_dict`."""
        return super().state_dict() | {"ranks": self.ranks(), "found": self.found}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Adaptation.load_state_dict`. The layers get the saved ranks first."""
        self.build(state["ranks"])
        self.follow()
        super().load_state_dict(state)
        self.found = state["found"]
