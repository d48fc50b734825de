"""The adapted layer: base(x) + Psi(x), and the linear one, Psi = U diag(s) V^T."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from harness.method import is_transposed, weight_shape
from methods.debora.target import modes_with_factors
from methods.debora.tuner.config import DeboraConfig
from methods.debora.tuner.fused import fused_linear
from methods.debora.tuner.initial import initial_factors
from methods.shared.canonical import normalised, singular_basis
from methods.shared.optimizer_state import change_basis, keep

MANIFOLDS = {"matrix": "euclidean", "oblique": "oblique", "stiefel": "stiefel"}  # of a channel factor, by geometry


class DeboraLayer(BaseTunerLayer, nn.Module):
    """A layer with adapters: their parameters by adapter name, and what they add to the base layer.

    The factors U^(1), ..., U^(d) are (n_k, r), one for each mode of the weight, the lower level's variables: U for the
    outputs, V for the inputs, and what a subclass adds. s is (r,), the upper level's: a buffer, so that no optimizer
    takes it for a weight, which is saved all the same. The rank may be 0.
    """

    adapter_layer_names: tuple[str, ...] = ("debora_U", "debora_V")  # in the order of the weight's modes
    other_param_names = ("r", "debora_s", "_manifolds")

    active_adapters: list[str]  # PEFT's, declared for the type checker
    get_base_layer: Callable[[], Any]
    set_adapter: Callable[..., None]
    _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]

    def __init__(self, base_layer: nn.Module, adapter_name: str, rank: int, config: DeboraConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._factor_names = tuple(self.mode_sizes())  # kept: every forward asks
        self.r: dict[str, int] = {}
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict({}))
        self.debora_s = BufferDict({}, persistent=True)
        self._manifolds: dict[str, tuple[str, ...]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, rank, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output and the adapters' own, added up."""
        adapters = self.adapters_in_effect()  # before the base layer: it may unmerge
        result = self.base_layer(x, *args, **kwargs)
        for name in adapters:
            update = self.update(name, self._cast_input_dtype(x, self.debora_s[name].dtype))
            result = result + update.to(result.dtype)
        return result

    def adapters_in_effect(self) -> list[str]:
        """Adapters that a forward has to add to the base layer: active, not merged, of a rank above 0."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if self.r.get(name, 0) > 0]

    def update(self, adapter_name: str, x: Tensor) -> Tensor:
        """Psi applied to the layer's input, of the adapter's dtype; the rank is above 0."""
        raise NotImplementedError

    def mode_sizes(self) -> dict[str, int]:
        """Rows of each factor by the name of its dictionary; see `modes_with_factors` for modes without one."""
        shape = self._shape()
        return {self.adapter_layer_names[mode]: shape[mode] for mode in modes_with_factors(shape)}

    def _shape(self) -> tuple[int, ...]:
        """That of the base layer's weight with the modes of the factors, outputs first."""
        return weight_shape(self.get_base_layer())

    def factors(self, adapter_name: str) -> tuple[nn.Parameter, ...]:
        """U^(1), ..., U^(d), each (n_k, r), in the order of `mode_sizes`."""
        return tuple(getattr(self, name)[adapter_name] for name in self._factor_names)

    def units(self) -> tuple[float, ...]:
        """The length of a column of each of the free `factors` that counts as one, against the others of its component:
        in a basis that is definite, and for a penalty on them."""
        return (1.0,) * len(self._factor_names)

    def manifolds(self, adapter_name: str) -> tuple[str, ...]:
        """Where each of the `factors` lives: "euclidean", "oblique" or "stiefel"."""
        return self._manifolds[adapter_name]

    def update_layer(self, adapter_name: str, rank: int, config: DeboraConfig) -> None:
        """Add an adapter that leaves the layer's function as it is, up to the eps shift where `initial_factors` says.

        s starts at eps, or in the interior of the layer's simplex, s_i = eps + tau / r, so that with r = 8 and tau = 16
        the matrix geometry's step from there is that of LoRA with alpha = 16. They are at least float32: neither a
        manifold nor a small s bears less. Raises ValueError where the rank does not fit the layer.
        """
        weight = self.get_base_layer().weight
        like: dict[str, Any] = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        sizes = self.mode_sizes()
        manifolds = tuple(self._manifold(name, config.geometry) for name in sizes)
        interior = config.start == "interior"
        paired = interior and config.geometry == "oblique"
        values = initial_factors(tuple(sizes.values()), rank, manifolds, paired, **like)
        for name, value in zip(sizes, values, strict=True):
            getattr(self, name)[adapter_name] = nn.Parameter(value)
        s = config.eps + (config.tau / max(rank, 1) if interior else 0.0)
        self.r[adapter_name] = rank
        self._manifolds[adapter_name] = manifolds
        self.debora_s[adapter_name] = torch.full((rank,), s, **like)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _manifold(self, name: str, geometry: str) -> str:
        """Where the factor `name` lives."""
        return MANIFOLDS[geometry]

    def keep_columns(self, adapter_name: str, columns: Tensor, optimizer: Optimizer | None = None) -> None:
        """Remove every component whose index is not in `columns` (int64, any number of them, also none), and what an
        optimizer holds of it. The Parameter objects stay; see `methods.shared.optimizer_state`.
        """
        for parameter in self.factors(adapter_name):
            keep(parameter, columns, 1, optimizer)
        self.debora_s[adapter_name] = self.debora_s[adapter_name].index_select(0, columns)
        self.r[adapter_name] = len(columns)

    @torch.no_grad()
    def fold(self, adapter_name: str, scale: float, optimizer: Optimizer | None = None) -> None:
        """Move the sizes of the components from s into the factors, and let these go: they are euclidean from now on.

        U^(k) becomes U^(k) diag(s / scale)^(1/d), and s is `scale`, above 0, everywhere: Psi stays as it is. What an
        optimizer holds follows the gradients (`methods.shared.optimizer_state.change_basis`). Ours.
        """
        factors, s = self.factors(adapter_name), self.debora_s[adapter_name]
        by_component = (s / scale) ** (1 / len(factors))
        to_gradients = by_component.reciprocal().diag()
        for factor in factors:
            change_basis(factor, factor * by_component, to_gradients, 1, optimizer)
        s.fill_(scale)
        self.release(adapter_name)

    def release(self, adapter_name: str) -> None:
        """Let the factors leave their manifolds: `manifolds` says euclidean from now on. The numbers stay."""
        self._manifolds[adapter_name] = ("euclidean",) * len(self._manifolds[adapter_name])

    @torch.no_grad()
    def to_canonical_basis(self, adapter_name: str, optimizer: Optimizer | None = None, eps: float = 0.0) -> Tensor:
        """Bring the factors, s and what an optimizer holds of them to a basis in which components mean something.

        Psi stays, up to rounding. Two free factors: the SVD of U diag(s) V^T, with the numbers of s in descending
        order; see `methods.shared.canonical.singular_basis`. More factors: `normalised`. On the manifolds columns have
        length 1, so that s has to be the singular values: two oblique factors are rotated unless one of those is below
        `eps`, where s may not be; then, and where the columns are orthonormal already, components are sorted by s.
        Returns the layer's s, (r,), which the search has to take over; its sum has not grown.
        """
        factors, s = self.factors(adapter_name), self.debora_s[adapter_name]
        kinds = self.manifolds(adapter_name)
        if kinds == ("euclidean", "euclidean"):
            basis = singular_basis(factors[0], factors[1], s)
        else:
            basis = normalised(factors, s, self.units() if set(kinds) == {"euclidean"} else None)
        if kinds == ("oblique", "oblique"):
            rotated = singular_basis(factors[0], factors[1], s, unit_columns=True)
            basis = rotated if (rotated.s >= max(eps, torch.finfo(s.dtype).tiny)).all() else basis
        for factor, values, P in zip(factors, basis.factors, basis.maps, strict=True):
            change_basis(factor, values, P, 1, optimizer)
        s.copy_(basis.s)
        return s

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Psi, shaped as the weight."""
        raise NotImplementedError

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The update is low-rank and additive."""
        return True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters (all active ones by default) to the base weight. `safe_merge`: ValueError unless finite.

        Raises ValueError where the base weight is packed."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.r:
                continue
            weight = self.get_base_layer().weight
            if not weight.is_floating_point():
                raise ValueError("the base weight is packed into integers: merge into the backbone in bf16 or fp32")
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


