"""The penalty on the factors that gives s its meaning while it is searched for (ours).

Free factors absorb any change of a positive s, so that the lower level alone says nothing about it. With
lambda / 2 sum_k ||U^(k)||^2 added to the lower level's loss, every column of component i has the same norm at a
stationary point, and the least penalty of an update with component sizes sigma_i is d lambda / 2 sum_i
(sigma_i / s_i)^(2/d). Minimised over the simplex as well it grows as (sum_i sigma_i^(2/(d+2)))^((d+2)/d): for matrices
a Schatten-1/2 penalty, lambda / tau (sum_i sqrt(sigma_i))^2, which would rather have few components than many.

For d > 2 the power 2/d is below 1: at sigma_i = 0 the penalty rises more steeply than any loss falls, so that 0 is a
stable point whatever lambda is, and components that are still small go whether they are needed or not. So the rule for
lambda is for matrices; kernels of more than two factors have no penalty unless its number is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from methods.shared.optimizer_state import gradient_of


class FactorPenalty:
    """lambda / 2 times the squared norms of the factors, as what it adds to their gradients.

    units:    for each factor the length that counts as one (`DeboraLayer.units`); 1 of a linear layer's.
    strength: lambda, in units of the loss over those of the factors' squares; None until `settle` has said it.
    share:    where it is not given: how large the penalty's gradient is to be, in units of the mean of the loss's. So
              lambda follows the scale of the loss and of the parametrisation. It is the mean's norm and not the mean
              norm: noise that batches do not share would else name a penalty that a weak signal does not survive.
    """

    def __init__(
        self, factors: Sequence[nn.Parameter], units: Sequence[float], strength: float | None, share: float
    ) -> None:
        self.factors = list(factors)
        self.units = list(units)
        self.strength = strength
        self.share = share
        self.sums: list[Tensor] = []  # of the loss's gradients, by factor
        self.batches = 0

    @torch.no_grad()
    def add(self) -> None:
        """Add the penalty's gradient to the factors' own, which are the loss's alone; or, as long as there is no
        lambda, take note of how large these are."""
        if self.strength is None:
            gradients = [gradient_of(factor) for factor in self.factors]
            if not self.sums:
                self.sums = [torch.zeros_like(gradient) for gradient in gradients]
            torch._foreach_add_(self.sums, gradients)
            self.batches += 1
        elif self.strength > 0:
            pairs = [(factor, unit) for factor, unit in zip(self.factors, self.units, strict=True) if factor.numel()]
            own = [(factor, self.strength / unit**2) for factor, unit in pairs if factor.grad is not None]
            if own:
                factors, weights = map(list, zip(*own, strict=True))
                torch._foreach_add_([gradient_of(factor) for factor in factors], torch._foreach_mul(factors, weights))

    @torch.no_grad()
    def settle(self) -> float:
        """lambda; where it is not given, share times the norm of the loss's mean gradient so far over the norm of the
        factors. Waits for the device, once a run."""
        if self.strength is None:
            size = float(_norm([factor / unit for factor, unit in zip(self.factors, self.units, strict=True)]))
            seen = float(_norm(self.sums)) / self.batches if self.sums else 0.0
            self.strength = self.share * seen / size if size else 0.0
            self.sums = []
        return self.strength

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact resume needs."""
        return {"strength": self.strength, "sums": self.sums, "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.sums = [each.to(self.factors[0].device) for each in state["sums"]]
        self.strength, self.batches = state["strength"], state["batches"]


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all of them as one vector, a scalar."""
    return torch.stack(torch._foreach_norm(list(tensors))).norm()
