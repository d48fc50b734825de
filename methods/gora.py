"""GoRA (He et al., 2025, arXiv 2502.12171): ranks and B of a LoRA from the mean gradient before training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from harness.method import RANK, RANKS, Adaptation, Backbone, PeftForm, Step, Trace, TrainData
from harness.optimizer import EQUAL, adamw
from methods.shared.gradient_start import (
    allocate,
    mean_gradients,
    resize,
    shared_weight,
    spending,
    weight_importance,
)
from methods.shared.lora_method import LoraMethod
from methods.shared.peft_model import lora_form, lora_model, shared_parameters, unfit_at_rank
from methods.shared.peft_names import ADAPTER
from methods.shared.prepared_lora import PreparedLora

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from harness.spec import TrainSpec


class Gora(LoraMethod):
    """GoRA (He et al., 2025): a LoRA whose ranks and whose B come from the mean gradient before training.

    G is the mean gradient of a frozen weight W, (m, n), over `batches`. A layer's share a of the budget is that of its
    importance mean|W o G|. With f = sqrt(m + n), or m + n, its rank is floor(round(rank sum(f) a) / f), from rank_min
    to rank_max and at most its smaller side. The update is (alpha / sqrt(r)) B A, with A uniform as in LoRA and
    B = -(gamma sqrt(n) / alpha) G A^T (A A^T)^-1: a step of descent of about gamma |G|, along G as far as A sees it.

    The model starts with that step made. B learns at `learning_rate_ratio` times the rate of A (LoRA+).
    """

    provenance = "from the authors' code; sign and cost of a rank are the paper's"
    group = "ranks from data"
    capabilities = ("linear", "conv2d", "rank-adaptive")
    traces: ClassVar[tuple[Trace, ...]] = (RANK, RANKS, Trace("importance", "share of the importance", drawing=None))
    identity_at_start: ClassVar[bool] = False  # it is the backbone until `prepare`, and then a step away from it

    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate, of A and the head")
    learning_rate_ratio: float = Field(16.0, gt=0, description="B's learning rate over that of A")
    batches: int = Field(32, ge=1, description="batches before the first update, for the mean gradient")
    rank: int = Field(
        8, ge=1, description="rank whose size in all layers is the budget", json_schema_extra={"peft": "r"}
    )
    rank_min: int | None = Field(None, ge=1, description="least rank of a layer; half of rank if unset")
    rank_max: int | None = Field(None, ge=1, description="largest rank of a layer; four times rank if unset")
    cost: Literal["root", "sum"] = Field(
        "root", description="what a rank of a layer costs of the budget: sqrt(m + n), or its parameters m + n"
    )
    gamma: float = Field(0.05, ge=0, description="length of the step that B is, relative to the gradient's; 0: LoRA")
    alpha: float = Field(
        16.0, gt=0, description="the update is scaled by alpha / sqrt(r)", json_schema_extra={"peft": "lora_alpha"}
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the adapter's input", json_schema_extra={"peft": "lora_dropout"}
    )
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, description="ends of layer names; all if unset")

    @model_validator(mode="after")
    def _fits_together(self) -> Gora:
        least, most = self.limits
        if least > most:
            raise ValueError(f"rank_min = {least} is above rank_max = {most}")
        if self.rank < least:
            raise ValueError(f"rank = {self.rank} is below rank_min = {least}")
        if self.rank > most:
            raise ValueError(f"rank = {self.rank} is above rank_max = {most}")
        return self

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the largest rank of a layer: unset, the paper's 4 and 32 for a rank of 8, in proportion."""
        least = max(1, self.rank // 2) if self.rank_min is None else self.rank_min
        return least, 4 * self.rank if self.rank_max is None else self.rank_max

    def allocate(self, importance: Mapping[str, float], shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """The rank of each layer, by their importance, at least 0, and shapes (outputs, inputs).

        Where nothing has an importance, as without a gradient, all layers have the rank of the budget.
        """
        return allocate(importance, shapes, self.rank, self.limits, self.cost)

    def peft_form(self, ranks: Mapping[str, int]) -> PeftForm | None:
        """See `Method.peft_form`: LoRA with these ranks, from its own start, and with the scale of `rank` in every
        layer, since a LoRA here has one."""
        return lora_form(ranks, self.alpha / math.sqrt(self.rank), shared_parameters(self, self.dropout))

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        reason = unfit_at_rank(backbone, self.target_modules, self.rank)
        return reason or shared_weight(backbone, backbone.targets(self.target_modules))

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`: what the start costs, and the ranks that can come out."""
        targets = backbone.targets(self.target_modules)
        least, most = self.limits

        def parameters(rank: int) -> int:
            return sum(min(rank, *shape) * sum(shape) for shape in map(backbone.shape, targets))

        return [
            spending(self.batches, backbone, targets, train, num_examples),
            f"ranks from {least} to {min(most, max(min(backbone.shape(name)) for name in targets))} then come from it: "
            f"about the {parameters(self.rank):,} parameters of rank {self.rank} everywhere, "
            f"{parameters(least):,} to {parameters(most):,}",
        ]

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`: a LoRA of `rank`, until `prepare`."""
        targets = backbone.targets(self.target_modules)
        model = lora_model(backbone, dict.fromkeys(targets, self.rank), self.alpha / math.sqrt(self.rank), self.dropout)
        ratios = EQUAL if self.learning_rate_ratio == 1 else {".lora_B.": self.learning_rate_ratio}
        optimizer = adamw(model, self.learning_rate, self.weight_decay, ratios)
        return GoraAdaptation(self, model, optimizer, backbone, targets, data)


class GoraAdaptation(PreparedLora):
    """One run: the ranks and B by the gradient, then LoRA."""

    method: Gora

    def prepare(self, step: Step) -> None:
        """See `Adaptation.prepare`."""
        gradients = mean_gradients(self, step, self.data, self.method.batches)
        shapes = {name: (len(gradient), gradient.shape[1]) for name, gradient in gradients.items()}
        importance = {name: weight_importance(self.layers[name], gradients[name]) for name in self.targets}
        total = sum(importance.values())
        self.found = {"importance": [value / total if total else 0.0 for value in importance.values()]}
        for name, rank in self.method.allocate(importance, shapes).items():
            resize(self.layers[name], rank, step.rng, self.optimizer)
            self._descend(name, gradients.pop(name))
        self._scale()

    def build(self, ranks: Mapping[str, int]) -> None:
        """See `PreparedLora.build`."""
        import torch

        for name, rank in ranks.items():
            resize(self.layers[name], rank, torch.Generator(), self.optimizer)
        self._scale()

    def _pair(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """(B, A) of a layer."""
        layer = self.layers[name]
        return layer.lora_B[ADAPTER].weight, layer.lora_A[ADAPTER].weight

    def _descend(self, name: str, gradient: Tensor) -> None:
        """Set B so that the update is a step against the gradient, as far as A sees it."""
        B, A = self._pair(name)
        length = self.method.gamma * math.sqrt(gradient.shape[1]) / self.method.alpha
        B.data.copy_((-length * compressed(gradient, A.detach().flatten(1))).reshape(B.shape))

    def _scale(self) -> None:
        """alpha / sqrt(r) in every layer."""
        for name, rank in self.ranks().items():
            self.layers[name].scaling[ADAPTER] = self.method.alpha / math.sqrt(rank)


def compressed(gradient: Tensor, A: Tensor) -> Tensor:
    """G A^T (A A^T)^-1, (m, r): the B for which B A comes nearest to G, (m, n), where A is (r, n) with r <= n.

    With A^T = Q R it is G Q R^-T, which squares no condition number. In float32 at least, solved in float64.
    """
    import torch

    Q, R = torch.linalg.qr(A.T.double())
    values = gradient if gradient.dtype == torch.float64 else gradient.float()
    seen = (values @ Q.to(values.dtype)).double()
    return torch.linalg.solve_triangular(R.T, seen, upper=False, left=False)
