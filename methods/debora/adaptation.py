"""One run of dEBORA (Algorithms 1 and 2): the bilevel recipe around the tuner and the pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from harness.errors import Diverged
from harness.method import Adaptation, Backbone, Step, TrainData
from methods.debora import schedule as reach
from methods.debora.math import frank_wolfe
from methods.debora.optimizer import ManifoldAdamW, keep_optimizer_columns, manifold_adamw
from methods.debora.tuner.config import DeboraConfig
from methods.debora.tuner.layer import DeboraLayer
from methods.debora.tuner.model import DeboraModel
from methods.debora.tuner.stock_lora import lora_pair
from methods.debora.upper_level import UpperGradient, upper_gradient
from methods.shared.peft_names import ADAPTER
from methods.shared.stock_lora import export_stock_lora
from methods.shared.truncation import largest, swapped

if TYPE_CHECKING:
    from methods.debora.method import Debora


def adapt(method: Debora, backbone: Backbone, data: TrainData) -> DeboraAdaptation:
    """Put the adapter into the backbone and start its optimizer. On the meta device: shapes only."""
    targets = backbone.targets(method.target_modules)
    config = DeboraConfig(
        r=method.rank,
        tau=method.tau,
        eps=method.eps,
        geometry=method.geometry,
        start=method.start_point,
        target_modules="|".join(re.escape(name) for name in targets),
        modules_to_save=list(backbone.head) or None,
    )
    model: nn.Module = get_peft_model(backbone.module, config)
    return DeboraAdaptation(method, model, backbone, targets, data)


class DeboraAdaptation(Adaptation):
    """The lower level trains the factors and the head; every T_max updates the upper level moves s.

    weights:    vertex weights of the simplices, (B, C + 1): B layers of C = rank components, or one simplex of all.
    live:       positions of the components that are left, in layers x rank, flattened: (sum of ranks,), ascending.
    unchanged:  upper-level steps since the active set, the vertices with weight, changed last.
    identified: the face is: the search ends with this update.
    curvature:  backtracking's estimate of M, 0 before the first step.
    gradient:   the hypergradient that the last step followed, like the weights without their first column.
    """

    optimizer: ManifoldAdamW

    def __init__(
        self, method: Debora, model: nn.Module, backbone: Backbone, targets: tuple[str, ...], data: TrainData
    ) -> None:
        self.method = method
        self.data = data
        tuner: Any = model.base_model
        self.tuner: DeboraModel = tuner
        self.layers: dict[str, DeboraLayer] = {name: tuner.model.get_submodule(name) for name in targets}
        self.upper_steps = self.unchanged = 0
        self.curvature = 0.0
        self.identified = False
        device = self.layers[targets[0]].debora_s[ADAPTER].device
        num_components = len(targets) * method.rank
        shape = (len(targets), method.rank) if method.budget_scope == "layer" else (1, num_components)
        self.live = torch.arange(num_components, device=device)
        interior = method.start_point == "interior"
        self.weights = torch.full((shape[0], shape[1] + 1), 1 / shape[1] if interior else 0.0, device=device)
        self.weights[:, 0] = 0.0 if interior else 1.0
        self._write_s(self.weights)
        self.gradient = torch.zeros_like(self.weights[:, 1:])
        constrained = [
            pair
            for layer in self.layers.values()
            for pair in zip(layer.factors(ADAPTER), layer.manifolds(ADAPTER), strict=True)
        ]
        optimizer = manifold_adamw(model, constrained, method.learning_rate, method.weight_decay)
        super().__init__(model, optimizer, backbone)
        self.stream = "lower"

    def before_step(self, step: Step) -> None:
        """See `Adaptation.before_step`: clipping should see Riemannian gradients."""
        self.optimizer.project_gradients()

    def after_step(self, step: Step) -> dict[str, Any]:
        """See `Adaptation.after_step`. The history of an upper-level step is that of `_upper_step`; at the end of the
        search, `jump`, `rank`, `ranks` and `s` are those after the last truncation."""
        history: dict[str, Any] = {}
        if self.stream != "lower":
            return history
        possible = len(self.live) > 0 and step.used + reach.least_upper_batches(self.method) <= step.budget
        if (step.index + 1) % self.method.lower_updates(step.budget) == 0 and possible:
            history = self._upper_step(step)
        over = step.used >= self.method.search_fraction * step.budget
        if over or self.identified or len(self.live) == 0:
            self.stream = "all"
            emptied = self._emptied(self.weights).tolist()
            if any(emptied):
                jump = self._truncate(emptied)
                history |= {"jump": history.get("jump", 0.0) + jump} | self._sizes()
        return history

    def ranks(self) -> dict[str, int]:
        """See `Adaptation.ranks`."""
        return {name: layer.r[ADAPTER] for name, layer in self.layers.items()}

    def at_rank(self, rank: int) -> AbstractContextManager[None]:
        """See `Adaptation.at_rank`: the components with the largest s, which is what the method prunes by."""
        return swapped({s: largest(s, rank) for s in (layer.debora_s[ADAPTER] for layer in self.layers.values())})

    def adapter_parameters(self) -> int:
        """Factors and s of every layer: rank x (sizes of the weight's modes + 1)."""
        return sum(
            layer.r[ADAPTER] + sum(factor.numel() for factor in layer.factors(ADAPTER))
            for layer in self.layers.values()
        )

    def state_dict(self) -> dict[str, Any]:
        """See `Adaptation.state_dict`."""
        return super().state_dict() | {
            "weights": self.weights,
            "live": self.live,
            "upper_steps": self.upper_steps,
            "unchanged": self.unchanged,
            "curvature": self.curvature,
            "gradient": self.gradient,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Adaptation.load_state_dict`. The layers are cut down to the saved ranks first."""
        device = self.live.device
        self.live = state["live"].to(device)
        ranks = torch.bincount(self.live // self.method.rank, minlength=len(self.layers)).tolist()
        # Not the layers that are whole: cutting changes a factor's memory layout, and sums depend on that.
        cut = {name: rank for name, rank in zip(self.layers, ranks, strict=True) if rank < self.method.rank}
        self._keep({name: torch.arange(rank, device=device) for name, rank in cut.items()})
        super().load_state_dict(state)
        self.weights = state["weights"].to(device, copy=True)
        self.upper_steps, self.unchanged = state["upper_steps"], state["unchanged"]
        self.curvature = state["curvature"]
        self.gradient = state["gradient"].to(device, copy=True)

    def export(self, path: Path) -> None:
        """A stock LoRA adapter with the head, at these ranks; see `export_stock_lora`."""
        pairs = {name: lora_pair(layer, ADAPTER) for name, layer in self.layers.items()}
        export_stock_lora(path, pairs, self.model, self.head)

    def _upper_step(self, step: Step) -> dict[str, Any]:
        """Algorithm 1, steps 2 to 7, with a stochastic hypergradient (Algorithm 2), or with `momentum` their average.

        Returns the history: Frank-Wolfe gap and step size, means over the simplices; the share of away and of drop
        steps; the components with weight; the hypergradient's norm; the norm of what truncation took from the weights
        at once; the rank of all layers together, `ranks` in the order of the layers, `s` of the components that are
        left in the same order; trials of the backtracking; relative residual of `implicit`.
        """
        method = self.method
        upper = self._hypergradient(step)
        gradient = self.gradient = self._averaged(upper.value)
        direction = frank_wolfe.choose_direction(self.weights, gradient, self._alive(), method.tau)
        taken, history = self._take(step, direction, upper)
        changed = ((taken.weights == 0) != (self.weights == 0)).any()
        # The one wait for the device in an upper-level step without trials or a solve.
        flags = [gradient.isfinite().all(), changed, (direction.gap <= method.p).all()]
        finite, changes, small, *emptied = torch.cat([torch.stack(flags), self._emptied(taken.weights)]).tolist()
        if not finite:
            raise Diverged(f"the hypergradient is not finite at update {step.index}")
        self.weights = taken.weights
        self._write_s(self.weights)
        self.unchanged = 0 if changes else self.unchanged + 1
        first = method.first_truncation
        truncates = first is not None and self.upper_steps >= first and any(emptied)
        history["jump"] = self._truncate(emptied) if truncates else 0.0
        self.upper_steps += 1
        history |= {
            "gap": direction.gap.mean(),
            "step_size": taken.step_size.mean(),
            "away": taken.away.float().mean(),
            "drop": taken.drop.float().mean(),
            "active_components": emptied.count(False),
            "hypergradient_norm": gradient.norm(),
        }
        if method.hypergradient == "implicit":
            history["residual"] = upper.residual
        self.identified = method.face_steps is not None and small and self.unchanged >= method.face_steps
        return history | self._sizes()

    def _hypergradient(self, step: Step) -> UpperGradient:
        """G(s) of the live components on one batch of the upper half. Leaves no gradients."""
        layers = [layer for layer in self.layers.values() if layer.r[ADAPTER] > 0]
        return upper_gradient(self.method, layers, step, self.data, self.optimizer)

    def _averaged(self, value: Tensor) -> Tensor:
        """The hypergradient over the simplices, averaged over the upper-level steps, with weights that fall by
        `momentum` a step; the first counts whole. (In the averaged Frank-Wolfe of Mokhtari et al., 2020, arXiv
        1804.09554, the new one's weight falls over time as well.)"""
        if self.method.momentum == 0 or self.upper_steps == 0:
            return self._spread(value)
        before = self.gradient.flatten()[self.live]
        return self._spread(torch.lerp(before, value, 1 - self.method.momentum))

    def _take(
        self, step: Step, direction: frank_wolfe.Direction, upper: UpperGradient
    ) -> tuple[frank_wolfe.StepTaken, dict[str, Any]]:
        """The step by the rule of the settings, and what it adds to the history."""
        method, weights = self.method, self.weights
        if method.step_rule != "backtracking":
            size = method.step_size
            if method.step_rule == "diminishing":
                size *= frank_wolfe.diminishing_step_size(self.upper_steps)
            return frank_wolfe.take_step(weights, direction, size, method.p), {}

        @torch.no_grad()
        def loss(weights: Tensor) -> Tensor:
            self._write_s(weights)
            return step.loss(upper.batch)

        first = 2 * frank_wolfe.curvature_for(weights, direction, method.tau, method.step_size)  # it is halved at once
        found = frank_wolfe.backtrack(
            weights,
            direction,
            method.tau,
            loss,
            start=float(upper.loss),
            curvature=self.curvature or first,
            most=min(method.trials, step.budget - step.used),
            rho=method.rho,
            tolerance=method.p,
        )
        self.curvature = found.curvature
        return found.taken, {"trials": found.trials, "curvature": found.curvature}

    def _spread(self, values: Tensor) -> Tensor:
        """Values of the live components, (sum of ranks,), over the simplices, (B, C), 0 for those removed."""
        whole = values.new_zeros(len(self.layers) * self.method.rank)
        return whole.index_copy(0, self.live, values).view(self.weights.shape[0], -1)

    def _alive(self) -> Tensor:
        """Which components are left, (B, C) bool."""
        return self._spread(torch.ones_like(self.live, dtype=torch.bool))

    def _emptied(self, weights: Tensor) -> Tensor:
        """Which of the live components have no weight, (sum of ranks,) bool."""
        return weights[:, 1:].flatten()[self.live] == 0

    def _sizes(self) -> dict[str, Any]:
        """Ranks and s for the history."""
        s = frank_wolfe.points(self.weights, self.method.tau, self.method.eps)
        return {"rank": len(self.live), "ranks": list(self.ranks().values()), "s": s.flatten()[self.live]}

    def _write_s(self, weights: Tensor) -> None:
        """Bring every layer's s in line with the weights."""
        s = frank_wolfe.points(weights, self.method.tau, self.method.eps).flatten()[self.live]
        for layer, values in zip(self.layers.values(), s.split(list(self.ranks().values())), strict=True):
            layer.debora_s[ADAPTER].copy_(values)

    @torch.no_grad()
    def _truncate(self, emptied: list[bool]) -> Tensor:
        """Remove the emptied components, one flag for each live one in order (Algorithm 1, step 7).

        Returns the norm of the change, a scalar: the Frobenius norm over all layers of the sum of eps u v^T removed.
        """
        flags = iter(emptied)
        columns, squares = {}, []
        for name, layer in self.layers.items():
            removed = [next(flags) for _ in range(layer.r[ADAPTER])]
            if any(removed):
                gram = torch.outer(*2 * [layer.debora_s[ADAPTER][removed]])
                for factor in layer.factors(ADAPTER):  # the norm of the sum without the sum
                    gram = gram * (factor[:, removed].T @ factor[:, removed])
                squares.append(gram.sum())
                columns[name] = torch.tensor(_positions(removed), dtype=torch.int64, device=self.live.device)
        self._keep(columns)
        self.live = self.live[_positions(emptied)]
        return torch.stack(squares).sum().clamp(min=0).sqrt()

    def _keep(self, columns: dict[str, Tensor]) -> None:
        """Cut layers and their optimizer state down to these components."""
        for name, kept in columns.items():
            for factor in self.layers[name].factors(ADAPTER):
                keep_optimizer_columns(self.optimizer, factor, kept)
        self.tuner.keep_columns(ADAPTER, columns)


def _positions(removed: Iterable[bool]) -> list[int]:
    """Where the flag is not set."""
    return [position for position, flag in enumerate(removed) if not flag]
