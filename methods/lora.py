"""LoRA (Hu et al., 2022, arXiv 2106.09685), as PEFT implements it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from harness.method import Adaptation, Backbone, Method, TrainData, adamw

if TYPE_CHECKING:
    import torch

    from harness.spec import TrainSpec

PREFIX = "base_model.model."  # what PEFT puts before the backbone's own names


class Lora(Method):
    """LoRA (Hu et al., 2022): W + (alpha / rank) B A with one rank for every adapted layer; PEFT's."""

    capabilities = ("linear", "conv2d")

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    rank: int = Field(8, ge=1, description="rank of every adapted layer, at most its smaller side")
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, description="ends of layer names; all if unset")

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        if not backbone.layers:
            return "the backbone has no linear or convolution layer to adapt"
        backbone.check_rank(self.rank, backbone.targets(self.target_modules))
        return None

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(backbone.targets(self.target_modules)),
            modules_to_save=list(backbone.head),
        )
        model: Any = get_peft_model(backbone.module, config)
        return LoraAdaptation(model, adamw(model, self.learning_rate, self.weight_decay), backbone)


class LoraAdaptation(Adaptation):
    """A PEFT LoRA model in training."""

    def ranks(self) -> dict[str, int]:
        """See `Adaptation.ranks`."""
        return {
            name.removeprefix(PREFIX).removesuffix(".lora_A"): module["default"].weight.shape[0]
            for name, module in self.model.named_modules()
            if name.endswith(".lora_A")
        }

    def export(self, path: Path) -> None:
        """The adapter and the head as `PeftModel.from_pretrained` reads them."""
        model: Any = self.model
        model.save_pretrained(str(path))
