"""The hypergradient of a model in training: which batches it takes, and what is differentiated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.method import Indices, Step, TrainData
from methods.debora.math import hypergradient, manifolds
from methods.debora.tuner.layer import DeboraLayer
from methods.shared.optimizer_state import gradient_of
from methods.shared.peft_names import ADAPTER

SECOND_DERIVATIVES = SDPBackend.MATH  # the fused attention kernels have none


class HypergradientRule(NamedTuple):
    """Which hypergradient is taken."""

    kind: Literal["closed_form", "direct", "implicit", "free", "path"]
    on_manifolds: bool  # the factors are confined to manifolds
    paper_coefficient: bool  # closed_form of a convolution: the paper's coefficient instead of the exact one
    damping: float  # implicit: added to the Hessian's diagonal, the lower level's weight decay included
    iterations: int  # implicit: most products with the Hessian
    path_points: int  # path: points between 0 and s


class UpperGradient(NamedTuple):
    """G(s) of all layers' components in one row, (sum of ranks,), and the batch of f1 that it was taken on, of `path`
    the last one."""

    value: Tensor
    loss: Tensor
    batch: Indices
    residual: float  # of the implicit system, relative; 0 where none was solved


def upper_gradient(
    rule: HypergradientRule,
    layers: Sequence[DeboraLayer],
    step: Step,
    data: TrainData,
    optimizer: torch.optim.Optimizer,
) -> UpperGradient:
    """G(s) on one batch of the upper half. Leaves no gradients behind, and takes no other layer's into account.

    Batches used: 1; for `path` one at each of its points; for `implicit` at least 3 more: the lower level's gradient on
    one batch of the lower half, kept with its graph, one for each product with its Hessian, and one for the mixed
    derivative. `free` takes none and is not made here: see `FreeGradient`.
    """
    optimizer.zero_grad(set_to_none=True)
    if rule.kind == "path":
        return _path(rule.path_points, layers, step, data, optimizer)
    batch = data.draw("upper")
    with _differentiable_s(layers):
        loss = step.backward(batch)
        grad_s = torch.cat([gradient_of(layer.debora_s[ADAPTER]) for layer in layers])
        grads = [[gradient_of(factor) for factor in layer.factors(ADAPTER)] for layer in layers]
        residual = 0.0
        if rule.kind == "implicit":
            optimizer.zero_grad(set_to_none=True)
            value, residual = _implicit(rule, layers, step, data, grad_s, grads)
        elif rule.kind == "direct" or rule.on_manifolds:
            # On a manifold the Riemannian gradient has no radial part: the closed form is the direct term, exactly.
            value = hypergradient.direct(grad_s)
        else:
            value = _closed_form(rule, layers, grad_s, grads)
    optimizer.zero_grad(set_to_none=True)
    return UpperGradient(value, loss, batch, residual)


class FreeGradient:
    """`free` (ours): d_s f of the lower level's own batches, each before its update, at no batch of the budget.

    It reads the gradient of each layer's first factor, which the layer multiplies by s: the gradient is s times that of
    the product, so that dividing by s loses nothing, however small s is. It holds on every manifold and for any number
    of modes (`hypergradient.radial`). Where a factor is 0, so is d_s f.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None  # of s (.) d_s f, (sum of ranks,)
        self.batches = 0
        self.factors: list[nn.Parameter] = []  # of the layers since the last `reset`: to look them up costs more

    @torch.no_grad()
    def add(self, layers: Sequence[DeboraLayer]) -> None:
        """Count the batch whose gradients the factors hold: Euclidean, of the mean loss alone, not yet clipped.

        The same layers, at the same ranks and s, as since the last `take`.
        """
        self.factors = self.factors or [layer.factors(ADAPTER)[0] for layer in layers]
        value = hypergradient.radial(self.factors, [gradient_of(factor) for factor in self.factors])
        self.total = value if self.total is None else self.total + value
        self.batches += 1

    def take(self, s: Tensor) -> Tensor:
        """The mean of d_s f over the batches since the last call, (sum of ranks,), at least one; and begin anew.

        s: of the same components, (sum of ranks,). Raises ValueError where no batch was added.
        """
        if self.total is None:
            raise ValueError("no batch was added")
        mean = self.total / (self.batches * s)
        self.reset()
        return mean

    def reset(self) -> None:
        """Forget the batches so far: where components have changed, as in another basis."""
        self.total, self.batches, self.factors = None, 0, []

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact resume needs."""
        return {"total": self.total, "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore what `state_dict` gave."""
        total = state["total"]
        self.total, self.batches = None if total is None else total.to(device), state["batches"]


