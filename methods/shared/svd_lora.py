"""Updates P diag(E) Q, as PEFT's AdaLoRA layers hold them, at ranks that may differ and change.

In a layer `lora_B` is P, (outputs, r); `lora_E` is E, (r, 1), 0 at the start; `lora_A` is Q, (r, inputs), of a
convolution (r, C kH kW). The forward takes r from these shapes. The scale, alpha / (ranknum + 1e-5), stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from methods.shared.peft_names import ADAPTER

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.method import Backbone

FACTORS = (("lora_E", 0), ("lora_A", 0), ("lora_B", 1))  # each with its dimension of components


def svd_model(backbone: Backbone, ranks: Mapping[str, int], alpha: float, rank: int, dropout: float) -> nn.Module:
    """The backbone with PEFT's AdaLoRA layers at these ranks, all above 0; every update is scaled by alpha / rank."""
    import torch
    from peft import AdaLoraConfig

    from methods.shared.optimizer_state import keep
    from methods.shared.peft_model import peft_model

    config = AdaLoraConfig(
        init_r=max(ranks.values()),
        lora_alpha=alpha,
        lora_dropout=dropout,
        total_step=1,
        orth_reg_weight=0.0,  # PEFT would add its penalty to any loss that the model returns, evaluations included
        target_modules=list(ranks),
        modules_to_save=list(backbone.head) or None,
    )
    model: Any = peft_model(backbone.module, config)
    for name, own in ranks.items():
        layer = model.base_model.model.get_submodule(name)
        layer.ranknum[ADAPTER].requires_grad_(False).fill_(float(rank))  # PEFT forgets the former on the meta device
        for factor, dim in FACTORS:
            parameter = getattr(layer, factor)[ADAPTER]
            keep(parameter, torch.arange(own, device=parameter.device), dim, None)
    return model


def orthogonality(layers: Iterable[Any]) -> Tensor:
    """||P^T P - I||_F and ||Q Q^T - I||_F, equation 4 of AdaLoRA (Zhang et al., 2023), averaged over the factors as in
    PEFT."""
    return distance_from_orthogonal([f for layer in layers for f in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER].T)])


def distance_from_orthogonal(factors: Sequence[Tensor]) -> Tensor:
    """||F F^T - I||_F, averaged over the factors F, whose rows are to be orthonormal."""
    import torch

    identities = {len(f): torch.eye(len(f), dtype=f.dtype, device=f.device) for f in factors}
    return torch.stack([torch.linalg.matrix_norm(f @ f.T - identities[len(f)]) for f in factors]).mean()


def lora_pair(name: str, layer: Any) -> tuple[Tensor, Tensor]:
    """(B, A) of a LoRA layer with the same update: P diag(E) times the scale, and Q, without triplets whose E is 0.

    A linear layer's are (outputs, r) and (r, inputs), a convolution's (C_out, r, 1, 1) and (r, C_in, kH, kW). Raises
    ValueError for a convolution that stock LoRA does not follow.
    """
    from torch import nn

    from methods.shared.stock_lora import unlike_stock

    E = layer.lora_E[ADAPTER].detach()
    kept = E[:, 0] != 0
    A = layer.lora_A[ADAPTER].detach()[kept]
    scaling = layer.scaling[ADAPTER] / (layer.ranknum[ADAPTER] + 1e-5)  # PEFT's
    B = layer.lora_B[ADAPTER].detach()[:, kept] * E[kept, 0] * scaling
    base = layer.get_base_layer()
    if not isinstance(base, nn.Conv2d):
        return B, A
    reason = unlike_stock(base)
    if reason is not None:
        raise ValueError(f"'{name}': {reason}")
    return B[..., None, None], A.reshape(-1, *base.weight.shape[1:])