class DeboraLinear(DeboraLayer):
    """A linear layer with a dEBORA adapter, Psi = U diag(s) V^T: (..., inputs) to (..., outputs).

    The base layer is nn.Linear, or transformers' Conv1D, whose weight is W^T.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See `DeboraLayer.forward`: one fused function where the base layer is plain, frozen and has one adapter."""
        adapters = self.adapters_in_effect()
        if len(adapters) != 1 or args or kwargs or not _is_plain_and_frozen(self.base_layer):
            return super().forward(x, *args, **kwargs)
        base: Any = self.base_layer
        name, device = adapters[0], x.device.type
        U, V = self.factors(name)
        B, W = U * self.debora_s[name], base.weight.T if type(base) is Conv1D else base.weight
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # which autocast leaves alone
            dtype = torch.get_autocast_dtype(device)
            bias = None if base.bias is None else base.bias.to(dtype)
            with torch.autocast(device, enabled=False):
                return fused_linear(x.to(dtype), W.to(dtype), bias, B.to(dtype), V.to(dtype))
        if x.dtype == W.dtype and V.dtype in (W.dtype, torch.promote_types(W.dtype, torch.float32)):
            return fused_linear(x, W, base.bias, B, V)
        return super().forward(x)

    def update(self, adapter_name: str, x: Tensor) -> Tensor:
        """See `DeboraLayer.update`."""
        U, V = self.factors(adapter_name)
        # s goes into U, which is smaller than the batch's activations.
        return nn.functional.linear(x @ V, U * self.debora_s[adapter_name])

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """U diag(s) V^T, (outputs, inputs); of a Conv1D its transpose."""
        U, V = self.factors(adapter_name)
        update = (U * self.debora_s[adapter_name]) @ V.T
        return update.T if is_transposed(self.get_base_layer()) else update

    def _shape(self) -> tuple[int, ...]:
        """(outputs, inputs)."""
        shape = super()._shape()
        return shape[::-1] if is_transposed(self.get_base_layer()) else shape


def _is_plain_and_frozen(layer: nn.Module) -> bool:
    """Whether nothing but the formula of a linear layer happens in its forward, and it takes no gradients."""
    if type(layer) not in (nn.Linear, Conv1D) or layer.weight.requires_grad:
        return False
    if "forward" in vars(layer):  # accelerate replaces it
        return False
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return not hooks and not (layer.bias is not None and layer.bias.requires_grad)
