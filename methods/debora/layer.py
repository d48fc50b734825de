"""The adapted layer: base(x) + U diag(s) V^T x."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from methods.debora.config import DeboraConfig


class DeboraLayer(BaseTunerLayer):
    """The adapter's numbers for one layer, by adapter name.

    U is (outputs, r) and V is (inputs, r), the lower level's variables. s is (r,), the upper level's: a buffer, so that
    no optimizer takes it for a weight, which is saved all the same. The rank may be 0.
    """

    adapter_layer_names = ("debora_U", "debora_V")
    other_param_names = ("r", "debora_s")

    active_adapters: list[str]  # PEFT's, declared for the type checker
    get_base_layer: Callable[[], Any]
    _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.debora_U = nn.ParameterDict({})
        self.debora_V = nn.ParameterDict({})
        self.debora_s = BufferDict({}, persistent=True)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, rank: int, config: DeboraConfig) -> None:
        """Add an adapter that leaves the layer's function as it is: U = 0, V as LoRA starts its A.

        s starts in the interior of the layer's simplex, s_i = eps + tau / r, so that with r = 8 and tau = 16 the step
        from here is that of LoRA with alpha = 16.
        """
        weight = self.get_base_layer().weight
        outputs, inputs = weight.shape
        like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        bound = 1 / math.sqrt(inputs)
        self.r[adapter_name] = rank
        self.debora_U[adapter_name] = nn.Parameter(torch.zeros(outputs, rank, **like))
        self.debora_V[adapter_name] = nn.Parameter(torch.empty(inputs, rank, **like).uniform_(-bound, bound))
        self.debora_s[adapter_name] = torch.full((rank,), config.eps + config.tau / max(rank, 1), **like)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def keep_columns(self, adapter_name: str, columns: Tensor) -> None:
        """Remove every component whose index is not in `columns` (int64, any number of them, also none).

        The Parameter objects stay; their data is replaced and their gradient dropped. A graph from an earlier forward
        that is still referenced then fails in the next backward, so let it go before.
        """
        for parameter in (self.debora_U[adapter_name], self.debora_V[adapter_name]):
            parameter.grad = None
            parameter.data = parameter.data.index_select(1, columns)
        self.debora_s[adapter_name] = self.debora_s[adapter_name].index_select(0, columns)
        self.r[adapter_name] = len(columns)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """U diag(s) V^T, (outputs, inputs)."""
        return (self.debora_U[adapter_name] * self.debora_s[adapter_name]) @ self.debora_V[adapter_name].T

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The update is low-rank and additive."""
        return True


class DeboraLinear(nn.Module, DeboraLayer):
    """A linear layer with a dEBORA adapter."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, rank: int, config: DeboraConfig) -> None:
        super().__init__()
        DeboraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, rank, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if self.r.get(name, 0) == 0:
                continue
            U, s, V = self.debora_U[name], self.debora_s[name], self.debora_V[name]
            # s goes into U, which is smaller than the batch's activations.
            update = nn.functional.linear(self._cast_input_dtype(x, V.dtype) @ V, U * s)
            result = result + update.to(result.dtype)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters (all active ones by default) to the base weight. `safe_merge`: ValueError unless finite."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.debora_U:
                continue
            weight = self.get_base_layer().weight
            merged = weight.data + self.get_delta_weight(name).detach().to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"the merged weight of adapter '{name}' is not finite")
            weight.data = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take the merged adapters out of the base weight again."""
        if not self.merged:
            warnings.warn("nothing is merged, so there is nothing to unmerge", stacklevel=2)
        while self.merged_adapters:
            weight = self.get_base_layer().weight
            weight.data -= self.get_delta_weight(self.merged_adapters.pop()).detach().to(weight.dtype)

    def __repr__(self) -> str:
        return "debora." + super().__repr__()
