"""What the tests of token-routed methods share: a tiny BERT with padded texts, and a step of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from harness import registry
from harness.method import Backbone
from tests.support.small_lora import FakeStep

LAYERS = ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.0.output.dense")
TEXTS = {
    "input_ids": torch.randint(5, 40, (3, 7), generator=torch.Generator().manual_seed(2)),
    "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 3 + [0] * 4]),
}
STEP: Any = FakeStep(used=1)


def tiny_bert(width: int = 16, **changes: Any) -> nn.Module:
    """One layer, random weights, always the same ones."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=width,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=24,
        **{"num_labels": 3, **changes},
    )
    return transformers.BertForSequenceClassification(config).eval()


def on_bert(name: str, **settings: Any) -> Any:
    """A run of a method on two layers of the tiny BERT, whose B and head are random, as if trained."""
    backbone = Backbone(tiny_bert(), ("bert.pooler", "classifier"), LAYERS)
    method = registry.make_method(name, {"rank": 6} | settings)
    adaptation = method.start(backbone, None, None, torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in adaptation.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    return adaptation


def logits(model: nn.Module) -> Tensor:
    """Of the padded texts, in evaluation mode."""
    with torch.no_grad():
        return model.eval()(**TEXTS).logits  # type: ignore[no-any-return]


def inputs_of(adaptation: Any, name: str) -> Tensor:
    """What a layer is given of the texts, (texts, tokens, features)."""
    seen: list[Tensor] = []
    with adaptation.layers[name].register_forward_pre_hook(lambda layer, args: seen.append(args[0])):
        logits(adaptation.model)
    return seen[0]


def changed_byte(file: Path) -> None:
    """Change one byte in the middle of a file."""
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1
    file.write_bytes(whole)
