"""A search in two levels that says which ranks a LoRA gets, and that LoRA from the start."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.method import Backbone, Step, TrainData
from methods.shared.bilevel_lora import VALUES, BilevelLora, BilevelLoraAdaptation

if TYPE_CHECKING:
    import torch
    from torch import nn


class SearchedLora(BilevelLoraAdaptation):
    """One run: the search, for the share `search_fraction` of the budget, then a LoRA.

    initial: what the search started from, by parameter, for the LoRA to begin with; none once it has.
    """

    def __init__(
        self,
        method: BilevelLora,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        backbone: Backbone,
        targets: tuple[str, ...],
        data: TrainData,
    ) -> None:
        super().__init__(method, model, optimizer, backbone, targets, data)
        self.initial = {name: value.detach().clone() for name, value in self._trained()}

    @abstractmethod
    def found_ranks(self) -> list[int]:
        """The rank that each layer of `targets` would get now."""

    def search_step(self, step: Step, end: int) -> dict[str, Any]:
        """What the search does after an update, in the first `end` batches. Returns what the history gets of it."""
        return self.upper_step(step) if self.is_due(step, end) else {}

    def begin_with(self) -> None:
        """Give the parameters the values that the LoRA begins with: those that the search started from."""
        for name, value in self._trained():
            value.copy_(self.initial[name])

    @property
    def searching(self) -> bool:
        """Whether the search goes on."""
        return bool(self.initial)

    def before_step(self, step: Step) -> None:
        """See `BilevelLoraAdaptation.before_step`."""
        if self.searching:
            super().before_step(step)

    def after_step(self, step: Step) -> dict[str, Any]:
        """See `Adaptation.after_step`. The history of the search's last update has the `rank` of all layers."""
        import torch

        if not self.searching:
            return {}
        end = self.method.end_of("search_fraction", step.budget)
        history = self.search_step(step, end)
        if step.used >= end:
            ranks = self.found_ranks()
            with torch.no_grad():
                self.begin_with()
            self._begin_anew(ranks)
            step.restart_schedule()
            history["rank"] = sum(ranks)
        return history

    def state_dict(self) -> dict[str, Any]:
        """See `Adaptation.state_dict`."""
        return super().state_dict() | {"initial": self.initial, "ranks": list(self.ranks().values())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Adaptation.load_state_dict`."""
        if not state["initial"]:
            self._begin_anew(state["ranks"])
        super().load_state_dict(state)
        for name, value in self.initial.items():
            value.copy_(state["initial"][name])

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad and VALUES not in name]

    def _begin_anew(self, ranks: Sequence[int]) -> None:
        """Make it a LoRA that has not been trained, with the first components of each layer."""
        from methods.shared.optimizer_state import train_anew

        for hook in self.hooks:
            hook.remove()
        for layer in self.layers.values():
            delattr(layer, VALUES)
        self.keep([range(rank) for rank in ranks])
        self.upper.param_groups.clear()
        for optimizer in (self.upper, self.optimizer):
            optimizer.state.clear()
        train_anew(self.optimizer, self.model, self.method.weight_decay)
        self.initial, self.stream = {}, "all"
