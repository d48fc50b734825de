"""Trained low-rank updates as a stock LoRA adapter, which PEFT loads without this project."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn

from harness.method import is_transposed
from harness.storage import save_tensors
from methods.shared.peft_names import ADAPTER, PREFIX


def unlike_stock(layer: nn.Module) -> str | None:
    """Why PEFT's LoRA would not follow this base layer, or None: of a convolution it copies the stride and the padding,
    but neither the dilation nor the padding mode."""
    if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or layer.dilation != (1, 1)):
        return f"stock LoRA has neither dilation = {layer.dilation} nor padding_mode = '{layer.padding_mode}'"
    return None


def is_cut(B: Tensor, A: Tensor) -> Tensor:
    """(r,) bool: the components of which both factors are 0. They add nothing and no gradient leads away from them:
    `Adaptation.at_rank` leaves them so, a LoRA's start does not."""
    return ~(B.flatten(2).any(2) if B.dim() > 2 else B).any(0) & ~A.flatten(1).any(1)


def export_stock_lora(
    path: Path,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    model: Any,
    head: Iterable[str],
    biases: Mapping[str, Tensor] | None = None,
) -> None:
    """`write_stock_lora` with the head, given by its modules' names, of a PEFT model with one adapter."""
    tuner = model.base_model
    trained = {name: tuner.model.get_submodule(f"{name}.modules_to_save.{ADAPTER}") for name in head}
    adapted = [tuner.model.get_submodule(name).get_base_layer() for name in pairs]
    base_model = tuner.peft_config[ADAPTER].base_model_name_or_path
    transposed = bool(adapted) and all(map(is_transposed, adapted))
    write_stock_lora(path, pairs, trained, base_model, transposed, biases or {})


def write_stock_lora(
    path: Path,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    head: Mapping[str, nn.Module],
    base_model: str | None,
    transposed: bool = False,
    biases: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` into the folder `path`.

    pairs: layer name -> (B, A), (outputs, r) and (r, inputs), of a convolution with kernels; the update is B A.
    Components that are cut (`is_cut`) are not written. LoRA knows no rank 0, so layers of rank 0 are not among its
    targets. `head` goes into modules_to_save, by its name. `transposed`: the base layers keep their weights as (inputs,
    outputs), which PEFT else finds out with a warning. biases: layer name -> what is added to its outputs, (outputs,).
    """
    pairs = {name: (B[:, ~is_cut(B, A)], A[~is_cut(B, A)]) for name, (B, A) in pairs.items()}
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
        fan_in_fan_out=transposed,
        lora_bias=any(name in ranks for name in biases),
        inference_mode=True,
    )
    tensors = {}
    for name in ranks:
        tensors[f"{PREFIX}{name}.lora_B.weight"], tensors[f"{PREFIX}{name}.lora_A.weight"] = pairs[name]
        if config.lora_bias:
            B = pairs[name][0]
            tensors[f"{PREFIX}{name}.lora_B.bias"] = biases[name] if name in biases else B.new_zeros(len(B))
    for name, module in head.items():
        tensors |= {f"{PREFIX}{name}.{key}": value for key, value in module.state_dict().items()}
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(path))
    save_tensors(tensors, path / "adapter_model.safetensors")
