"""One run of a tuner of PEFT: what it needs from the training loop beside gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.method import Adaptation, Backbone, Step, TrainData, in_modules
from harness.storage import os_errors
from methods.shared.adamss import importance, load_importance
from methods.shared.eva import eva_directions, no_directions, start_from
from methods.shared.peft_names import ADAPTER, PREFIX


class PeftAdaptation(Adaptation):
    """A PEFT model in training.

    adapter: names of the adapter's parameters. Some of them may stop training on the way (AdaMSS) and stay in effect.
    awaits_eva: the adapter's A and ranks are still to be taken from the data, by EVA.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        backbone: Backbone,
        data: TrainData,
        weight_decay: float,
        awaits_eva: bool,
    ) -> None:
        super().__init__(model, optimizer, backbone)
        peft_model: Any = model
        self.peft_model = peft_model
        self.weight_decay = weight_decay
        self.awaits_eva = awaits_eva
        self.data = data
        self.adapter = self._trained()

    def prepare(self, step: Step) -> None:
        """See `Adaptation.prepare`. EVA's directions and ranks come from the data."""
        if self.awaits_eva:
            self._apply_eva(eva_directions(step, self.model, self.data))

    def after_step(self, step: Step) -> dict[str, Any]:
        """See `Adaptation.after_step`. AdaMSS counts as in its callback for the Trainer: updates before this one."""
        allocate = getattr(self.peft_model.base_model, "update_and_allocate", None)
        if allocate is None:
            return {}
        allocate(step.index)
        parameters = dict(self.model.named_parameters())
        return {
            "training_numbers": sum(parameters[name].numel() for name in self.adapter if parameters[name].requires_grad)
        }

    def ranks(self) -> dict[str, int]:
        """See `Adaptation.ranks`. Of LoRA's layers; other tuners have none."""
        return {
            name.removeprefix(PREFIX).removesuffix(".lora_A"): module[ADAPTER].weight.shape[0]
            for name, module in self.model.named_modules()
            if name.endswith(".lora_A") and ADAPTER in module
        }

    def adapter_parameters(self) -> int:
        """Parameters that the tuner has trained, those that it has stopped training included."""
        parameters = dict(self.model.named_parameters())
        return sum(parameters[name].numel() for name in self.adapter)

    def state_dict(self) -> dict[str, Any]:
        """See `Adaptation.state_dict`."""
        parameters = dict(self.model.named_parameters())
        return super().state_dict() | {
            "stopped": {name: parameters[name] for name in self.adapter if not parameters[name].requires_grad},
            "importance": importance(self.model),
            "awaits_eva": self.awaits_eva,
            "ranks": self.ranks(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Adaptation.load_state_dict`."""
        if self.awaits_eva and not state["awaits_eva"]:
            self._apply_eva(no_directions(self.model, state["ranks"]))
        super().load_state_dict(state)
        parameters = dict(self.model.named_parameters())
        for name, value in state["stopped"].items():
            parameters[name].requires_grad_(False).copy_(value)
        load_importance(self.model, state["importance"])

    def export(self, path: Path) -> None:
        """The adapter and the head as `PeftModel.from_pretrained` reads them."""
        with os_errors():
            self.peft_model.save_pretrained(str(path))

    def _trained(self) -> tuple[str, ...]:
        """Names of the parameters outside the head that train now."""
        named = self.model.named_parameters()
        return tuple(name for name, p in named if p.requires_grad and not in_modules(name, self.head))

    def _apply_eva(self, directions: dict[str, Tensor]) -> None:
        """Give the layers these A and ranks, (rank, inputs) each; the optimizer gets their new parameters."""
        start_from(directions, self.model, self.optimizer, self.weight_decay)
        self.awaits_eva = False
        self.adapter = self._trained()
