"""The network's weights by NumPy's SVD, and a slow reference: the weights composed anew from what trains of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from harness.registry import make_method
from tests.support.network import KINDS, method_training, weights_of

Triples = tuple[np.ndarray, np.ndarray, np.ndarray]


def singular_triples() -> dict[str, Triples]:
    """(U, sigma, V^T) of each layer's weight as (outputs, inputs)."""
    return {name: np.linalg.svd(weight.numpy(), full_matrices=False) for name, weight in weights_of().items()}


def triples_of(adaptation: Any) -> dict[str, Triples]:
    """Those that a run holds, whose signs are as good as any others: here they are checked to be the weights' SVD."""
    found = {}
    for name, (_, sigma, _) in singular_triples().items():
        U, own, Vh = (getattr(adaptation.bases[name], part).numpy().copy() for part in ("U", "sigma", "Vh"))
        np.testing.assert_allclose(own, sigma, atol=1e-12)
        np.testing.assert_allclose((U * own) @ Vh, weights_of()[name].numpy(), atol=1e-12)
        for rows in (U.T, Vh):
            np.testing.assert_allclose(rows @ rows.T, np.eye(len(own)), atol=1e-12)
        found[name] = U, own, Vh
    return found


def reference_training(
    factors: Mapping[str, Triples],
    starts: Mapping[str, tuple[Tensor, ...]],
    compose: Callable[..., Tensor],
    learning_rate: float,
    batches: int = 12,
) -> tuple[list[float], dict[str, tuple[nn.Parameter, ...]]]:
    """The losses, and what has trained, where each weight is U C V^T with these factors, and C is composed of (layer,
    sigma, *what trains): its diagonal, (d,), or the whole, (d, d).

    By AdamW and gradients clipped at 1, on the batches of `method_training`.
    """
    training = method_training(make_method("head", {}), batches=batches)
    model, head = training.adaptation.model, training.adaptation.model.get_submodule("head")
    triples = {name: tuple(map(torch.from_numpy, found)) for name, found in factors.items()}
    values = {name: tuple(nn.Parameter(start.clone()) for start in starts[name]) for name in KINDS}
    trained = [*(value for own in values.values() for value in own), *head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    losses = []
    for _ in range(batches):
        weights = {}
        for name, (U, sigma, Vh) in triples.items():
            core = compose(name, sigma, *values[name])
            weight = U @ (torch.diag(core) if core.dim() == 1 else core) @ Vh
            shape = model.get_parameter(f"{name}.weight").shape
            weights[f"{name}.weight"] = weight.T if name == "transposed" else weight.reshape(shape)
        batch = training.task.collate(training.encoded, training.data.draw("all"), None)
        loss = functional.cross_entropy(functional_call(model, weights, kwargs=batch.inputs), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, values
