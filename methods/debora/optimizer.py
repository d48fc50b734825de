"""AdamW for factors that are confined to a manifold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from harness.optimizer import can_fuse, decay_groups
from methods.debora.math import manifolds
from methods.shared.optimizer_state import gradient_of


class ManifoldAdamW(torch.optim.AdamW):
    """AdamW whose parameters of a group with a "manifold" stay on it.

    Their gradients are projected onto the tangent space by `project_gradients` (before clipping), AdamW's own update
    is projected as well, since its elementwise scaling leaves the tangent space, and its end point is retracted. The
    moments stay in the surrounding matrices: projecting is the vector transport (as in Becigneul and Ganea, 2019).
    """

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Replace the gradients of constrained parameters by Riemannian ones."""
        for manifold, parameters in self._constrained():
            points = torch.stack([p.detach() for p in parameters])
            gradients = torch.stack([gradient_of(p) for p in parameters])
            for parameter, gradient in zip(
                parameters, manifolds.project_tangent(manifold, points, gradients), strict=True
            ):
                if parameter.grad is not None:
                    parameter.grad.copy_(gradient)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """AdamW's step, then the way back to the manifolds."""
        before = [(manifold, same, torch.stack(list(same))) for manifold, same in self._constrained()]
        result = super().step(closure)
        for manifold, parameters, points in before:
            updates = torch.stack(list(parameters)) - points
            tangents = manifolds.project_tangent(manifold, points, updates)
            for parameter, moved in zip(parameters, manifolds.retract(manifold, points, tangents), strict=True):
                parameter.copy_(moved)
        return result

    def release(self, weight_decay: float) -> None:
        """Let every parameter leave its manifold: a free matrix from now on, decayed as such. The state stays.

        A checkpoint from after it needs no release before it is loaded, since it brings its own groups.
        """
        for group in self.param_groups:
            if group.pop("manifold", None) is not None:
                group["weight_decay"] = weight_decay

    def _constrained(self) -> Iterator[tuple[manifolds.Manifold, list[nn.Parameter]]]:
        """(manifold, parameters of one shape on it): they go through one batched decomposition."""
        for group in self.param_groups:
            if "manifold" not in group:
                continue
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            yield from ((group["manifold"], same) for shape, same in by_shape.items() if shape[-1] > 0)


def manifold_adamw(
    model: nn.Module, constrained: Iterable[tuple[nn.Parameter, str]], learning_rate: float, weight_decay: float
) -> ManifoldAdamW:
    """The optimizer over the model's trainable parameters; `constrained` names the manifold of some of them.

    Biases, norms and other vectors are not decayed, and neither is a parameter on a manifold, where decay would do
    nothing but shorten what the retraction makes long again.
    """
    by_manifold: dict[str, list[nn.Parameter]] = {}
    for parameter, manifold in constrained:
        if manifold != "euclidean":
            by_manifold.setdefault(manifold, []).append(parameter)
    on_manifold = {id(p) for parameters in by_manifold.values() for p in parameters}
    groups = decay_groups((p for p in model.parameters() if id(p) not in on_manifold), weight_decay)
    groups += [{"params": p, "weight_decay": 0.0, "manifold": manifold} for manifold, p in by_manifold.items()]
    return ManifoldAdamW(groups, lr=learning_rate, fused=can_fuse(groups))
