"""Classification and regression of texts and text pairs with an encoder of transformers and a new head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from harness.errors import InputError
from harness.task import Batch, Classification, Examples, fingerprint_of
from tasks import pretrained
from tasks.cache import cached

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from harness.method import Backbone

TOKENIZED_AT_ONCE = 4096  # rows handed to the tokenizer together: bounds the memory of a large split


@dataclass(frozen=True)
class EncodedTexts:
    """The token ids of one split, end to end.

    tokens: per model input ("input_ids", "token_type_ids") one int32 array of all rows' values in turn.
    starts: (rows + 1) positions in those arrays: row i is starts[i] to starts[i + 1].
    cut: (rows,) whether the row was longer and lost tokens.
    """

    tokens: dict[str, np.ndarray]
    padding: dict[str, int]
    starts: np.ndarray
    cut: np.ndarray
    labels: np.ndarray


class TextClassification(Classification):
    """Abstract base of tasks on one text or a pair of texts: the columns of their Examples, in that order.

    Any encoder that transformers can build for sequence classification serves (BERT, RoBERTa, DeBERTa, ELECTRA,
    MPNet, DistilBERT). One label means regression: mean squared error, predictions are values.
    """

    max_length: int = Field(128, ge=4, description="tokens kept of an example, special tokens included")

    @property
    @abstractmethod
    def num_labels(self) -> int:
        """Number of classes; 1 for regression."""

    def model_fingerprint(self, model: str | None, *, trust_remote_code: bool = False) -> str:
        return pretrained.fingerprint(self.model_name(model), trust_remote_code=trust_remote_code)

    def backbone(self, model: str | None, *, meta: bool = False, trust_remote_code: bool = False) -> Backbone:
        """As `Task.backbone`. Raises InputError where `max_length` is above the positions that the model has."""
        name = self.model_name(model)
        backbone = pretrained.load_backbone(
            name,
            "AutoModelForSequenceClassification",
            self.num_labels,
            meta=meta,
            trust_remote_code=trust_remote_code,
        )
        positions = num_positions(backbone.module)
        if positions is not None and self.max_length > positions:
            raise InputError(
                f"max_length = {self.max_length} is above the {positions} positions of model '{name}'", "max_length"
            )
        return backbone

    def encode(self, examples: Examples, model: str | None) -> EncodedTexts:
        """Token ids of every row, cut to `max_length`; kept on disk, so that all runs share them."""
        name = self.model_name(model)
        found = cached(
            "texts",
            (pretrained.fingerprint(name), self.max_length, fingerprint_of(texts=examples)),
            ("transformers", "tokenizers"),
            lambda: tokenized(examples, name, self.max_length),
        )
        inputs = [key.partition("/")[2] for key in found if key.startswith("tokens/")]
        tokens = {name: found[f"tokens/{name}"] for name in inputs}
        padding = {name: int(found[f"padding/{name}"][0]) for name in inputs}
        return EncodedTexts(tokens, padding, found["starts"], found["cut"], examples.labels)

    def references(self, examples: Examples) -> dict[str, int] | tuple[float, float] | None:
        """As `Task.references`: rows by class, or the lowest and the highest value."""
        if self.num_labels > 1:
            return super().references(examples)
        return float(examples.labels.min()), float(examples.labels.max())

    def lengths(self, encoded: EncodedTexts) -> np.ndarray:
        """(rows,) number of tokens."""
        import numpy as np

        return np.diff(encoded.starts)

    def facts(self, encoded: EncodedTexts) -> dict[str, Any]:
        """The share of rows that were cut to `max_length`."""
        return {"truncated_share": round(float(encoded.cut.mean()), 6)}

    def collate(self, encoded: EncodedTexts, rows: Sequence[int], generator: torch.Generator | None) -> Batch:
        """Inputs (rows, longest row), padded on the right; labels int64 classes or float32 targets."""
        import numpy as np
        import torch

        chosen = np.asarray(rows)
        starts = encoded.starts[chosen]
        lengths = encoded.starts[chosen + 1] - starts
        places = np.arange(lengths.max())
        filled = places < lengths[:, None]
        positions = np.where(filled, starts[:, None] + places, 0)
        inputs = {
            name: torch.from_numpy(np.where(filled, values[positions], encoded.padding[name]).astype(np.int64))
            for name, values in encoded.tokens.items()
        }
        inputs["attention_mask"] = torch.from_numpy(filled.astype(np.int64))
        labels = torch.from_numpy(encoded.labels[chosen])
        return Batch(inputs, labels.float() if self.num_labels == 1 else labels)

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator | None) -> Tensor:
        """Mean cross-entropy, or mean squared error for regression."""
        if self.num_labels > 1:
            return super().loss(model, batch, generator)
        from torch.nn.functional import mse_loss

        return mse_loss(self.predict(model, batch), batch.labels)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows,) most probable classes, or values for regression."""
        if self.num_labels > 1:
            return super().predict(model, batch)
        return model(**batch.inputs).logits.float().squeeze(-1)


def tokenized(examples: Examples, model: str, max_length: int) -> dict[str, np.ndarray]:
    """The arrays of `EncodedTexts` but for the labels: "tokens/<input>", "padding/<input>", "starts" and "cut".

    A pair that is too long loses tokens of its longer text first.
    """
    import numpy as np

    tokenizer = pretrained.load_tokenizer(model)
    texts = list(examples.columns.values())
    parts: dict[str, list[np.ndarray]] = {}
    lengths: list[int] = []
    cut: list[bool] = []
    for first in range(0, len(examples), TOKENIZED_AT_ONCE):
        some = [list(column[first : first + TOKENIZED_AT_ONCE]) for column in texts]
        encoding = tokenizer(*some, truncation="longest_first", max_length=max_length, return_attention_mask=False)
        cut.extend(_cut(tokenizer, some, encoding, max_length))
        lengths.extend(map(len, encoding["input_ids"]))
        for name, rows in encoding.items():
            parts.setdefault(name, []).append(np.concatenate([np.asarray(row, dtype=np.int32) for row in rows]))
    padding = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    return {
        **{f"tokens/{name}": np.concatenate(arrays) for name, arrays in parts.items()},
        **{f"padding/{name}": np.array([padding[name]], dtype=np.int32) for name in parts},
        "starts": np.concatenate([[0], np.cumsum(lengths)]),
        "cut": np.array(cut),
    }


def _cut(tokenizer: Any, texts: list[list[str]], encoding: Any, max_length: int) -> list[bool]:
    """Of every row, whether tokens were cut off."""
    if encoding.encodings is not None:
        return [bool(row.overflowing) for row in encoding.encodings]
    whole = tokenizer(*texts, return_attention_mask=False)["input_ids"]  # a tokenizer in Python does not tell
    return [len(row) > max_length for row in whole]


def num_positions(module: nn.Module) -> int | None:
    """The longest sequence that the model's position embeddings allow; None where it has none (DeBERTa-v3)."""
    from torch import nn

    for name, table in module.named_modules():
        if name.endswith("position_embeddings") and isinstance(table, nn.Embedding):
            # RoBERTa and MPNet count positions from the padding index on.
            return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    return None


def group_numbers(values: Sequence[Hashable]) -> np.ndarray:
    """(rows,) int64: equal values get equal numbers, in order of first appearance."""
    import numpy as np

    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)
