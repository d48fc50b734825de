"""IncreLoRA (Zhang et al., 2023, arXiv 2308.12043): triples are added where the update matters most."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from pydantic import Field

from harness.method import Adaptation, Backbone, Step, TrainData
from harness.optimizer import adamw
from methods.shared.cored_lora import GrowingLoraAdaptation, cored_model
from methods.shared.gradient_start import shared_weight
from methods.shared.growing_lora import GrowingLora, most_ranks
from methods.shared.peft_names import ADAPTER
from methods.shared.shares import SHARE

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from harness.spec import TrainSpec

RESERVED = 1e-5  # lambda of a triple in reserve


class IncreLora(GrowingLora):
    """IncreLoRA (Zhang et al., 2023): updates B diag(lambda) A, which gain triples where they matter most.

    Every layer starts with `init_rank` triples (a column of B, an entry of lambda, a row of A). Every deltaT updates
    after tinit the `top_h` layers of the highest score gain `increment` triples each, until all layers together have
    `components`, or `target_rank` times their number. A layer's score is I U: s = sum|dW o G| / sqrt(m n) of the update
    dW (m, n) and its gradient G, I the moving average of s (beta1), and U that of |s - I| (beta2).

    Advance learning: beside its own triples each layer has those that it would gain next, with a lambda of 1e-5 that
    does not move. Their a and b train already. At the target those that were not needed are removed.

    The update is scaled by alpha / the layer's own rank, which shrinks it at each growth; `scale=fixed` does not.
    """

    provenance = "from the authors' code; that the last round is cut to the target is ours"

    tinit: float = Field(0.01, ge=0, description=f"before the first interval: {SHARE}")
    deltaT: float = Field(0.01, gt=0, description=f"interval between two rounds, at least one update: {SHARE}")  # noqa: N815
    top_h: int = Field(2, ge=1, description="layers that gain triples in a round")
    advance: bool = Field(True, description="advance learning: a and b of the next triples train before they are used")
    beta1: float = Field(0.85, gt=0, lt=1, description="smoothing of the sensitivity")
    beta2: float = Field(0.85, gt=0, lt=1, description="smoothing of the uncertainty")

    def layers_to_grow(self, missing: int, progress: float) -> int:
        """See `GrowingLora.layers_to_grow`."""
        return self.top_h

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        return super().unsupported(backbone) or shared_weight(backbone, backbone.targets(self.target_modules))

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        targets = backbone.targets(self.target_modules)
        most, first, layers = most_ranks(backbone, targets), self.init_rank, len(targets)
        reserve = self.each(layers) if self.advance and self.total(layers) > first * layers else 0
        ranks = {name: min(first + reserve, most[name]) for name in targets}
        cores = {name: [0.0] * first + [RESERVED] * (rank - first) for name, rank in ranks.items()}
        base = {name: backbone.module.get_submodule(name) for name in targets}
        model = cored_model(self, backbone, ranks, cores, rng)
        optimizer = adamw(model, self.learning_rate, self.weight_decay)
        return IncreLoraAdaptation(self, model, optimizer, backbone, targets, most, base, train.micro_batches > 1)


class IncreLoraAdaptation(GrowingLoraAdaptation):
    """One run. The triples beyond a layer's rank are its reserve.

    base: the frozen layers. in_pieces: batches come in micro batches, whose gradients are summed up first.
    sensitivity, uncertainty: I and U of each layer, (layers,).
    """

    method: IncreLora

    def __init__(
        self,
        method: IncreLora,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        backbone: Backbone,
        targets: tuple[str, ...],
        most: Mapping[str, int],
        base: Mapping[str, nn.Module],
        in_pieces: bool,
    ) -> None:
        import torch

        super().__init__(method, model, optimizer, backbone, targets, most)
        self.base = base
        self.in_pieces = in_pieces
        self.found: dict[str, Tensor] = {}  # of the batch: s of each layer, or the sum of its gradients
        like = self.parts(targets[0])[1]
        self.sensitivity, self.uncertainty = torch.zeros(2, len(targets)).to(like)

    def core(self, name: str) -> Tensor:
        """See `GrowingLoraAdaptation.core`: diag(lambda)."""
        return self.parts(name)[2].diag()

    def unit_entries(self, name: str) -> Tensor:
        """See `GrowingLoraAdaptation.unit_entries`."""
        return self.parts(name)[2].detach().new_ones(len(self.parts(name)[2]))

    def for_batch(self, step: Step) -> AbstractContextManager[None] | None:
        """See `Adaptation.for_batch`: while layers grow, with an eye on the gradients of their weights."""
        from harness.passes import taking_weight_gradients

        self.found = {}
        return taking_weight_gradients(self.base, self._take) if self.missing() > 0 else None

    def before_step(self, step: Step) -> None:
        """See `Adaptation.before_step`: I and U move, and the lambda of the reserve does not."""
        import torch

        super().before_step(step)
        for name in self.targets:
            entries = self.parts(name)[2]
            if entries.grad is not None:
                entries.grad[self.live[name] :] = 0
        if self.missing() <= 0:
            return
        if self.in_pieces:
            self.found = {name: self._sensitivity(name, gradient) for name, gradient in self.found.items()}
        zero = self.sensitivity.new_zeros(())
        values = torch.stack([self.found.get(name, zero) for name in self.targets])
        self.sensitivity.lerp_(values, 1 - self.method.beta1)
        self.uncertainty.lerp_((values - self.sensitivity).abs(), 1 - self.method.beta2)
        self.found = {}

    def scores(self) -> Tensor:
        """See `GrowingLoraAdaptation.scores`."""
        return self.sensitivity * self.uncertainty

    def grow(self, name: str, gain: int, last: bool, step: Step) -> None:
        """See `GrowingLoraAdaptation.grow`: the reserve is used first, and filled up again."""
        entries, before = self.parts(name)[2], self.live[name]
        rank = before + gain
        reserve = self.method.each(len(self.targets)) if self.method.advance and not last else 0
        new = min(rank + reserve, self.most[name]) - len(entries)
        if new > 0:
            values = entries.detach().new_full((new,), RESERVED if self.method.advance else 0.0)
            self.extend(name, new, values, step)
        self.young.released(entries, before, rank, step.index + 1)

    def after_step(self, step: Step) -> dict[str, Any]:
        """See `GrowingLoraAdaptation.after_step`. At the target the reserve goes."""
        row = super().after_step(step)
        if row and self.missing() <= 0:
            self._drop_reserve(step)
        return row

    def finish(self, step: Step) -> None:
        """See `Adaptation.finish`: of a run that was too short for its target the reserve goes as well."""
        self._drop_reserve(step)

    def state_dict(self) -> dict[str, Any]:
        """See `Adaptation.state_dict`."""
        return super().state_dict() | {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Adaptation.load_state_dict`."""
        super().load_state_dict(state)
        self.sensitivity.copy_(state["sensitivity"])
        self.uncertainty.copy_(state["uncertainty"])

    def _take(self, name: str, gradient: Tensor) -> None:
        """What a backward pass gives of a layer's weight."""
        if not self.in_pieces:
            self.found[name] = self._sensitivity(name, gradient)
        elif name in self.found:
            self.found[name] += gradient
        else:
            self.found[name] = gradient

    def _sensitivity(self, name: str, gradient: Tensor) -> Tensor:
        """sum|dW o G| / sqrt(m n), without a dimension. gradient: (m, n)."""
        B, A, entries = (part.detach() for part in self.parts(name))
        update = self.layers[name].scaling[ADAPTER] * (B.flatten(1) * entries) @ A.flatten(1)
        return (update * gradient).abs().sum() / math.sqrt(update.numel())

    def _drop_reserve(self, step: Step) -> None:
        import torch

        from methods.shared.optimizer_state import keep

        for name in self.targets:
            B, A, entries = self.parts(name)
            if len(entries) > self.live[name]:
                own = torch.arange(self.live[name], device=A.device)
                for part, dim in ((B, 1), (A, 0), (entries, 0)):
                    keep(part, own, dim, self.optimizer)
                    self.young.resized(part, step.index + 1)
