"""One run of dEBORA (Algorithms 1 and 2): the adapted layers, their optimizer and the search, wired together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from harness.errors import Diverged
from harness.method import Adaptation, Backbone, Step, TrainData
from methods.debora.optimizer import ManifoldAdamW
from methods.debora.penalty import FactorPenalty
from methods.debora.schedule import Schedule
from methods.debora.search import Objective, Search
from methods.debora.tuner.config import DeboraConfig
from methods.debora.tuner.layer import DeboraLayer
from methods.debora.tuner.model import DeboraModel
from methods.debora.tuner.stock_lora import lora_pair
from methods.debora.upper_level import FreeGradient, HypergradientRule, upper_gradient
from methods.shared.canonical import component_sizes
from methods.shared.peft_names import ADAPTER
from methods.shared.stock_lora import export_stock_lora
from methods.shared.truncation import best_approximation, largest, swapped

if TYPE_CHECKING:
    from methods.debora.parameters import DeboraParameters


def adapted(backbone: Backbone, targets: Sequence[str], **config: Any) -> tuple[nn.Module, dict[str, DeboraLayer]]:
    """The backbone with an adapter in each of the layers `targets`, and those layers by their names.

    config: further fields of `DeboraConfig`. On the meta device: shapes only.
    """
    model: Any = get_peft_model(
        backbone.module,
        DeboraConfig(
            target_modules="|".join(re.escape(name) for name in targets),
            modules_to_save=list(backbone.head) or None,
            **config,
        ),
    )
    return model, {name: model.base_model.model.get_submodule(name) for name in targets}


class DeboraAdaptation(Adaptation):
    """The lower level trains the factors and the head; every T_max updates the upper level, the search, moves s.

    layers: the adapted layers by their names in the backbone, in the search's order.
    """

    optimizer: ManifoldAdamW

    def __init__(
        self,
        method: DeboraParameters,
        model: nn.Module,
        layers: Mapping[str, DeboraLayer],
        optimizer: ManifoldAdamW,
        backbone: Backbone,
        data: TrainData,
        search: Search,
        schedule: Schedule,
        hypergradient: HypergradientRule,
    ) -> None:
        tuner: Any = model.base_model
        self.method = method
        self.tuner: DeboraModel = tuner
        self.layers = layers
        self.data = data
        self.search = search
        self.schedule = schedule
        self.hypergradient = hypergradient
        self.free = FreeGradient() if hypergradient.kind == "free" else None
        factors = [factor for layer in layers.values() for factor in layer.factors(ADAPTER)]
        units = [unit for layer in layers.values() for unit in layer.units()]
        strength = method.factor_penalty
        if strength is None and any(len(layer.factors(ADAPTER)) > 2 for layer in layers.values()):
            strength = 0.0  # 0 is a stable point of a kernel's component under any penalty; see `FactorPenalty`
        self.penalty_on_factors = FactorPenalty(factors, units, strength, method.penalty_share)
        self.was_cut = False  # for the target's sake
        self._write_s(search.s)
        super().__init__(model, optimizer, backbone)
        self.stream = "lower" if self.free is None else "all"

    def before_step(self, step: Step) -> None:
        """See `Adaptation.before_step`: `free` takes the loss's plain gradients, clipping sees Riemannian ones of the
        lower level's whole objective."""
        searching = not self.search.frozen and any(self.search.ranks)
        if self.free is not None and searching:
            self.free.add(self._live_layers())
        self.optimizer.project_gradients()
        if searching:
            self.penalty_on_factors.add()

    def after_step(self, step: Step) -> dict[str, Any]:
        """See `Adaptation.after_step`.

        The history of an upper-level step is that of `Search.step` and `Search.sizes`, with `jump`, the norm of the
        update that was removed, `factor_penalty`, and of `implicit` the relative `residual`. At the end of the search,
        `jump` and the sizes are those after the last truncation, and `cut` is the number of components that had weight
        and were removed for the target's sake.
        """
        history: dict[str, Any] = {}
        search = self.search
        if search.frozen:
            return history
        warm_up = self.schedule.first_updates(step.budget)
        if step.index + 1 == max(1, warm_up):
            history["factor_penalty"] = self._begin(rotates=warm_up > 0 and self.method.cut_by == "size")
        if any(search.ranks) and self.schedule.is_due(step.index + 1, step.used, step.budget):
            history |= self._upper_step(step)
        ends = search.identified or search.reached or not any(search.ranks)
        if ends or self.schedule.is_over(step.used, step.budget):
            history |= self._end(history.get("jump", 0.0))
        return history

    @torch.no_grad()
    def cut(self, dropped: Sequence[Sequence[bool]], s: Tensor | None = None) -> Tensor | float:
        """Remove the components that the search has dropped, a flag for each by layer, from the layers and from the
        optimizer's state (Algorithm 1, step 7). s: (sum of ranks,) before; eps, as of those without weight, if it is
        not given.

        Returns the norm of the update removed: the Frobenius norm over all layers of the sum of s u v^T.
        """
        columns, squares = {}, []
        own = [None] * len(self.layers) if s is None else s.split([len(flags) for flags in dropped])
        for (name, layer), flags, values in zip(self.layers.items(), dropped, own, strict=True):
            if not any(flags):
                continue
            if values is None:
                values = layer.debora_s[ADAPTER].new_full((len(flags),), self.search.rules.eps)
            gram = torch.outer(values[flags], values[flags])
            for factor in layer.factors(ADAPTER):  # the norm of the sum without the sum
                gram = gram * (factor[:, flags].T @ factor[:, flags])
            squares.append(gram.sum())
            left = [position for position, flag in enumerate(flags) if not flag]
            columns[name] = torch.tensor(left, dtype=torch.int64, device=values.device)
        self.tuner.keep_columns(ADAPTER, columns, self.optimizer)
        return torch.stack(squares).sum().clamp(min=0).sqrt() if squares else 0.0

    def ranks(self) -> dict[str, int]:
        """See `Adaptation.ranks`."""
        return {name: layer.r[ADAPTER] for name, layer in self.layers.items()}

    def remarks(self) -> list[str]:
        """See `Adaptation.remarks`."""
        search = self.search
        if self.was_cut:
            by = "their singular values" if self.method.cut_by == "size" else "s"
            return [f"the search's steps left more than the target; the rest was cut by {by}"]
        if search.frozen and search.target is not None and not search.interior and sum(search.costs) < search.target:
            return ["the search ended below the target: from a vertex a step gives weight to one component at most"]
        return []

    def at_rank(self, rank: int) -> AbstractContextManager[None]:
        """See `Adaptation.at_rank`: of two factors the best approximation, of a CP form the largest components."""
        values: dict[Tensor, Tensor] = {}
        for layer in self.layers.values():
            factors, s = layer.factors(ADAPTER), layer.debora_s[ADAPTER]
            if len(factors) == 2:
                B, A = best_approximation(factors[0] * s, factors[1].T, rank)
                values |= {factors[0]: B / s, factors[1]: A.T}
            else:
                kept = largest(component_sizes(factors, s), rank) > 0
                values |= {tensor: tensor * kept for tensor in (*factors, s)}
        return swapped(values)

    def adapter_parameters(self) -> int:
        """Factors and s of every layer, rank x (sizes of the weight's modes + 1); without s once it is in the factors,
        where it is one number for all."""
        folded = self.search.frozen and self.method.fold
        return sum(
            (0 if folded else layer.r[ADAPTER]) + sum(factor.numel() for factor in layer.factors(ADAPTER))
            for layer in self.layers.values()
        )

    def state_dict(self) -> dict[str, Any]:
        """See `Adaptation.state_dict`."""
        return super().state_dict() | {
            "search": self.search.state_dict(),
            "free": None if self.free is None else self.free.state_dict(),
            "penalty": self.penalty_on_factors.state_dict(),
            "was_cut": self.was_cut,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Adaptation.load_state_dict`. The layers are cut down to the saved ranks first."""
        self.search.load_state_dict(state["search"])
        ranks = zip(self.layers.items(), self.search.ranks, strict=True)
        columns = {
            name: torch.arange(rank, device=self.search.live.device)
            for (name, layer), rank in ranks
            if rank < layer.r[ADAPTER]
        }
        self.tuner.keep_columns(ADAPTER, columns, self.optimizer)
        if self.search.frozen and self.method.fold:
            for layer in self.layers.values():
                layer.release(ADAPTER)
        super().load_state_dict(state)
        self.penalty_on_factors.load_state_dict(state["penalty"])
        self.was_cut = state["was_cut"]
        if self.free is not None:
            self.free.load_state_dict(state["free"], self.search.live.device)

    def export(self, path: Path) -> None:
        """A stock LoRA adapter with the head, at these ranks; see `export_stock_lora`."""
        pairs = {name: lora_pair(layer, ADAPTER) for name, layer in self.layers.items()}
        export_stock_lora(path, pairs, self.model, self.head)

    def _begin(self, rotates: bool) -> float:
        """At the end of the warm-up: lambda, which is returned, and a basis in which components mean something, for
        every hypergradient from now on."""
        strength = self.penalty_on_factors.settle()  # before the columns are balanced: the gradients were of these
        if rotates:
            self._rotate()
            if self.free is not None:
                self.free.reset()
        return strength

    def _upper_step(self, step: Step) -> dict[str, Any]:
        """A step of the search with a stochastic hypergradient (Algorithm 2), and what it does to the layers."""
        residual, objective = 0.0, None
        if self.free is not None:
            value = self.free.take(self.search.s)
        else:
            upper = upper_gradient(self.hypergradient, self._live_layers(), step, self.data, self.optimizer)
            value, residual = upper.value, upper.residual

            @torch.no_grad()
            def loss(s: Tensor) -> Tensor:
                self._write_s(s)
                return step.loss(upper.batch)

            objective = Objective(upper.loss, loss, step.budget - step.used)
        try:
            moved = self.search.step(value, objective, self.schedule.progress(step.used, step.budget))
        except FloatingPointError as error:
            raise Diverged(f"{error} at update {step.index}") from error
        history = {"jump": self.cut(moved.dropped)} | moved.history
        self._write_s(self.search.s)
        if self.hypergradient.kind == "implicit":
            history["residual"] = residual
        return history | self.search.sizes()

    def _end(self, jump: Tensor | float) -> dict[str, Any]:
        """End the search: nothing without weight is left, nor more than the target, and s goes into the factors."""
        search = self.search
        self.stream = "all"
        dropped = search.freeze()
        removes = any(map(any, dropped))
        history: dict[str, Any] = {"jump": jump + self.cut(dropped)} if removes else {}
        if search.over_target:
            if self.method.cut_by == "size":
                self._rotate()
                layers = self.layers.values()
                scores = torch.cat([component_sizes(own.factors(ADAPTER), own.debora_s[ADAPTER]) for own in layers])
            else:
                scores = search.s
            before = search.s
            dropped = search.cut_to_target(scores)
            history["cut"] = sum(map(sum, dropped))
            self.was_cut = True
            history["jump"] = history.get("jump", jump) + self.cut(dropped, before)
            removes = True
        if removes:
            history |= search.sizes()
        if self.method.fold:
            self._let_go()
        return history

    def _rotate(self) -> None:
        """Bring every layer to its canonical basis, and the search with it."""
        rules = self.search.rules
        s = [layer.to_canonical_basis(ADAPTER, self.optimizer, rules.eps) for layer in self.layers.values()]
        self.search.set_s(torch.cat(s))

    def _let_go(self) -> None:
        """Fold s into the factors, which are free from now on, at the scale that s had in the interior at the start."""
        num_layers = len(self.layers)
        scale = self.method.simplex_tau(num_layers) / self.method.simplex_components(num_layers)
        for layer in self.layers.values():
            layer.fold(ADAPTER, scale, self.optimizer)
        self.optimizer.release(self.method.weight_decay)

    def _live_layers(self) -> list[DeboraLayer]:
        """The layers that have a component."""
        return [layer for layer in self.layers.values() if layer.r[ADAPTER] > 0]

    def _write_s(self, s: Tensor) -> None:
        """Give the layers the s of their components, (sum of ranks,)."""
        for layer, values in zip(self.layers.values(), s.split(list(self.ranks().values())), strict=True):
            layer.debora_s[ADAPTER].copy_(values)
