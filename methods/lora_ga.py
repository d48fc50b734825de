"""LoRA-GA (Wang et al., 2024, arXiv 2407.05000): a LoRA that starts from singular vectors of the gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from harness.errors import InputError
from harness.method import Adaptation, Backbone, PeftForm, Step, TrainData, as_matrix, is_transposed
from harness.optimizer import adamw
from methods.shared.gradient_start import mean_gradients, shared_weight, spending
from methods.shared.lora_adaptation import LoraAdaptation
from methods.shared.lora_method import LoraMethod
from methods.shared.peft_model import lora_form, lora_model, shared_parameters, unfit
from methods.shared.peft_names import ADAPTER

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from harness.spec import TrainSpec


class LoraGa(LoraMethod):
    """LoRA-GA (Wang et al., 2024): a LoRA that starts from singular vectors of the mean gradient before training.

    With G = U S V^T, (m, n), the mean gradient of a frozen weight W over `batches`, and s = alpha / rank, the official
    form is A = c V_{1..r}^T and B = c U_{r+1..2r} with c = m^(1/4) / sqrt(gamma): the first step of gradient descent
    then moves s B A, to first order, along the best approximation of G of rank 2 r. W loses s B A, so that the function
    stays. form=peft is PEFT's, where A is not scaled, and B is multiplied by its singular values as well.

    An export is a LoRA of twice the rank on the backbone as it was.
    """

    provenance = "from the authors' code; form=peft is PEFT's"
    group = "fixed rank"
    capabilities = ("linear", "conv2d")

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    batches: int = Field(8, ge=1, description="batches before the first update, for the mean gradient")
    rank: int = Field(
        8,
        ge=1,
        description="rank of every adapted layer, at most half its smaller side",
        json_schema_extra={"peft": "r"},
    )
    form: Literal["official", "peft"] = Field("official", description="of A and B: the authors', or PEFT's")
    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = Field(
        "ArB2r",
        description="which of the first 2 r singular vectors A and B get: the first and the second half, the "
        "other way round, every second one, or drawn from the run's seed",
    )
    scale: Literal["stable", "gd_scale", "unit", "weight_svd"] = Field(
        "stable", description="by c, by 1 / s, not at all, or as large as the weight's singular values"
    )
    gamma: float = Field(16.0, gt=0, description="of c, for scale = stable", json_schema_extra={"peft": "stable_gamma"})
    alpha: float = Field(
        16.0, gt=0, description="the update is scaled by alpha / rank", json_schema_extra={"peft": "lora_alpha"}
    )
    rslora: bool = Field(
        False, description="scale by alpha / sqrt(rank) instead", json_schema_extra={"peft": "use_rslora"}
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the adapter's input", json_schema_extra={"peft": "lora_dropout"}
    )
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, description="ends of layer names; all if unset")

    @property
    def scaling(self) -> float:
        """s: what B A is multiplied by, in every layer."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def peft_form(self, ranks: Mapping[str, int]) -> PeftForm | None:
        """See `Method.peft_form`: LoRA of the same rank and scale, from its own start."""
        return lora_form(ranks, self.scaling, shared_parameters(self, self.dropout))

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        if not backbone.layers:
            return backbone.without_layers()
        targets = backbone.targets(self.target_modules)
        for layer in targets:
            smaller = min(backbone.shape(layer))
            if 2 * self.rank > smaller:
                raise InputError(
                    f"rank = {self.rank} takes {2 * self.rank} singular vectors, and layer '{layer}' has {smaller}: "
                    f"allowed is 1 to {smaller // 2}",
                    "rank",
                )
        return unfit(backbone, list(targets)) or shared_weight(backbone, targets)

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`: what the start costs."""
        return [spending(self.batches, backbone, backbone.targets(self.target_modules), train, num_examples)]

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`: a LoRA, until `prepare`."""
        targets = backbone.targets(self.target_modules)
        model = lora_model(backbone, dict.fromkeys(targets, self.rank), self.scaling, self.dropout)
        optimizer = adamw(model, self.learning_rate, self.weight_decay)
        return LoraGaAdaptation(self, model, optimizer, backbone, targets, data)

    def factors(self, gradient: Tensor, weight: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """(B, A), (m, rank) and (rank, n), for a gradient and a weight of (m, n) with both sides at least 2 rank.

        In float32, or float64 where that is the gradient's. The decomposition is PEFT's and the authors': randomized,
        with 4 rank vectors and 4 iterations, so exact where the smaller side is at most 4 rank. It draws from torch's
        global generator, the direction "random" from `rng`.
        """
        U, S, V = _singular(gradient, 4 * self.rank)
        of_B, of_A = self._components(rng)
        B, A = U[:, of_B], V[:, of_A].T
        if self.form == "peft":
            B = B * S[of_B]
        factor_B, factor_A = self._factors(weight, S[of_B])
        return B * factor_B, A * factor_A

    def _components(self, rng: torch.Generator) -> tuple[list[int], list[int]]:
        """Which singular vectors B and A get. Drawn, PEFT's B and A get the same ones, the authors' get others."""
        import torch

        first, second = list(range(self.rank)), list(range(self.rank, 2 * self.rank))
        if self.direction == "ArB2r":
            return second, first
        if self.direction == "A2rBr":
            return first, second
        if self.direction == "ArBr":
            return list(range(0, 2 * self.rank, 2)), list(range(1, 2 * self.rank, 2))
        drawn: list[int] = torch.randperm(2 * self.rank, generator=rng).tolist()
        return drawn[: self.rank] if self.form == "peft" else drawn[self.rank :], drawn[: self.rank]

    def _factors(self, weight: Tensor, values: Tensor) -> tuple[float, float]:
        """What B and A are multiplied by. values: the gradient's singular values of B's vectors, (rank,)."""
        if self.scale == "unit":
            return 1.0, 1.0
        if self.scale == "gd_scale":
            return 1 / self.scaling, 1 / self.scaling
        if self.scale == "stable":
            c = len(weight) ** 0.25 / math.sqrt(self.gamma)
            return c, c if self.form == "official" else 1.0
        if self.form == "official":
            of_weight = _singular(weight, 4 * self.rank)[1][: self.rank]
            root = float((of_weight / self.scaling).sqrt().mean())
            return root, root
        largest = float(_singular(weight, self.rank)[1][0])
        return largest / float(values[0]) if values[0] > 0 else 1.0, 1.0


class LoraGaAdaptation(LoraAdaptation):
    """One run: the start by the gradient, then LoRA. Until `prepare` what was taken out of the weights is 0."""

    def __init__(
        self,
        method: LoraGa,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        backbone: Backbone,
        targets: tuple[str, ...],
        data: TrainData,
    ) -> None:
        super().__init__(model, optimizer, backbone, targets, changes_backbone=True)
        self.method = method
        self.data = data

    def prepare(self, step: Step) -> None:
        """See `Adaptation.prepare`."""
        gradients = mean_gradients(self, step, self.data, self.method.batches)
        for name in self.targets:
            self._start_from(name, gradients.pop(name), step.rng)

    def _start_from(self, name: str, gradient: Tensor, rng: torch.Generator) -> None:
        """Set a layer's A and B, and take their product out of its weight."""
        layer = self.layers[name]
        base = layer.get_base_layer()
        weight = base.weight.data
        values = self.method.factors(gradient, as_matrix(base, weight), rng)
        own = layer.lora_B[ADAPTER].weight.data, layer.lora_A[ADAPTER].weight.data
        for factor, value in zip(own, values, strict=True):
            factor.copy_(value.reshape(factor.shape))
        B, A = self.taken[name]
        B.copy_(layer.scaling[ADAPTER] * own[0])
        A.copy_(own[1])
        update = B.flatten(1) @ A.flatten(1)
        weight -= update.T if is_transposed(base) else update.reshape(weight.shape)


def _singular(matrix: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, q), S (q,) and V (n, q) of the `number` largest singular values, or of all."""
    import torch

    values = matrix if matrix.dtype == torch.float64 else matrix.float()
    found: tuple[Tensor, Tensor, Tensor] = torch.svd_lowrank(values, q=min(number, *matrix.shape), niter=4)
    return found
