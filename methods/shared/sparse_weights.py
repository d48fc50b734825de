"""Chosen entries of frozen weights that train: a flat vector of values, scattered into the weight at every forward.

The frozen weight stays as it is. What the layer multiplies with is a copy of it with the values in their places, so
gradient and moments are of the values alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from harness.errors import Diverged
from harness.method import as_matrix

Places = Mapping[str, Tensor]  # by layer: places in the weight flattened as it is stored, int64, ascending


class SparseValues(nn.Module):
    """The entries of one weight that are not the frozen one's: `values` (k,), which train, at `places` (k,), and those
    that have settled. Values are at least float32, and cast to the weight's dtype in use."""

    places: Tensor
    settled: Tensor
    settled_places: Tensor

    def __init__(self, weight: Tensor, places: Tensor) -> None:
        super().__init__()
        own = weight.detach().flatten()[places]
        self.values = nn.Parameter(own.to(torch.promote_types(own.dtype, torch.float32)))
        self.register_buffer("places", places)
        self.register_buffer("settled", self.values.detach()[:0].clone())
        self.register_buffer("settled_places", places[:0].clone())

    def forward(self, weight: Tensor) -> Tensor:
        """The weight in effect, of the frozen one's shape and dtype."""
        flat = weight.flatten()
        if len(self.settled):
            flat = flat.scatter(0, self.settled_places, self.settled.to(flat))
        return flat.scatter(0, self.places, self.values.to(flat)).view(weight.shape)

    def trained_alone(self, layer: nn.Module) -> Tensor:
        """Of the layer's weight, those that train, 0 elsewhere: (outputs, inputs) as `as_matrix` has them."""
        shape = _original(layer).shape
        zeros = self.values.new_zeros(shape.numel())
        return as_matrix(layer, zeros.scatter(0, self.places, self.values).view(shape))

    def start_alone(self, layer: nn.Module) -> Tensor:
        """The same places of the frozen weight."""
        weight = _original(layer)
        mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        mask[self.places] = True
        return as_matrix(layer, (weight.flatten() * mask).view(weight.shape)).to(self.values.dtype)

    def settle(self, stays: Tensor) -> None:
        """Move the values that do not stay in training to the settled ones; the caller cuts `values` itself."""
        self.settled = torch.cat([self.settled, self.values.detach()[~stays]])
        self.settled_places = torch.cat([self.settled_places, self.places[~stays]])
        self.places = self.places[stays]

    def entries(self) -> tuple[Tensor, Tensor]:
        """All places in ascending order, int32 where that holds them, and their values."""
        places, order = torch.cat([self.settled_places, self.places]).sort()
        return places.to(_place_dtype(places)), torch.cat([self.settled, self.values.detach()])[order]

    def numbers(self) -> int:
        """Entries that are not the frozen weight's."""
        return self.values.numel() + self.settled.numel()


def train_entries(layer: nn.Module, places: Tensor) -> SparseValues:
    """Have the layer's weight, which is frozen, train at these places."""
    part = SparseValues(layer.get_parameter("weight"), places)
    parametrize.register_parametrization(layer, "weight", part)
    return part


def smallest(weights: Mapping[str, Tensor], number: int) -> tuple[dict[str, Tensor], float]:
    """The places of the `number` smallest magnitudes of all weights together, and the smallest magnitude that is left
    out, inf where none is. Of equal ones the first are taken."""
    sizes = torch.cat([_magnitudes(weight) for weight in weights.values()])
    limit = float(sizes.kthvalue(number + 1).values) if number < len(sizes) else math.inf
    below = sizes < limit
    equal = (sizes == limit).nonzero().flatten()
    below[equal[: number - int(below.sum())]] = True
    parts = below.split([weight.numel() for weight in weights.values()])
    return {name: part.nonzero().flatten() for name, part in zip(weights, parts, strict=True)}, limit


def below(weights: Mapping[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """The places of the entries with a magnitude below the threshold."""
    return {name: (_magnitudes(weight) < threshold).nonzero().flatten() for name, weight in weights.items()}


def nuclear_norm(matrix: Tensor) -> Tensor:
    """The sum of the singular values of (m, n), a scalar; its gradient is U V^T over the singular values above 0, the
    subgradient of least norm. Raises Diverged where a number is not finite: the loop may not have seen the loss that
    would tell."""
    if not matrix.isfinite().all():
        raise Diverged("a layer's weights in training are not finite")
    with torch.no_grad():
        U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
        live = sigma > sigma[0] * max(matrix.shape) * torch.finfo(sigma.dtype).eps
        polar = U[:, live] @ Vh[live]
    return (polar * matrix).sum()


def place_bytes(places: Tensor) -> int:
    """Bytes of one place where it is stored."""
    return _place_dtype(places).itemsize


def _place_dtype(places: Tensor) -> torch.dtype:
    if places.is_meta or not len(places):
        return torch.int32
    return torch.int32 if int(places.max()) < 2**31 else torch.int64


def _magnitudes(weight: Tensor) -> Tensor:
    flat = weight.detach().flatten()
    return flat.to(torch.promote_types(flat.dtype, torch.float32)).abs()


def _original(layer: nn.Module) -> Tensor:
    return layer.get_parameter("parametrizations.weight.original")
