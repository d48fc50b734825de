"""BiLoRA (Qiang et al., 2024, arXiv 2403.13037): pseudo singular vectors and values learnt on different rows."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from harness.errors import InputError
from harness.method import RANK, Adaptation, Backbone, Step, Trace, TrainData
from harness.optimizer import adamw
from methods.shared.bilevel_lora import UPPER_LOSS, VALUES, BilevelLora, BilevelLoraAdaptation, with_values
from methods.shared.cut_lora import along
from methods.shared.peft_model import lora_model

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from harness.spec import TrainSpec

SPREAD = 0.02  # of P and Q at the start "values": AdaLoRA's


class BiLora(BilevelLora):
    """BiLoRA (Qiang et al., 2024): P diag(L) Q, P and Q learnt on a part of the rows, L on the others.

    The lower level descends the loss on its rows plus `orthogonality` times R1(P, Q), the upper level that on the rows
    held out, in the pseudo singular values L: softmax(a), which sums to 1 in every layer, a itself ("real"), or
    sigmoid(a), pushed towards 0 and 1 by `binary_weight` times R2(L) ("binary"). All of the budget is spent so; nothing
    is trained anew. The update is scaled by alpha / rank.

    With `components` the largest of all layers stay after `cut_at` of the budget, by |L_i| |p_i| |q_i| (ours).
    levels: "joint" trains everything at once on all rows instead, the control for what the two levels are worth.
    """

    provenance = (
        "reimplementation: the source leaves open the hypergradient, inner steps, learning rates, start, scale, R1's "
        "weight and R2"
    )
    traces: ClassVar[tuple[Trace, ...]] = (
        RANK,
        UPPER_LOSS,
        Trace("largest", "largest pseudo singular value", drawing="heat_map"),
    )

    held_out: float = Field(0.2, gt=0, lt=1, description="share of the rows that is the upper level's")
    upper_learning_rate: float = Field(1e-2, ge=0, description="learning rate of the upper level, constant")
    values: Literal["softmax", "real", "binary"] = Field("softmax", description="what L is of a: softmax, a, sigmoid")
    start_from: Literal["factors", "values"] = Field(
        "factors", description='what is 0 at first: P, or, of "real", L, with P and Q random'
    )
    orthogonality: float = Field(0.1, ge=0, description="weight of R1, the mean of |P^T P - I|^2 and |Q Q^T - I|^2")
    binary_weight: float = Field(0.1, ge=0, description='"binary": weight of R2, the mean of L (1 - L)')
    cut_at: float = Field(0.5, gt=0, lt=1, description='"components": share of the budget before the cut')
    levels: Literal["bilevel", "joint"] = Field("bilevel", description="two levels, or everything at once on all rows")

    @model_validator(mode="after")
    def _fits_together(self) -> BiLora:
        if self.start_from == "values" and self.values != "real":
            raise ValueError(f"start_from = values is for values = real: of {self.values} no value can be 0 at first")
        if self.levels == "joint":
            self._only("levels = bilevel", "held_out", "upper_every", "unrolled_step")
        if self.values != "binary":
            self._only("values = binary", "binary_weight")
        if self.components is None:
            self._only("components", "cut_at")
        return self

    def _only(self, with_what: str, *names: str) -> None:
        for name, value in self.changed(*names).items():
            raise ValueError(f"{name} = {value:g} needs {with_what}")

    def first_value(self) -> float:
        """See `BilevelLora.first_value`: with all P 0, L is 1 of "real", 1 / rank of softmax and 1 / 2 of "binary"."""
        return 1.0 if self.values == "real" and self.start_from == "factors" else 0.0

    def component_weights(self, values: Tensor) -> Tensor:
        """See `BilevelLora.component_weights`: L."""
        if self.values == "softmax":
            return values.softmax(0)
        return values.sigmoid() if self.values == "binary" else values

    @property
    def batches_a_round(self) -> int:
        """See `BilevelLora.batches_a_round`."""
        return 1 if self.levels == "joint" else super().batches_a_round

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`."""
        budget, layers = train.budget(num_examples), len(backbone.targets(self.target_modules))
        found = []
        if self.levels == "bilevel":
            if self.batches_a_round > budget:
                raise InputError(
                    f"upper_every = {self.upper_every} does not fit into {budget} batches: it takes at least "
                    f"{self.batches_a_round}",
                    "upper_every",
                )
            found.append(self.told(budget, train, num_examples))
        if self.components is not None:
            end = self.end_of("cut_at", budget)
            found.append(f"{self.components} of {self.rank * layers} components stay after batch {end}")
        return found

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        targets = backbone.targets(self.target_modules)
        model = lora_model(backbone, dict.fromkeys(targets, self.rank), self.alpha / self.rank, self.dropout)
        with_values(model, self.first_value())
        ratios = {f".{VALUES}": self.upper_learning_rate / self.learning_rate}
        optimizer = adamw(model, self.learning_rate, self.weight_decay, ratios)
        return BiLoraAdaptation(self, model, optimizer, backbone, targets, data)