def _path(
    points: int, layers: Sequence[DeboraLayer], step: Step, data: TrainData, optimizer: torch.optim.Optimizer
) -> UpperGradient:
    """The mean of d_s f1 over points t s between 0 and s, all layers together, each on its own batch (ours)."""
    buffers = [layer.debora_s[ADAPTER] for layer in layers]
    before, total = [s.clone() for s in buffers], torch.zeros_like(torch.cat(buffers))
    try:
        for j in range(points):
            batch = data.draw("upper")
            torch._foreach_copy_(buffers, torch._foreach_mul(before, hypergradient.path_point(j, points)))
            with _differentiable_s(layers):
                loss = step.backward(batch)
                total += torch.cat([gradient_of(s) for s in buffers])
            optimizer.zero_grad(set_to_none=True)
    finally:
        torch._foreach_copy_(buffers, before)
    return UpperGradient(total / points, loss, batch, 0.0)


def _closed_form(
    rule: HypergradientRule, layers: Sequence[DeboraLayer], grad_s: Tensor, grads: Sequence[Sequence[Tensor]]
) -> Tensor:
    parts = grad_s.split([layer.r[ADAPTER] for layer in layers])
    return torch.cat(
        [
            hypergradient.closed_form(
                part,
                [factor.detach() for factor in layer.factors(ADAPTER)],
                own,
                layer.debora_s[ADAPTER].detach(),
                rule.paper_coefficient,
            )
            for layer, part, own in zip(layers, parts, grads, strict=True)
        ]
    )


def _implicit(
    rule: HypergradientRule,
    layers: Sequence[DeboraLayer],
    step: Step,
    data: TrainData,
    grad_s: Tensor,
    grads: Sequence[Sequence[Tensor]],
) -> tuple[Tensor, float]:
    """(G, relative residual) by MINRES with products from autograd: B is every factor of every layer.

    f2 is the loss on one lower batch plus weight_decay / 2 ||B||^2, which stands for the optimizer's decoupled decay.
    On a manifold, H is the Riemannian Hessian: the derivative of the Riemannian gradient, projected.
    """
    system = LowerSystem(layers, step, data.draw("lower"))
    right = system.project([grad for own in grads for grad in own]).detach()
    iterations = min(rule.iterations, step.budget - step.used - 1)  # the mixed derivative takes one as well
    value, solution = hypergradient.implicit(grad_s, right, system.hessian, system.mixed, rule.damping, iterations)
    return value, solution.residual


class LowerSystem:
    """d_B^2 f2 and d_s d_B f2 on one batch, as products with vectors. Every product uses one batch of the budget."""

    def __init__(self, layers: Sequence[DeboraLayer], step: Step, batch: Indices) -> None:
        self.step = step
        self.factors: list[nn.Parameter] = [factor for layer in layers for factor in layer.factors(ADAPTER)]
        self.manifolds: list[Any] = [manifold for layer in layers for manifold in layer.manifolds(ADAPTER)]
        self.s = [layer.debora_s[ADAPTER] for layer in layers]
        with sdpa_kernel(SECOND_DERIVATIVES):
            loss = step.loss(batch)
            grads = torch.autograd.grad(loss, self.factors, create_graph=True, materialize_grads=True)
        self.gradient = self.project(grads)

    def project(self, vectors: Sequence[Tensor]) -> Tensor:
        """One vector per factor, each onto the tangent space at its factor, in one row, (N,)."""
        triples = zip(self.manifolds, self.factors, vectors, strict=True)
        return torch.cat([manifolds.project_tangent(*triple).flatten() for triple in triples])

    def hessian(self, vector: Tensor) -> Tensor:
        """d_B^2 f2 times a tangent vector, (N,) to (N,)."""
        return self.project(self._product(vector, self.factors)).detach()

    def mixed(self, vector: Tensor) -> Tensor:
        """(d_s d_B f2)^T times a tangent vector, (N,) to (sum of ranks,)."""
        return torch.cat(self._product(vector, self.s)).detach()

    def _product(self, vector: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        self.step.spend(1)
        with sdpa_kernel(SECOND_DERIVATIVES):  # gradient checkpointing computes the loss again
            return torch.autograd.grad(self.gradient, inputs, vector, retain_graph=True, materialize_grads=True)


@contextmanager
def _differentiable_s(layers: Sequence[DeboraLayer]) -> Iterator[None]:
    """s takes gradients inside, and has none after."""
    buffers = [layer.debora_s[ADAPTER] for layer in layers]
    for s in buffers:
        s.requires_grad_(True)
    try:
        yield
    finally:
        for s in buffers:
            s.requires_grad_(False)
            s.grad = None
