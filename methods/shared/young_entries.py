"""Entries that began to train later than their parameter: AdamW's steps on them are those of a parameter of their own.

AdamW divides m by 1 - beta1^t and v by 1 - beta2^t, with one count t for a parameter. Entries whose moments began at 0
later, as those that `optimizer_state.append` adds, need their own age there. Without it an entry under a constant
gradient moves by up to 6.6 learning rates an update, and by more than 2 for 287 updates (betas 0.9 and 0.999).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer


class YoungEntries:
    """Parameters that grow at the end of one dimension, and may shrink, and when their entries there began to train.

    born: by parameter, how many updates had been made by then, (size of that dimension,) int64, 0 for the first ones.
    The correction is exact but for AdamW's epsilon; the weight decay of a young entry is multiplied as its step is.
    """

    def __init__(self, optimizer: Optimizer, dims: Mapping[nn.Parameter, int]) -> None:
        self.optimizer = optimizer
        self.dims = dict(dims)
        self.born = {p: torch.zeros(p.shape[dim], dtype=torch.int64) for p, dim in dims.items()}
        self.before: dict[nn.Parameter, Tensor] = {}  # the step that is made: values of parameters with young entries

    def resized(self, parameter: nn.Parameter, updates: int) -> None:
        """The parameter has another size at the end of its dimension; new entries are born after so many updates."""
        born = self.born[parameter]
        more = parameter.shape[self.dims[parameter]] - len(born)
        self.born[parameter] = functional.pad(born, (0, more), value=updates)

    def kept(self, parameter: nn.Parameter, places: Sequence[int]) -> None:
        """The parameter has these places of its dimension left, in this order."""
        self.born[parameter] = self.born[parameter][list(places)]

    def released(self, parameter: nn.Parameter, first: int, last: int, updates: int) -> None:
        """The entries from `first` to before `last`, which had no gradient until now, train after so many updates."""
        self.born[parameter][first:last] = updates

    def before_step(self) -> None:
        """Before the optimizer's step."""
        self.before = {p: p.detach().clone() for p, born in self.born.items() if born.any()}

    def after_step(self, updates: int) -> None:
        """After it, when so many updates are made, that one included."""
        beta1, beta2 = self.optimizer.param_groups[0]["betas"]
        for parameter, before in self.before.items():
            shape = [1] * parameter.dim()
            shape[self.dims[parameter]] = -1
            share = step_share(updates - self.born[parameter], updates, beta1, beta2).to(parameter).view(shape)
            parameter.data.copy_(torch.lerp(before, parameter.detach(), share))
        self.before = {}

    def state(self) -> list[Tensor]:
        """When each parameter's entries were born, in the order that they were given."""
        return list(self.born.values())

    def load(self, state: Sequence[Tensor]) -> None:
        """Restore what `state` gave."""
        self.born = dict(zip(self.born, state, strict=True))


def step_share(age: Tensor, updates: int, beta1: float, beta2: float) -> Tensor:
    """What AdamW's step is multiplied by for entries of this age, from 1 to the parameter's, `updates`. float64."""
    first, second = ((1 - beta ** age.double()) / (1 - beta**updates) for beta in (beta1, beta2))
    return second.sqrt() / first
