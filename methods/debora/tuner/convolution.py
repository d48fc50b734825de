"""A convolution with a CP adapter, applied as a chain of small convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from methods.debora.tuner.config import DeboraConfig
from methods.debora.tuner.layer import DeboraLayer

SPATIAL = ("debora_height", "debora_width")


class DeboraConv2d(DeboraLayer):
    """A 2-d convolution whose kernel, (C_out, C_in, kH, kW), gets the CP form (dEBORA, tensor adapter)

    Psi = sum_i s_i u_i^(1) (x) u_i^(2) (x) u_i^(3) (x) u_i^(4),    U^(k) of (C_out, r), (C_in, r), (kH, r), (kW, r).

    That is r (C_out + C_in + kH + kW) parameters and s. The full kernel is never built in a forward: the input goes to
    r channels, each of which is convolved along the height and then along the width, and the r channels go to C_out.
    Raises ValueError for a grouped convolution.
    """

    adapter_layer_names = ("debora_U", "debora_V", *SPATIAL)

    debora_height: nn.ParameterDict
    debora_width: nn.ParameterDict

    def __init__(self, base_layer: nn.Module, adapter_name: str, rank: int, config: DeboraConfig) -> None:
        groups: Any = base_layer.groups
        if groups != 1:
            raise ValueError(f"groups = {groups}: a CP factor over all input channels does not fit a grouped kernel")
        super().__init__(base_layer, adapter_name, rank, config)

    def update(self, adapter_name: str, x: Tensor) -> Tensor:
        """See `DeboraLayer.update`: (N, C_in, H, W), or without N, to what the base layer makes of it.

        Stride, padding and dilation of an axis belong to the convolution along it. The projection to r channels sees
        one point at a time and takes those of an axis of size 1, which has no convolution of its own.
        """
        base = self.get_base_layer()
        if base.padding_mode != "zeros":
            x = pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
        named = dict(zip(self.mode_sizes(), self.factors(adapter_name), strict=True))
        rank = self.r[adapter_name]
        U, V = (named.get(name, x.new_ones(1, rank)) for name in ("debora_U", "debora_V"))
        height, width = (named.get(name) for name in SPATIAL)
        z = conv2d(x, V.T[:, :, None, None], **self._along(height is None, width is None))
        if height is not None:
            z = conv2d(z, height.T[:, None, :, None], groups=rank, **self._along(True, False))
        if width is not None:
            z = conv2d(z, width.T[:, None, None, :], groups=rank, **self._along(False, True))
        return conv2d(z, (U * self.debora_s[adapter_name])[:, :, None, None])

    def _along(self, height: bool, width: bool) -> dict[str, Any]:
        """The base layer's stride, padding and dilation along these axes, and none along the others."""
        base = self.get_base_layer()
        axes = (height, width)
        padding = base.padding if base.padding_mode == "zeros" else (0, 0)
        if not isinstance(padding, str):  # "same" pads as the small kernel needs, along its own axis only
            padding = tuple(size if axis else 0 for size, axis in zip(padding, axes, strict=True))
        return {
            "stride": tuple(step if axis else 1 for step, axis in zip(base.stride, axes, strict=True)),
            "padding": padding,
            "dilation": tuple(gap if axis else 1 for gap, axis in zip(base.dilation, axes, strict=True)),
        }

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The whole kernel, (C_out, C_in, kH, kW): for merging."""
        named = dict(zip(self.mode_sizes(), self.factors(adapter_name), strict=True))
        s = self.debora_s[adapter_name]
        modes = [named.get(name, s.new_ones(1, len(s))) for name in self.adapter_layer_names]
        return torch.einsum("r,or,ir,hr,wr->oihw", s, *modes)

    def units(self) -> tuple[float, ...]:
        """See `DeboraLayer.units`: small factors are as long as they start, with entries of variance 1."""
        sizes = self.mode_sizes()
        return tuple(sizes[name] ** 0.5 if name in SPATIAL else 1.0 for name in sizes)

    def _manifold(self, name: str, geometry: str) -> str:
        """See `DeboraLayer._manifold`. A factor of 3 rows cannot have 8 orthonormal columns, so it is oblique."""
        return "oblique" if geometry == "stiefel" and name in SPATIAL else super()._manifold(name, geometry)
