"""A tiny BERT with random weights, as a task hands it to a method."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from harness.method import Backbone

torch.set_num_threads(1)


def tiny_backbone(device: str = "cpu") -> Backbone:
    """Two blocks of six linear layers each; the same weights every time."""
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        num_labels=2,
    )
    torch.manual_seed(0)
    with torch.device(device):
        module = BertForSequenceClassification(config).eval()
    layers = [name for name, part in module.named_modules() if isinstance(part, nn.Linear) and "encoder" in name]
    return Backbone(module, head=("bert.pooler", "classifier"), layers=tuple(layers))


def token_ids() -> torch.Tensor:
    """Five sentences of seven tokens."""
    return torch.randint(0, 40, (5, 7), generator=torch.Generator().manual_seed(1))
