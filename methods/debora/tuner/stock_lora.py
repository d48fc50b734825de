"""What a trained dEBORA layer is as a LoRA layer."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.debora.tuner.layer import DeboraLayer
from methods.shared.stock_lora import unlike_stock


def lora_pair(layer: DeboraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """(B, A) of a LoRA layer with the same update; B holds U diag(s), A the product of the other factors.

    A linear layer's are (outputs, r) and (r, inputs). A convolution's are (C_out, r, 1, 1) and (r, C_in, kH, kW): a CP
    component is one LoRA component, exactly. Raises ValueError for a convolution that PEFT's LoRA would not follow: it
    copies the stride and the padding of the base layer, but neither its dilation nor its padding mode.
    """
    reason = unlike_stock(layer.get_base_layer())
    if reason is not None:
        raise ValueError(f"{reason}: merge_and_unload and save_pretrained keep this layer's update")
    s = layer.debora_s[adapter_name]
    named = dict(zip(layer.mode_sizes(), layer.factors(adapter_name), strict=True))
    modes = [named.get(name, s.new_ones(1, len(s))).detach() for name in layer.adapter_layer_names]
    B = modes[0] * s
    if len(modes) == 2:
        return B, modes[1].T
    return B[..., None, None], torch.einsum("ir,hr,wr->rihw", *modes[1:])
