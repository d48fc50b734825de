"""PEFT's AdaMSS layers: their subspaces, the averages that an exact resume needs, and their update as a LoRA's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from methods.shared.peft_names import ADAPTER

if TYPE_CHECKING:
    from torch import Tensor, nn

IMPORTANCE = ("exp_avg_ipt_A", "exp_avg_ipt_B", "exp_avg_unc_A", "exp_avg_unc_B")  # a layer's averages, by subspace
Averages = dict[str, dict[str, list[Any]]]  # of each layer; None of a subspace that no loss has reached


def adamss_layers(model: nn.Module) -> dict[str, Any]:
    """AdaMSS's layers by their names; {} for another tuner."""
    return {name: part for name, part in model.named_modules() if hasattr(part, IMPORTANCE[0])}


def importance(model: nn.Module) -> Averages:
    """The averages of every layer since its last allocation; no entries without an allocation."""
    layers = adamss_layers(model).items()
    return {name: {kind: getattr(layer, kind).get(ADAPTER, []) for kind in IMPORTANCE} for name, layer in layers}


def load_importance(model: nn.Module, saved: Averages) -> None:
    """Restore what `importance` gave."""
    for name, layer in adamss_layers(model).items():
        device = next(layer.parameters()).device
        for kind, values in saved[name].items():
            getattr(layer, kind)[ADAPTER] = [None if v is None else v.to(device) for v in values]


def subspaces(layer: Any) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """(B_i, A_i) of each, (rows of the cluster, r_i) and (r_i, basis rank)."""
    return list(zip(layer.adamss_B[ADAPTER], layer.adamss_A[ADAPTER], strict=True))


def score(layer: Any, number: int) -> float:
    """PEFT's score of a subspace: the mean of importance times uncertainty over A_i, and that over B_i; 0 where no loss
    has reached it since the last allocation."""
    found = 0.0
    for factor in "AB":
        smoothed = getattr(layer, f"exp_avg_ipt_{factor}")[ADAPTER][number]
        if smoothed is not None:
            found += float((smoothed * getattr(layer, f"exp_avg_unc_{factor}")[ADAPTER][number]).mean())
    return found


def largest_components(layer: Any, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The parameters that change, each with its value, where a layer's update is cut to `rank` components: the largest
    singular values of all its B_i A_i. Clusters share no row, and V is orthonormal, so the squared error is the sum of
    the squares of those that go: the least for a cut that keeps the clusters."""
    from methods.shared.canonical import lora_basis
    from methods.shared.cut_lora import among_largest
    from methods.shared.truncation import best_approximation

    pairs = subspaces(layer)
    for (B, A), kept in zip(pairs, among_largest([lora_basis(*pair).sizes for pair in pairs], rank), strict=True):
        if kept < len(A):
            yield from zip((B, A), best_approximation(B, A, kept), strict=True)


def as_lora(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(B, A, b) with the layer's update: (outputs, r), (r, inputs), and what is added to its bias, (outputs,)."""
    import torch

    pairs = subspaces(layer)
    A = torch.cat([A.detach() for _, A in pairs]).double() @ layer.adamss_newB[ADAPTER].double()
    B = torch.zeros(layer.out_features, len(A), dtype=A.dtype, device=A.device)
    B[layer.scatter_index[ADAPTER].to(A.device)] = torch.block_diag(*(B.detach().double() for B, _ in pairs))
    weight, inputs = layer.get_base_layer().weight, layer.in_features
    bias = (B @ A[:, inputs:]).sum(1)
    return B.to(weight.dtype), A[:, :inputs].contiguous().to(weight.dtype), bias.to(weight.dtype)
