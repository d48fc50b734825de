"""Made-up token sequences and a tiny transformer: what the contract tests run on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from harness.method import Backbone
from harness.task import Batch, Classification, Examples

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

VOCABULARY, LENGTH = 48, 8


class Synthetic(Classification):
    """Made-up token sequences on a tiny BERT from a configuration: for contract tests, nothing to download."""

    capabilities = ("text",)

    num_rows: int = Field(160, ge=8, description="training rows; a quarter as many are evaluated")
    width: int = Field(16, ge=4, multiple_of=4, description="hidden size of the BERT")
    num_blocks: int = Field(2, ge=1, description="transformer blocks, six linear layers each")

    def load(self, data_root: str | None) -> tuple[Examples, dict[str, Examples]]:
        """The class says whether most tokens are from the vocabulary's upper half."""
        import numpy as np

        generator = np.random.default_rng(0)
        tokens = generator.integers(1, VOCABULARY, size=(self.num_rows + self.num_rows // 4, LENGTH))
        labels = (tokens >= VOCABULARY // 2).mean(axis=1) > 0.5
        rows = Examples({"tokens": tokens}, labels.astype(np.int64))
        last = np.arange(self.num_rows, len(rows))
        return rows.select(np.arange(self.num_rows)), {"validation": rows.select(last)}

    def backbone(self, model: str | None, *, meta: bool = False, trust_remote_code: bool = False) -> Backbone:
        """A BERT with random weights that differ from one seed to the next."""
        import torch
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.width,
            num_hidden_layers=self.num_blocks,
            num_attention_heads=2,
            intermediate_size=2 * self.width,
            max_position_embeddings=LENGTH,
            num_labels=2,
        )
        with torch.device("meta" if meta else "cpu"):
            module: nn.Module = BertForSequenceClassification(config)
        layers = [name for name, part in module.named_modules() if name.startswith("bert.encoder") and _is_linear(part)]
        return Backbone(module, head=("bert.pooler", "classifier"), layers=tuple(layers))

    def collate(self, encoded: Any, rows: Sequence[int], generator: torch.Generator | None) -> Batch:
        """Token ids of shape (rows, 8)."""
        import torch

        tokens: np.ndarray = encoded.columns["tokens"][list(rows)]
        return Batch({"input_ids": torch.from_numpy(tokens)}, torch.from_numpy(encoded.labels[list(rows)]))


def _is_linear(module: nn.Module) -> bool:
    from torch import nn

    return isinstance(module, nn.Linear)
