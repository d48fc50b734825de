"""One run of dEBORA (Algorithms 1 and 2): the bilevel recipe around the tuner and the pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from harness.errors import Diverged
from harness.method import Adaptation, Backbone, Step, TrainData, adamw
from methods.debora import frank_wolfe
from methods.debora.config import DeboraConfig
from methods.debora.hypergradient import closed_form, direct
from methods.debora.model import DeboraModel
from methods.debora.stock_lora import write_stock_lora

if TYPE_CHECKING:
    from methods.debora.layer import DeboraLinear
    from methods.debora.method import Debora

ADAPTER = "default"  # PEFT's name for a model's first adapter


def adapt(method: Debora, backbone: Backbone, data: TrainData) -> DeboraAdaptation:
    """Put the adapter into the backbone and start its optimizer. On the meta device: shapes only."""
    targets = backbone.targets(method.target_modules)
    config = DeboraConfig(
        r=method.rank,
        tau=method.tau,
        eps=method.eps,
        target_modules="|".join(re.escape(name) for name in targets),
        modules_to_save=list(backbone.head) or None,
    )
    model: nn.Module = get_peft_model(backbone.module, config)
    return DeboraAdaptation(method, model, backbone, targets, data)


class DeboraAdaptation(Adaptation):
    """The lower level trains U, V and the head; every T_max updates the upper level moves s.

    weights: vertex weights of the simplices, (B, C + 1): B layers of C = rank components, or one simplex of all.
    live:    positions of the components that are left, in layers x rank, flattened: (sum of ranks,) int64, ascending.
    """

    def __init__(
        self, method: Debora, model: nn.Module, backbone: Backbone, targets: tuple[str, ...], data: TrainData
    ) -> None:
        self.method = method
        self.data = data
        tuner: Any = model.base_model
        self.tuner: DeboraModel = tuner
        self.layers: dict[str, DeboraLinear] = {name: tuner.model.get_submodule(name) for name in targets}
        self.upper_steps = 0
        device = self.layers[targets[0]].debora_s[ADAPTER].device
        num_components = len(targets) * method.rank
        shape = (len(targets), method.rank) if method.budget_scope == "layer" else (1, num_components)
        self.live = torch.arange(num_components, device=device)
        interior = method.start_at == "interior"
        self.weights = torch.full((shape[0], shape[1] + 1), 1 / shape[1] if interior else 0.0, device=device)
        self.weights[:, 0] = 0.0 if interior else 1.0
        self._write_s()
        super().__init__(model, adamw(model, method.learning_rate, method.weight_decay), backbone)
        self.stream = "lower"

    def after_step(self, step: Step) -> dict[str, Any]:
        """See `Adaptation.after_step`. The history of an upper-level step: the Frank-Wolfe gap and the step size
        (means over the simplices), the share of away and of drop steps, the components with weight, the rank of all
        layers together, the hypergradient's norm, and the norm of what truncation took from the weights at once."""
        history: dict[str, Any] = {}
        if self.stream != "lower":
            return history
        if (step.index + 1) % self.method.T_max == 0 and step.used < step.budget:
            history = self._upper_step(step)
        if step.used >= self.method.search_fraction * step.budget or len(self.live) == 0:
            self.stream = "all"
        return history

    def ranks(self) -> dict[str, int]:
        """See `Adaptation.ranks`."""
        return {name: layer.r[ADAPTER] for name, layer in self.layers.items()}

    def adapter_numbers(self) -> int:
        """U, V and s of every layer: rank x (outputs + inputs + 1)."""
        return sum(U.numel() + V.numel() + s.numel() for U, s, V in map(_numbers, self.layers.values()))

    def state_dict(self) -> dict[str, Any]:
        """See `Adaptation.state_dict`."""
        return super().state_dict() | {
            "weights": self.weights,
            "live": self.live,
            "upper_steps": self.upper_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Adaptation.load_state_dict`. The layers are cut down to the saved ranks first."""
        device = self.live.device
        self.live = state["live"].to(device)
        ranks = torch.bincount(self.live // self.method.rank, minlength=len(self.layers)).tolist()
        self._keep({name: torch.arange(rank, device=device) for name, rank in zip(self.layers, ranks, strict=True)})
        super().load_state_dict(state)
        self.weights = state["weights"].to(device, copy=True)
        self.upper_steps = state["upper_steps"]

    def export(self, path: Path) -> None:
        """A stock LoRA adapter with the head, at these ranks; see `write_stock_lora`."""
        pairs = {
            name: ((U * s).detach(), V.T.detach())
            for name, (U, s, V) in ((name, _numbers(layer)) for name, layer in self.layers.items())
        }
        head = {name: self.tuner.model.get_submodule(f"{name}.modules_to_save.{ADAPTER}") for name in self.head}
        write_stock_lora(path, pairs, head, self.tuner.peft_config[ADAPTER].base_model_name_or_path)

    def _upper_step(self, step: Step) -> dict[str, Any]:
        """Algorithm 1, steps 2 to 7, with a stochastic hypergradient (Algorithm 2)."""
        gradient = self._hypergradient(step)
        direction = frank_wolfe.choose_direction(self.weights, gradient, self._alive(), self.method.tau)
        taken = frank_wolfe.take_step(self.weights, direction, self._step_size(), self.method.p)
        empty = taken.weights[:, 1:].flatten()[self.live] == 0
        # The one wait for the device in an upper-level step.
        finite, *emptied = torch.cat([gradient.isfinite().all().view(1), empty]).tolist()
        if not finite:
            raise Diverged(f"the hypergradient is not finite at update {step.index}")
        self.weights = taken.weights
        self._write_s()
        truncates = self.upper_steps >= self.method.n0 and any(emptied)
        jump = self._truncate(emptied) if truncates else 0.0
        self.upper_steps += 1
        return {
            "gap": direction.gap.mean(),
            "step_size": taken.step_size.mean(),
            "away": taken.away.float().mean(),
            "drop": taken.drop.float().mean(),
            "active_components": emptied.count(False),
            "rank": len(self.live),
            "hypergradient_norm": gradient.norm(),
            "jump": jump,
        }

    def _hypergradient(self, step: Step) -> Tensor:
        """G(s) on one batch of the upper half, (B, C), 0 for components that were removed. Leaves no gradients."""
        layers = [_numbers(layer) for layer in self.layers.values()]
        self.optimizer.zero_grad(set_to_none=True)
        for _, s, _ in layers:
            s.requires_grad_(True)
        step.backward(self.data.draw("upper"))
        parts = []
        for U, s, V in layers:
            grad_s, grad_U, grad_V = (_gradient(tensor) for tensor in (s, U, V))
            s.requires_grad_(False)
            s.grad = None
            if self.method.hypergradient == "direct":
                parts.append(direct(grad_s))
            else:
                parts.append(closed_form(grad_s, (U.detach(), V.detach()), (grad_U, grad_V), s))
        self.optimizer.zero_grad(set_to_none=True)
        whole = self.weights.new_zeros(len(self.layers) * self.method.rank)
        return whole.index_copy(0, self.live, torch.cat(parts)).view(self.weights.shape[0], -1)

    def _alive(self) -> Tensor:
        """Which components are left, (B, C) bool."""
        alive = torch.zeros_like(self.weights[:, 1:], dtype=torch.bool)
        return alive.flatten().index_fill(0, self.live, True).view_as(alive)

    def _step_size(self) -> float:
        if self.method.step_rule == "fixed":
            return self.method.step_size
        return self.method.step_size * frank_wolfe.diminishing_step_size(self.upper_steps)

    def _write_s(self) -> None:
        """Bring every layer's s in line with the weights."""
        s = frank_wolfe.points(self.weights, self.method.tau, self.method.eps).flatten()[self.live]
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
                U, s, V = (tensor[..., removed] for tensor in _numbers(layer))
                squares.append((((U * s).T @ (U * s)) * (V.T @ V)).sum())  # |U diag(s) V^T|^2 without the product
                columns[name] = torch.tensor(_positions(removed), dtype=torch.int64, device=self.live.device)
        self._keep(columns)
        self.live = self.live[_positions(emptied)]
        return torch.stack(squares).sum().clamp(min=0).sqrt()

    def _keep(self, columns: dict[str, Tensor]) -> None:
        """Cut layers and their optimizer state down to these components."""
        for name, kept in columns.items():
            U, _, V = _numbers(self.layers[name])
            for parameter in (U, V):
                keep_optimizer_columns(self.optimizer, parameter, kept)
        self.tuner.keep_columns(ADAPTER, columns)


def keep_optimizer_columns(optimizer: torch.optim.Optimizer, parameter: Tensor, columns: Tensor) -> None:
    """Cut a parameter's moments, (n, r) like itself, down to these columns; call it before the parameter is cut."""
    if parameter not in optimizer.state:
        return
    state = optimizer.state[parameter]
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            state[key] = value.index_select(1, columns)


def _numbers(layer: DeboraLinear) -> tuple[Tensor, Tensor, Tensor]:
    """(U, s, V) of a layer."""
    return layer.debora_U[ADAPTER], layer.debora_s[ADAPTER], layer.debora_V[ADAPTER]


def _gradient(tensor: Tensor) -> Tensor:
    """The gradient, zeros for a tensor that the loss does not depend on."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _positions(removed: Iterable[bool]) -> list[int]:
    """Where the flag is not set."""
    return [position for position, flag in enumerate(removed) if not flag]
