"""Parameters that change their shape in training, together with their gradient and their optimizer's state.

A pruned adapter keeps some columns, a grown one gets new ones, a rotated one has others. In each case the `Parameter`
object stays, and with it its place in the optimizer's groups; its data, its gradient and its moments are replaced.

It works for every optimizer of torch whose state has the parameter's shape (AdamW, fused or not, with amsgrad; SGD with
momentum), beside counters without a dimension. Another state raises ValueError, and nothing is changed. What is
replaced is contiguous in memory: torch's fused AdamW on a CPU pairs entries by their place in memory, whatever their
strides.

A graph from an earlier forward that is still referenced fails in its next backward, so let it go before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from harness.optimizer import decay_groups

GRADIENT = "gradient"
FIRST_MOMENTS = (GRADIENT, "exp_avg", "momentum_buffer")  # linear in the gradients
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")  # linear in their squares


def keep(parameter: nn.Parameter, indices: Tensor, dim: int, optimizer: Optimizer | None) -> None:
    """Cut a parameter down to these indices of dimension `dim`, in their order.

    indices: int64, any number of them, on the parameter's device. optimizer: None where none holds the parameter.
    """
    cut = parameter.detach().index_select(dim, indices)
    _replace(parameter, cut, optimizer, lambda name, value: value.index_select(dim, indices))


def append(parameter: nn.Parameter, values: Tensor, dim: int, optimizer: Optimizer | None) -> None:
    """Grow a parameter by `values` at the end of dimension `dim`. The new entries' gradient and moments are 0.

    The optimizer counts steps by parameter, so AdamW corrects no bias of young entries: with its usual betas the first
    step of one is (1 - beta1) / sqrt(1 - beta2), some 3 learning rates. `methods.shared.young_entries` corrects it.
    """
    grown = torch.cat([parameter.detach(), values], dim)
    _replace(parameter, grown, optimizer, lambda name, value: torch.cat([value, torch.zeros_like(values)], dim))


def train_anew(optimizer: Optimizer, model: nn.Module, weight_decay: float) -> None:
    """Have an optimizer that has made no step yet train what requires a gradient in the model now, at its own learning
    rate: for a start that replaces or removes whole parameters."""
    optimizer.param_groups.clear()
    for group in decay_groups(model.parameters(), weight_decay):
        optimizer.add_param_group(group)


def change_basis(parameter: nn.Parameter, values: Tensor, P: Tensor, dim: int, optimizer: Optimizer | None) -> None:
    """Give a parameter new `values`, whose gradient along dimension `dim` is P times the old one's.

    P: (new size, old size). Where the parameter itself is multiplied by Q along `dim`, P is the inverse of Q^T, which
    is Q itself for a rotation.

    First moments m, which are linear in the gradients, become P m, exactly. Second moments v become P**2 v (squares of
    the entries): E[(P g)_i^2] = sum_jk P_ij P_ik E[g_j g_k] without the terms of j != k, of which a diagonal second
    moment knows nothing. That is exact for permutations and signs, and an approximation where gradients are correlated.
    It keeps v >= 0, and an amsgrad maximum an upper bound. Of the field, LDAdam (Robert et al., 2025, arXiv 2410.16103)
    maps v - m^2 in this way and adds (P m)^2; SOAP (Vyas et al., 2024, arXiv 2409.11321) rotates m and leaves v; GaLore
    (Zhao et al., 2024, arXiv 2403.03507) leaves both.
    """

    def mapped(name: str, value: Tensor) -> Tensor:
        if name in FIRST_MOMENTS:
            return _along(P, value, dim)
        if name in SECOND_MOMENTS:
            return _along(P.square(), value, dim)
        raise ValueError(f"optimizer state '{name}' has no rule for a change of basis")

    _replace(parameter, values, optimizer, mapped)


def shapes(optimizer: Optimizer) -> list[list[int]]:
    """The shape of every parameter that the optimizer holds, in the order of its groups: a part of a run's state."""
    return [list(parameter.shape) for parameter in _held(optimizer)]


def match_shapes(optimizer: Optimizer, saved: Sequence[Sequence[int]]) -> None:
    """Bring the optimizer's parameters to their saved `shapes`: a resume does that before it loads values.

    A parameter that has its shape already is left as it is. Another one is 0 until its values are loaded, and has no
    gradient. The optimizer loads its own state at any shape.
    """
    for parameter, shape in zip(_held(optimizer), saved, strict=True):
        if list(parameter.shape) != list(shape):
            parameter.grad = None
            parameter.data = torch.zeros(*shape, dtype=parameter.dtype, device=parameter.device)


def gradient_of(tensor: Tensor) -> Tensor:
    """The gradient, zeros for a tensor that the loss does not depend on."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _held(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _replace(
    parameter: nn.Parameter, values: Tensor, optimizer: Optimizer | None, change: Callable[[str, Tensor], Tensor]
) -> None:
    """Give a parameter these values; `change` makes its gradient and its state, by name, fit them."""
    held: dict[str, Any] = {} if optimizer is None else optimizer.state.get(parameter, {})
    state = {name: value for name, value in held.items() if isinstance(value, Tensor) and value.dim() > 0}
    for name, value in state.items():
        if value.shape != parameter.shape:
            raise ValueError(
                f"optimizer state '{name}' is {tuple(value.shape)}, its parameter {tuple(parameter.shape)}"
            )
    with torch.no_grad():
        changed = {name: change(name, value).contiguous() for name, value in state.items()}
        gradient = None if parameter.grad is None else change(GRADIENT, parameter.grad).contiguous()
        parameter.grad = None  # torch refuses one of another shape
        parameter.data = values.detach().contiguous()
        parameter.grad = gradient
    held.update(changed)


def _along(P: Tensor, value: Tensor, dim: int) -> Tensor:
    """P times every vector along dimension `dim`."""
    return torch.tensordot(P.to(value.dtype), value, dims=([1], [dim])).movedim(0, dim)
