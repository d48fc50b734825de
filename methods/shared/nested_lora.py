"""Nested LoRA: one adapter whose first b components are an adapter of their own, at every rank b.

What such methods share: ranks that are trained, a scale for each rank, weights of the components that a training batch
alone sees, and the cut to a rank, which is a prefix and not a singular value decomposition.
"""

from __future__ import annotations

import contextlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, model_validator

from harness.method import Backbone, PeftForm
from harness.optimizer import adamw
from methods.shared.cut_lora import weighted
from methods.shared.lora_adaptation import LoraAdaptation
from methods.shared.lora_method import LoraMethod
from methods.shared.peft_model import lora_form, lora_model, shared_parameters, unfit_at_rank
from methods.shared.peft_names import ADAPTER

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor, nn


class NestedLora(LoraMethod, ABC):
    """What the methods share: at a rank b from 1 to `rank` the update is scale(b) B[:, :b] A[:b, :].

    The components above the last train rank would never move, so that has to be `rank`.
    """

    group: ClassVar[str] = "any rank"
    capabilities = ("linear", "conv2d")

    rank: int = Field(
        8,
        ge=1,
        description="rank of every adapted layer, at most its smaller side",
        json_schema_extra={"peft": "r"},
    )
    train_ranks: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, min_length=1, description="ranks that are trained, ascending, `rank` the last; see above if unset"
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the adapter's input", json_schema_extra={"peft": "lora_dropout"}
    )
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, description="ends of layer names; all if unset")

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if self.train_ranks is None:
            return self
        given, last = f"train_ranks = {list(self.train_ranks)}", self.train_ranks[-1]
        if any(later <= earlier for earlier, later in itertools.pairwise(self.train_ranks)):
            raise ValueError(f"{given} is not ascending")
        if last > self.rank:
            raise ValueError(f"{given} goes above rank = {self.rank}")
        if last < self.rank:
            raise ValueError(f"{given} ends below rank = {self.rank}: components above {last} would never train")
        return self

    @property
    @abstractmethod
    def nested_ranks(self) -> tuple[int, ...]:
        """The ranks that are trained, ascending, from `train_ranks` or by the method's own rule."""

    @abstractmethod
    def scale(self, rank: int) -> float:
        """What B A is multiplied by at this rank."""

    def peft_form(self, ranks: Mapping[str, int]) -> PeftForm | None:
        """See `Method.peft_form`: LoRA with the scale at the full rank."""
        return lora_form(ranks, self.scale(self.rank), shared_parameters(self, self.dropout))

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        return unfit_at_rank(backbone, self.target_modules, self.rank)

    def adapted(self, backbone: Backbone) -> nn.Module:
        """The backbone with PEFT's LoRA of the full rank, at its scale."""
        ranks = dict.fromkeys(backbone.targets(self.target_modules), self.rank)
        return lora_model(backbone, ranks, self.scale(self.rank), self.dropout)


class NestedLoraAdaptation(LoraAdaptation):
    """One run. Between the batches the model is the adapter at the full rank, as it is evaluated and exported."""

    def __init__(self, method: NestedLora, backbone: Backbone) -> None:
        model = method.adapted(backbone)
        super().__init__(model, adamw(model, method.learning_rate, method.weight_decay), backbone)
        self.method = method

    def weights(self, values: Any) -> Tensor:
        """Numbers as a tensor of the adapter's dtype, on its device."""
        import torch

        like = next(iter(self.layers.values())).lora_A[ADAPTER].weight
        return torch.tensor(values, dtype=like.dtype, device=like.device)

    @contextlib.contextmanager
    def weighted(self, weights: Tensor) -> Iterator[None]:
        """Within it every layer's update is scale(rank) B diag(weights) A. weights: (rank,)."""

        def multiply(factor: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return weighted(factor, output, weights)

        with contextlib.ExitStack() as hooks:
            for layer in self.layers.values():
                hooks.enter_context(layer.lora_A[ADAPTER].register_forward_hook(multiply))
            yield

    @contextlib.contextmanager
    def at_rank(self, rank: int) -> Iterator[None]:
        """See `Adaptation.at_rank`: the first `rank` components, with the scale of that rank. Within it the model is
        the LoRA of that rank, and so is what `export` writes."""
        config = self.model.peft_config[ADAPTER]  # type: ignore[index]
        full = self.method.rank
        pairs = [(layer.lora_B[ADAPTER].weight, layer.lora_A[ADAPTER].weight) for layer in self.layers.values()]
        own = [(B.data, A.data) for B, A in pairs]
        try:
            self._scale_as(config, min(rank, full))
            for B, A in pairs:
                B.data, A.data = B.data[:, :rank].contiguous(), A.data[:rank]
            yield
        finally:
            self._scale_as(config, full)
            for (B, A), (whole_B, whole_A) in zip(pairs, own, strict=True):
                B.data, A.data = whole_B, whole_A

    def _scale_as(self, config: Any, rank: int) -> None:
        """Give the layers, and the configuration that an export has, the scale of a rank."""
        alpha = self.method.scale(rank) * rank
        config.r, config.lora_alpha = rank, alpha
        for layer in self.layers.values():  # the scale as PEFT rounds it: at the full rank the very one of the start
            layer.r[ADAPTER], layer.lora_alpha[ADAPTER], layer.scaling[ADAPTER] = rank, alpha, alpha / rank
