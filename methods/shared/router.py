"""A in a PEFT layer, with a choice for every token between it and B. See `methods.shared.routed`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from methods.shared.peft_names import ADAPTER, PREFIX

# From a layer's router and its activations A x, (..., r): what B is given, and what a token has chosen, bool, (..., n).
Route = Callable[["Router", Tensor], tuple[Tensor, Tensor]]


class Router(nn.Module):
    """A, (r, inputs), and the choice: (..., inputs) to what B is given.

    A keeps its name, `weight`. Frozen, it is a buffer: no parameter of the model, and in its state.
    watch: is given what the tokens have chosen, at every call.
    """

    weight: Tensor

    def __init__(self, A: nn.Linear, route: Route, frozen: bool) -> None:
        super().__init__()
        if frozen:
            self.register_buffer("weight", A.weight.detach())
        else:
            self.weight = A.weight
        self.route = route
        self.watch: Callable[[Tensor], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        outputs, chosen = self.route(self, functional.linear(x, self.weight))
        if self.watch is not None:
            self.watch(chosen)
        return outputs


def add_routers(model: Any, names: Mapping[str, Any], route: Route, frozen: bool) -> dict[str, Router]:
    """Put a router into every one of these linear layers of a PEFT LoRA model, by their names in the backbone. Call it
    before the optimizer is made."""
    routers = {}
    for name in names:
        factors = model.get_submodule(PREFIX + name).lora_A
        factors[ADAPTER] = routers[name] = Router(factors[ADAPTER], route, frozen)
    return routers


def top_k(scores: Tensor, k: int) -> Tensor:
    """Where the `k` largest of the last dimension are, bool, in the shape of `scores`; which of equals is torch's
    choice."""
    places = scores.topk(k, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, places, True)
