"""RaLoRA (ICLR 2026): a LoRA in blocks, as many as bring its rank to the effective rank of the gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from harness.method import RANK, RANKS, Adaptation, Backbone, Step, Trace, TrainData
from harness.optimizer import adamw
from methods.shared.gradient_start import (
    allocate,
    mean_gradients,
    resize,
    shared_weight,
    spending,
    weight_importance,
)
from methods.shared.lora_method import LoraMethod
from methods.shared.peft_model import lora_model, unfit_at_rank
from methods.shared.peft_names import ADAPTER
from methods.shared.prepared_lora import PreparedLora

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from harness.spec import TrainSpec


class RaLora(LoraMethod):
    """RaLoRA (ICLR 2026): a LoRA in blocks, as many as bring its rank to the effective rank of the gradient.

    The update is s blockdiag(B_1 A_1, ..., B_k A_k) with s = alpha / rank: k times the rank of a LoRA of as many
    parameters. With G the mean gradient of a frozen weight over `batches`, k is the largest power of 2 up to
    erank(G) / r that divides inputs and outputs, where erank is the exponential of the entropy of G's singular values
    over their sum. A layer's r is `rank`, or, with allocation=importance (RaLoRA-Pro), comes from GoRA's importance
    mean|W o G| first.
    """

    provenance = "from the authors' code; how blocks fit a layer's sides is ours"
    group = "ranks from data"
    capabilities = ("linear", "rank-adaptive")
    traces: ClassVar[tuple[Trace, ...]] = (
        RANK,
        RANKS,
        Trace("effective_rank", "effective rank of the gradient", drawing=None),
        Trace("blocks", "blocks of the update", drawing=None),
    )

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    batches: int = Field(32, ge=1, description="batches before the first update, for the mean gradient")
    rank: int = Field(8, ge=1, description="rank of a block", json_schema_extra={"peft": "r"})
    blocks_max: int | None = Field(None, ge=1, description="most blocks of a layer; 1: LoRA; no limit if unset")
    allocation: Literal["equal", "importance"] = Field(
        "equal", description="ranks of the blocks: the same in all layers, or by importance at the same budget"
    )
    rank_min: int = Field(1, ge=1, description="with allocation=importance: least rank of a layer's blocks")
    rank_max: int | None = Field(None, ge=1, description="with allocation=importance: largest one; no limit if unset")
    alpha: float = Field(
        16.0, gt=0, description="the update is scaled by alpha / rank", json_schema_extra={"peft": "lora_alpha"}
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the adapter's input", json_schema_extra={"peft": "lora_dropout"}
    )
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, description="ends of layer names; all if unset")

    @model_validator(mode="after")
    def _fits_together(self) -> RaLora:
        if self.allocation == "equal":
            for name, value in self.changed("rank_min", "rank_max").items():
                raise ValueError(f"{name} = {value} needs allocation = importance")
        if self.rank < self.rank_min:
            raise ValueError(f"rank = {self.rank} is below rank_min = {self.rank_min}")
        if self.rank_max is not None and self.rank > self.rank_max:
            raise ValueError(f"rank = {self.rank} is above rank_max = {self.rank_max}")
        return self

    def blocks(self, effective_rank: float, rank: int, shape: tuple[int, int]) -> int:
        """The number of blocks of rank `rank` of a layer, (outputs, inputs): the largest power of 2 that divides both
        sides and is at most effective_rank / rank and `blocks_max`; at least 1."""
        most = effective_rank / rank if self.blocks_max is None else min(effective_rank / rank, self.blocks_max)
        number = 1
        while 2 * number <= most and not any(side % (2 * number) for side in shape):
            number *= 2
        return number

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        reason = unfit_at_rank(backbone, self.target_modules, self.rank, linear_only="ralora")
        return reason or shared_weight(backbone, backbone.targets(self.target_modules))

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`: what the start costs, and the ranks that can come out."""
        targets = backbone.targets(self.target_modules)
        shapes = [backbone.shape(name) for name in targets]
        most = [self.blocks(min(shape), self.rank, shape) for shape in shapes]
        told = [
            spending(self.batches, backbone, targets, train, num_examples),
            f"up to {max(most)} blocks of rank {self.rank} a layer then come from it: "
            f"{self.rank * len(most)} to {self.rank * sum(most)} components in {len(most)} layers, at the "
            f"{self.rank * sum(map(sum, shapes)):,} parameters of LoRA",
        ]
        if self.allocation == "importance":
            told[1] += "; ranks by importance, and so blocks, differ from these"
        return told

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`: a LoRA of `rank`, until `prepare`."""
        targets = backbone.targets(self.target_modules)
        model = lora_model(backbone, dict.fromkeys(targets, self.rank), self.alpha / self.rank, self.dropout)
        optimizer = adamw(model, self.learning_rate, self.weight_decay)
        return RaLoraAdaptation(self, model, optimizer, backbone, targets, data)


class RaLoraAdaptation(PreparedLora):
    """One run: ranks and blocks by the gradient, then training. A layer's rank is that of its update, r times blocks,
    of a LoRA's r (m + n) parameters."""

    method: RaLora

    def prepare(self, step: Step) -> None:
        """See `Adaptation.prepare`. A_i is drawn as that of a LoRA from its own inputs, which are fewer: A as it was,
        times the root of the blocks."""
        gradients = mean_gradients(self, step, self.data, self.method.batches)
        shapes = {name: (len(gradient), gradient.shape[1]) for name, gradient in gradients.items()}
        ranks = self._block_ranks(gradients, shapes)
        effective, blocks = [], []
        for name, rank in ranks.items():
            effective.append(effective_rank(gradients.pop(name)))
            blocks.append(self.method.blocks(effective[-1], rank, shapes[name]))
            resize(self.layers[name], rank, step.rng, self.optimizer)
            self.layers[name].lora_A[ADAPTER].weight.data.mul_(math.sqrt(blocks[-1]))
        self.found = {"effective_rank": effective, "blocks": [float(number) for number in blocks]}
        self._use(dict(zip(ranks, blocks, strict=True)))

    def _block_ranks(self, gradients: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """The rank of each layer's blocks."""
        method = self.method
        if method.allocation == "equal":
            return dict.fromkeys(self.targets, method.rank)
        importance = {name: weight_importance(self.layers[name], gradients[name]) for name in self.targets}
        most = max(min(shape) for shape in shapes.values()) if method.rank_max is None else method.rank_max
        return allocate(importance, shapes, method.rank, (method.rank_min, most), "sum")

    def _use(self, blocks: Mapping[str, int]) -> None:
        from methods.shared.block_lora import use_in_blocks

        for name, number in blocks.items():
            use_in_blocks(self.layers[name], number)

    def _blocks(self) -> dict[str, int]:
        from methods.shared.block_lora import blocks_of

        return {name: blocks_of(layer) for name, layer in self.layers.items()}

    def build(self, ranks: Mapping[str, int]) -> None:
        """See `PreparedLora.build`. ranks: of the blocks."""
        import torch

        for name, rank in ranks.items():
            resize(self.layers[name], rank, torch.Generator(), self.optimizer)

    def ranks(self) -> dict[str, int]:
        """See `Adaptation.ranks`: of the updates, which are exact where no block has a lower rank."""
        blocks = self._blocks()
        return {name: rank * blocks[name] for name, rank in super().ranks().items()}

    def stored_bytes(self) -> int:
        """See `Adaptation.stored_bytes`: of an export, which holds the zeros outside the blocks too."""
        zeros = 0
        for name, number in self._blocks().items():
            own = self.layers[name].lora_A[ADAPTER].weight, self.layers[name].lora_B[ADAPTER].weight
            zeros += (number - 1) * sum(factor.numel() * factor.element_size() for factor in own)
        return super().stored_bytes() + zeros

    def at_rank(self, rank: int) -> AbstractContextManager[None]:
        """See `Adaptation.at_rank`: the best approximation of a layer's update, whose singular values are those of its
        blocks."""
        from methods.shared.block_lora import best_in_blocks
        from methods.shared.truncation import swapped

        values: dict[Tensor, Tensor] = {}
        for name, number in self._blocks().items():
            own = self.layers[name].lora_B[ADAPTER].weight, self.layers[name].lora_A[ADAPTER].weight
            values |= zip(own, best_in_blocks(own[0].detach(), own[1].detach(), number, rank), strict=True)
        return swapped(values)

    def state_dict(self) -> dict[str, Any]:
        """See `Adaptation.state_dict`."""
        blocks = self._blocks()
        ranks = {name: rank // blocks[name] for name, rank in self.ranks().items()}
        return super().state_dict() | {"ranks": ranks, "blocks": blocks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Adaptation.load_state_dict`."""
        self._use(state["blocks"])
        super().load_state_dict(state)

    def scaled_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """See `LoraAdaptation.scaled_pairs`: pairs whose plain product is the update."""
        from methods.shared.block_lora import whole_pair

        blocks = self._blocks()
        return {name: whole_pair(*pair, blocks[name]) for name, pair in super().scaled_pairs().items()}


def effective_rank(matrix: Tensor) -> float:
    """exp(-sum_i p_i ln p_i) with p_i = sigma_i / sum(sigma), from 1 to the smaller side (Roy and Vetterli, 2007); 1 of
    a matrix of 0."""
    import torch

    values = matrix if matrix.dtype == torch.float64 else matrix.float()
    sigma = torch.linalg.svdvals(values).double()
    p = sigma / sigma.sum()
    return max(1.0, math.exp(-float(torch.xlogy(p, p).sum()))) if sigma.any() else 1.0
