"""How large a run's adapter is, and has been."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from harness.method import Adaptation
from harness.parameters import ParameterCount, Size


class Sizes:
    """The counts of one run, taken from outside: a method only says what there is now.

    others: parameters of the deployed model beside the adapter, once the method is ready to train.
    trajectory: the size at the start, and at every change.
    optimizer_bytes: the most that the optimizer has kept between updates, where it was looked at.
    told: the method says that the size has changed since the last count.
    """

    def __init__(self, adaptation: Adaptation) -> None:
        self.adaptation = adaptation
        self.others = adaptation.other_parameters()
        self.trajectory: list[Size] = []
        self.optimizer_bytes = 0
        self.count_now(0)

    def count_prepared(self, batches: int) -> None:
        """Count after the preparation, which may have made other weights of the model a part of the adapter."""
        self.others = self.adaptation.other_parameters()
        self.count_now(batches)

    def count_if_resized(self, batches: int) -> None:
        """Count where the method says so, or what the optimizer trains has another size than at the last count: to look
        at that takes microseconds, to count takes a walk through the model."""
        if self.told or self._trained_sizes() != self._seen:
            self.count_now(batches)

    def count_now(self, batches: int) -> None:
        """Count, after so many batches of the budget; only a change is entered."""
        self._seen, self.told = self._trained_sizes(), False
        ranks = self.adaptation.ranks()
        size = Size(batches, self.adaptation.adapter_parameters(), sum(ranks.values()) if ranks else None)
        if not self.trajectory or size[1:] != self.trajectory[-1][1:]:
            self.trajectory.append(size)

    def count_optimizer(self) -> None:
        """Look at what the optimizer keeps."""
        self.optimizer_bytes = max(self.optimizer_bytes, self.adaptation.optimizer_bytes())

    def parameters(self) -> ParameterCount:
        """The counts so far."""
        sizes = [size.adapter_parameters for size in self.trajectory]
        return ParameterCount(
            adapter_initial=sizes[0],
            adapter_peak=max(sizes),
            adapter_final=sizes[-1],
            head=self.adaptation.head_parameters(),
            total=self.others + sizes[-1],
            stored_bytes=self.adaptation.stored_bytes(),
        )

    def load(self, others: int, trajectory: Iterable[Iterable[Any]], optimizer_bytes: int) -> None:
        """Go on from the counts of the same run, read from a checkpoint, once the adaptation is as it was."""
        self.others, self.optimizer_bytes = others, optimizer_bytes
        self.trajectory = [Size(*size) for size in trajectory]
        self._seen = self._trained_sizes()

    def _trained_sizes(self) -> list[int]:
        groups = self.adaptation.optimizer.param_groups
        return [p.numel() if p.requires_grad else 0 for group in groups for p in group["params"]]
