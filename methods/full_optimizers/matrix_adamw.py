"""AdamW that keeps less of the gradients of some matrices: what GaLore, FRUGAL and DCT-AdamW have in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.optimizer import can_fuse

State = dict[str, Any]


class MatrixAdamW(torch.optim.AdamW, ABC):
    """AdamW, but for groups that say whether they are "transposed": those hold weights of linear layers, (outputs,
    inputs), or transposed (inputs, outputs). A weight W of them goes to (1 - lr weight_decay) W - lr direction.

    Their state holds tensors and the number of updates, "step". It is restored as it was saved: torch would turn
    indices into floats of the weight's precision, and the count into a tensor on its device.
    """

    def __init__(self, groups: list[dict[str, Any]], learning_rate: float, interval: int) -> None:
        super().__init__(groups, lr=learning_rate, fused=can_fuse(groups))
        self.interval = interval  # updates with one subspace
        self.rng: torch.Generator | None = None  # on the CPU, for what is drawn; None: torch's global one
        self.shared: dict[Any, Tensor] = {}  # what all weights use, made again after a resume

    @abstractmethod
    def direction(self, group: dict[str, Any], state: State, gradient: Tensor) -> Tensor:
        """What a weight moves against, from its gradient, both (outputs, inputs). Changes its state. The gradient is
        the caller's."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """AdamW's step for all others, then the matrices'. Gradients stay."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        matrices = [
            (group, weight, weight.grad)
            for group in self.param_groups
            if "transposed" in group
            for weight in group["params"]
            if weight.grad is not None
        ]
        for _, weight, _ in matrices:
            weight.grad = None  # AdamW passes over what has none
        super().step()
        for group, weight, gradient in matrices:
            weight.grad = gradient
            found = self.direction(group, self.state[weight], gradient.T if group["transposed"] else gradient)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(found.T if group["transposed"] else found, alpha=-group["lr"])
        return loss

    def is_due(self, state: State) -> bool:
        """Whether a weight's subspace is to be chosen now, before the update: at the first, and after every
        `interval`."""
        return bool(state.setdefault("step", 0) % self.interval == 0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.load_state_dict`."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for weight, number in zip(group["params"], saved["params"], strict=True):
                if "transposed" in group and number in state_dict["state"]:
                    self.state[weight] = {
                        name: value.to(weight.device, copy=True) if isinstance(value, Tensor) else value
                        for name, value in state_dict["state"][number].items()
                    }


def adam(group: dict[str, Any], state: State, gradient: Tensor) -> Tensor:
    """Adam's direction m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps), the moments taking in the gradient."""
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    state["step"] += 1
    beta1, beta2 = group["betas"]
    first = state["exp_avg"].lerp_(gradient, 1 - beta1)
    second = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    scale = (second.sqrt() / math.sqrt(1 - beta2 ** state["step"])).add_(group["eps"])
    return first / scale / (1 - beta1 ** state["step"])


def tall(matrix: Tensor, like: Tensor | None = None) -> Tensor:
    """The matrix turned so that it has no more columns than rows; with `like`, so turned back that it has its shape."""
    if like is not None:
        return matrix if matrix.shape == like.shape else matrix.T
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def leading_directions(matrix: Tensor, rank: int) -> Tensor:
    """The first `rank` right singular vectors of a tall matrix, as columns, orthonormal: (columns, rank).

    Of one that is not finite some orthonormal ones: the update carries on what is wrong, so that the loop can tell.
    """
    precise = matrix.to(torch.promote_types(matrix.dtype, torch.float32)).nan_to_num(0.0, 0.0, 0.0)
    _, _, right = torch.linalg.svd(precise, full_matrices=False)
    return right[:rank].T.to(matrix.dtype).contiguous()
