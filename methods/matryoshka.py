"""MatryoshkaLoRA: one LoRA for many ranks, all of them trained at once by a fixed diagonal between B and A."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from harness.method import Adaptation, Backbone, Step, TrainData
from methods.shared.nested_lora import NestedLora, NestedLoraAdaptation
from methods.shared.peft_names import ADAPTER

if TYPE_CHECKING:
    import torch

    from harness.spec import TrainSpec


class Matryoshka(NestedLora):
    """MatryoshkaLoRA (Modoranu et al., 2026): one LoRA whose first b components are an adapter, for every rank b.

    Trained is W + B diag(p) A, p_i the sum of s_q over the train ranks q >= i: the sum over q of s_q B[:, :q] A[:q, :].
    The train ranks are the powers of 2 below `rank`, and `rank`, unless `train_ranks` says others. With combine = mean
    p is divided by their number.

    Evaluated and exported at rank b is W + s_b B[:, :b] A[:b, :], by default with b = `rank`: not the trained map, not
    even at the full rank, unless `rank` is the only train rank.
    """

    provenance: ClassVar[str] = "from the authors' code"

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    scaling: Literal["none", "rank", "sqrt"] = Field(
        "sqrt", description="the update at rank b is scaled by s_b: 1, 1 / b or 1 / sqrt(b)"
    )
    combine: Literal["sum", "mean"] = Field(
        "sum", description="trained is the sum of the updates at the train ranks, or their mean"
    )

    @property
    def nested_ranks(self) -> tuple[int, ...]:
        """See `NestedLora.nested_ranks`."""
        powers = tuple(2**i for i in range(self.rank.bit_length()) if 2**i < self.rank)
        return self.train_ranks or (*powers, self.rank)

    def scale(self, rank: int) -> float:
        """s_b of the rank b."""
        return {"none": 1.0, "rank": 1 / rank, "sqrt": 1 / math.sqrt(rank)}[self.scaling]

    @property
    def diagonal(self) -> list[float]:
        """p: what each component is multiplied by in training, never increasing. Algorithm 1 in the authors' code."""
        ranks = self.nested_ranks
        share = 1 if self.combine == "sum" else 1 / len(ranks)
        return [share * sum(self.scale(q) for q in ranks if q > i) for i in range(self.rank)]

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`."""
        ranks, p = ", ".join(map(str, self.nested_ranks)), self.diagonal
        return [
            f"trains ranks {ranks} at once: component 1 has weight {p[0]:.3g}, component {self.rank} {p[-1]:.3g}; "
            f"evaluated at rank {self.rank}, where all have weight {self.scale(self.rank):.3g}"
        ]

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        return MatryoshkaAdaptation(self, backbone)


class MatryoshkaAdaptation(NestedLoraAdaptation):
    """One run. A is uniform within 1 / sqrt(rank), where PEFT's LoRA draws it within 1 / sqrt(inputs).

    p: the diagonal as a multiple of the scale at the full rank, which the model has anyway, (rank,).
    """

    def __init__(self, method: Matryoshka, backbone: Backbone) -> None:
        super().__init__(method, backbone)
        self.p = self.weights([value / method.scale(method.rank) for value in method.diagonal])
        for layer in self.layers.values():
            A = layer.lora_A[ADAPTER].weight.data
            A *= math.sqrt(A[0].numel() / method.rank)

    def for_batch(self, step: Step) -> AbstractContextManager[None]:
        """See `Adaptation.for_batch`: the diagonal."""
        return self.weighted(self.p)
