"""A trained dEBORA adapter as a stock LoRA adapter, which PEFT loads without this project."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.torch import save_file
from torch import Tensor, nn

from methods.debora.layer import DeboraLayer
from methods.lora import PREFIX


def lora_pair(layer: DeboraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """(B, A) of a LoRA layer with the same update; B holds U diag(s), A the product of the other factors.

    A linear layer's are (outputs, r) and (r, inputs). A convolution's are (C_out, r, 1, 1) and (r, C_in, kH, kW): a CP
    component is one LoRA component, exactly. Raises ValueError for a convolution that PEFT's LoRA would not follow: it
    copies the stride and the padding of the base layer, but neither its dilation nor its padding mode.
    """
    base = layer.get_base_layer()
    if isinstance(base, nn.Conv2d) and (base.padding_mode != "zeros" or base.dilation != (1, 1)):
        raise ValueError(
            f"stock LoRA has neither dilation = {base.dilation} nor padding_mode = '{base.padding_mode}': "
            "merge_and_unload and save_pretrained keep this layer's update"
        )
    s = layer.debora_s[adapter_name]
    named = dict(zip(layer.mode_sizes(), layer.factors(adapter_name), strict=True))
    modes = [named.get(name, s.new_ones(1, len(s))).detach() for name in layer.adapter_layer_names]
    B = modes[0] * s
    if len(modes) == 2:
        return B, modes[1].T
    return B[..., None, None], torch.einsum("ir,hr,wr->rihw", *modes[1:])


def write_stock_lora(
    path: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], head: Mapping[str, nn.Module], base_model: str | None
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` into the folder `path`.

    pairs: layer name -> its `lora_pair`; the update is B A. LoRA knows no rank 0, so layers of rank 0 are not among its
    targets. `head` goes into modules_to_save, by its name.
    """
    ranks = {name: A.shape[0] for name, (_, A) in pairs.items() if A.shape[0] > 0}
    # PEFT reads these keys as regular expressions for the end of a name: this form matches one layer only.
    patterns = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    largest = max(ranks.values(), default=1)
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),  # alpha = rank: LoRA's scaling alpha / rank is 1 in every layer
        target_modules="|".join(map(re.escape, ranks)) or DUMMY_TARGET_MODULES,
        modules_to_save=list(head) or None,
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    tensors = {}
    for name in ranks:
        tensors[f"{PREFIX}{name}.lora_B.weight"], tensors[f"{PREFIX}{name}.lora_A.weight"] = pairs[name]
    for name, module in head.items():
        tensors |= {f"{PREFIX}{name}.{key}": value for key, value in module.state_dict().items()}
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(path))
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        path / "adapter_model.safetensors",
    )
