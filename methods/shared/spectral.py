"""Updates in the basis of the frozen weight's own singular vectors: W + U C V^T, with a small C that trains.

The update alone is computed, beside W. So the model is the backbone bit for bit as long as C is 0, whatever an SVD
rounds. A convolution's kernel counts as its flattened matrix, (C_out, C_in kH kW).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.method import Adaptation, Backbone, as_matrix, is_transposed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BASIS = "spectral"  # the submodule of a layer with its triples and what trains


def add_bases(backbone: Backbone, targets: Sequence[str]) -> dict[str, Any]:
    """Freeze all but the head, and give every target its weight's singular triples, by the layer's name.

    They are a submodule with U (outputs, d), sigma (d,), descending, and Vh (d, inputs), d being the smaller side.
    These are buffers: no parameters, and in every checkpoint, since an SVD need not give the same on another machine.
    """
    import torch
    from torch import nn

    backbone.freeze()
    bases = {}
    for name in targets:
        layer, basis = backbone.module.get_submodule(name), nn.Module()
        weight = as_matrix(layer, layer.get_parameter("weight").detach())
        precise = weight if weight.dtype == torch.float64 else weight.float()
        for part, value in zip(("U", "sigma", "Vh"), torch.linalg.svd(precise, full_matrices=False), strict=True):
            basis.register_buffer(part, value.contiguous())
        layer.add_module(BASIS, basis)
        bases[name] = basis
    return bases


def keep_largest(basis: Any, number: int) -> None:
    """Leave the `number` triples of the largest singular values."""
    if number < len(basis.sigma):
        basis.U, basis.sigma, basis.Vh = (
            basis.U[:, :number].clone(),
            basis.sigma[:number].clone(),
            basis.Vh[:number].clone(),
        )


class SpectralAdaptation(Adaptation, ABC):
    """One run. bases: those of `add_bases`, with what trains in them as parameters."""

    def __init__(
        self, method: Any, optimizer: torch.optim.Optimizer, backbone: Backbone, bases: dict[str, Any]
    ) -> None:
        model = backbone.module
        super().__init__(model, optimizer, backbone)
        self.method = method
        self.bases = bases
        self.layers = {name: model.get_submodule(name) for name in bases}
        for layer in self.layers.values():
            layer.register_forward_hook(self._add_update)

    @abstractmethod
    def pair(self, basis: Any) -> tuple[Tensor, Tensor]:
        """(B, A) of a layer's update B A, with their graph: (outputs, r) and (r, inputs)."""

    def stored_bytes(self) -> int:
        """See `Adaptation.stored_bytes`: of an export, which holds the singular vectors too."""
        return sum(factor.nbytes for basis in self.bases.values() for factor in self.pair(basis)) + self.head_bytes()

    def scaled_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(B, A) of every layer, (outputs, r) and (r, inputs), of a convolution with kernels; without components that
        add nothing."""
        pairs = {}
        for name, layer in self.layers.items():
            B, A = (factor.detach() for factor in self.pair(self.bases[name]))
            adds = B.any(0)
            B, A = B[:, adds], A[adds]
            kernel = layer.get_parameter("weight").shape[1:]
            pairs[name] = (B[..., None, None], A.unflatten(1, kernel)) if len(kernel) > 1 else (B, A)
        return pairs

    def export(self, path: Path) -> None:
        """A stock LoRA adapter with the head, at the components that add something, within `at_rank` too."""
        from methods.shared.stock_lora import write_stock_lora

        head = {name: self.model.get_submodule(name) for name in self.head}
        transposed = bool(self.layers) and all(map(is_transposed, self.layers.values()))
        write_stock_lora(path, self.scaled_pairs(), head, getattr(self.model, "name_or_path", None), transposed)

    def _add_update(self, layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Hook of an adapted layer: its output and that of the update."""
        from torch.nn import functional

        B, A = self.pair(getattr(layer, BASIS))
        x, kernel = args[0].to(A.dtype), layer.weight.shape[1:]
        if len(kernel) == 1:
            update = functional.linear(functional.linear(x, A), B)
        else:
            inner = functional.conv2d(x, A.unflatten(1, kernel), None, layer.stride, layer.padding)
            update = functional.conv2d(inner, B[..., None, None])
        return output + update.to(output.dtype)