class BiLoraAdaptation(BilevelLoraAdaptation):
    """One run. B is P, and A is Q.

    was_cut: the components are those that stay.
    """

    method: BiLora

    def __init__(
        self,
        method: BiLora,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        backbone: Backbone,
        targets: tuple[str, ...],
        data: TrainData,
    ) -> None:
        super().__init__(method, model, optimizer, backbone, targets, data)
        self.was_cut = method.components is None
        if method.levels == "joint":
            self.stream = "all"
        if method.start_from == "values":
            for pair in self.pairs():
                for factor in pair:
                    factor.data.normal_(0.0, SPREAD)

    def penalty(self) -> Tensor | None:
        """See `Adaptation.penalty`: R1, and R2 where one level has it all."""
        import torch

        parts = [self.upper_penalty()] if self.method.levels == "joint" else []
        if self.method.orthogonality:
            factors = [f for B, A in self.pairs() if len(A) for f in (B.flatten(1).T, A.flatten(1))]
            squares = [(f @ f.T - torch.eye(len(f), dtype=f.dtype, device=f.device)).square().sum() for f in factors]
            parts.append(self.method.orthogonality * torch.stack(squares).mean())
        present = [part for part in parts if part is not None]
        return torch.stack(present).sum() if present else None

    def upper_penalty(self) -> Tensor | None:
        """See `BilevelLoraAdaptation.upper_penalty`: R2."""
        import torch

        if self.method.values != "binary" or not self.method.binary_weight:
            return None
        L = torch.cat(self.component_weights())
        return self.method.binary_weight * (L * (1 - L)).mean()

    def before_step(self, step: Step) -> None:
        """See `BilevelLoraAdaptation.before_step`."""
        if self.method.levels == "bilevel":
            super().before_step(step)

    def after_step(self, step: Step) -> dict[str, Any]:
        """See `Adaptation.after_step`. The history of a step of the upper level has its loss and each layer's largest
        |L|, that of the update that cuts the `rank` of all layers."""
        import torch

        history: dict[str, Any] = {}
        if self.method.levels == "bilevel" and self.is_due(step, step.budget):
            history = self.upper_step(step)
            largest = [L.detach().abs().max() if len(L) else L.new_zeros(()) for L in self.component_weights()]
            history["largest"] = torch.stack(largest)
        if not self.was_cut and step.used >= self.method.end_of("cut_at", step.budget):
            self._cut()
            history["rank"] = self.method.components
        return history

    def at_rank(self, rank: int) -> AbstractContextManager[None]:
        """See `Adaptation.at_rank`: the largest components, by |L_i| |p_i| |q_i|."""
        from methods.shared.truncation import largest, swapped

        values: dict[Tensor, Tensor] = {}
        for (B, A), sizes in zip(self.pairs(), self._sizes(), strict=True):
            kept = (largest(sizes, rank) > 0).to(B.dtype)
            values |= {B: B.detach() * along(kept, B, 1), A: A.detach() * along(kept, A, 0)}
        return swapped(values)

    def state_dict(self) -> dict[str, Any]:
        """See `Adaptation.state_dict`."""
        return super().state_dict() | {"was_cut": self.was_cut}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Adaptation.load_state_dict`."""
        super().load_state_dict(state)
        self.was_cut = state["was_cut"]

    def _sizes(self) -> list[Tensor]:
        """|L_i| |p_i| |q_i| of every layer, (rank,)."""
        return [
            (L.abs() * B.flatten(1).norm(dim=0) * A.flatten(1).norm(dim=1)).detach()
            for L, (B, A) in zip(self.component_weights(), self.pairs(), strict=True)
        ]

    def _cut(self) -> None:
        """Keep the largest components. A softmax over fewer of them gives each more; P makes up for it, so that the
        function loses what is removed and nothing else."""
        import torch

        from methods.shared.optimizer_state import change_basis, keep

        sizes = self._sizes()
        order = torch.cat(sizes).argsort(descending=True, stable=True)[: self.method.components].cpu().tolist()
        rank = self.method.rank
        places = [sorted(place % rank for place in order if place // rank == layer) for layer in range(len(sizes))]
        before = [L.detach()[own] for L, own in zip(self.component_weights(), places, strict=True)]
        self.keep(places)
        holder = self.optimizer if self.method.levels == "joint" else self.upper
        for values, own in zip(self.values(), places, strict=True):
            keep(values, torch.tensor(own, dtype=torch.int64, device=values.device), 0, holder)
        if self.method.values == "softmax":
            for (B, _), was, now in zip(self.pairs(), before, self.component_weights(), strict=True):
                ratio = was / now.detach()
                change_basis(B, B.detach() * along(ratio, B, 1), (1 / ratio).diag(), 1, self.optimizer)
        self.was_cut = True
