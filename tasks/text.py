"""Classification and regression of texts and text pairs with a model of transformers and a new head."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from harness.splits import fingerprint_of
from harness.task import Batch, Classification, Examples
from tasks import padding, pretrained
from tasks.cache import cached
from tasks.plain_text import plain_encoding
from tasks.positions import check_positions

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
    padding: what each of them is padded with; left: on the left, so that a row's last token is at the last place.
    starts: (rows + 1) positions in those arrays: row i is starts[i] to starts[i + 1].
    cut: (rows,) whether the row was longer and lost tokens.
    """

    tokens: dict[str, np.ndarray]
    padding: dict[str, int]
    left: bool
    starts: np.ndarray
    cut: np.ndarray
    labels: np.ndarray


class TextClassification(Classification):
    """Abstract base of tasks on one text or a pair of texts: the columns of their Examples, in that order.

    Any model that transformers can build for sequence classification serves, encoder or decoder, whose prediction for
    a row does not depend on the rows beside it; docs/models.md has a table. Without classes it is regression: mean
    squared error, predictions are values.
    """

    version: ClassVar[int] = 2

    max_length: int = Field(128, ge=4, description="tokens kept of an example, special tokens included")
    head: Literal["new", "keep"] = Field(
        "new", description="keep: the checkpoint's own head, its classes (id2label) brought to the task's by name"
    )

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """The classes in the order of their numbers; () for regression."""

    @property
    def num_labels(self) -> int:
        """Number of the model's outputs: of classes, or 1 for regression."""
        return len(self.class_names) or 1

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
            kept_classes=self.class_names if self.head == "keep" else None,
        )
        check_positions(backbone.module, self.max_length, name)
        config = backbone.module.config
        if padding.own_padding(config) is None:  # not before: some models lay out their positions by it
            tokenizer = _tokenizer(name, pretrained.fingerprint(name))
            padding.set_padding(config, padding.padding_token(config, tokenizer, name))
        return backbone

    def model_notes(self, model: str | None) -> list[str]:
        """As `Task.model_notes`: with which token rows are padded, where model and tokenizer differ."""
        name = self.model_name(model)
        config, tokenizer = padding.configuration(name), _tokenizer(name, pretrained.fingerprint(name))
        chosen = padding.padding_token(config, tokenizer, name)
        if padding.own_padding(config) is None:
            return [
                f"model '{name}' names no padding token: rows are padded with {_shown(tokenizer, chosen)}, and "
                f"config.pad_token_id is set to it"
            ]
        if tokenizer.pad_token_id not in (None, chosen):
            return [
                f"model '{name}' has the padding token {_shown(tokenizer, chosen)}, its tokenizer "
                f"{_shown(tokenizer, tokenizer.pad_token_id)}: rows are padded with the model's"
            ]
        return []

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """As `Task.outputs`: the logits, (rows, outputs)."""
        logits: Tensor = model(**batch.inputs).logits
        return logits

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
        paddings = {name: int(found[f"padding/{name}"][0]) for name in inputs}
        return EncodedTexts(tokens, paddings, bool(found["left"][0]), found["starts"], found["cut"], examples.labels)

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
        """Inputs (rows, longest row), padded on one side; labels int64 classes or float32 targets."""
        import numpy as np
        import torch

        chosen = np.asarray(rows)
        starts = encoded.starts[chosen]
        lengths = encoded.starts[chosen + 1] - starts
        places = np.arange(lengths.max()) - (lengths.max() - lengths[:, None] if encoded.left else 0)
        filled = (places >= 0) & (places < lengths[:, None])
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
    """The arrays of `EncodedTexts` but for the labels: "tokens/<input>", "padding/<input>", "left", "starts", "cut".

    A pair that is too long loses tokens of its longer text first. A text without a token becomes one of padding.
    """
    import numpy as np

    config, tokenizer = padding.configuration(model), pretrained.load_tokenizer(model)
    fillers = {
        "input_ids": padding.padding_token(config, tokenizer, model),
        "token_type_ids": tokenizer.pad_token_type_id,
    }
    texts = list(examples.columns.values())
    parts: dict[str, list[np.ndarray]] = {}
    lengths: list[int] = []
    cut: list[bool] = []
    for first in range(0, len(examples), TOKENIZED_AT_ONCE):
        some = [list(column[first : first + TOKENIZED_AT_ONCE]) for column in texts]
        options = {"truncation": "longest_first", "max_length": max_length, "return_attention_mask": False}
        encoding = plain_encoding(tokenizer, some, **options)
        cut.extend(_cut(tokenizer, some, encoding, max_length))
        lengths.extend(max(1, len(row)) for row in encoding["input_ids"])
        for name in fillers.keys() & encoding.keys():
            rows = [np.asarray(row or [fillers[name]], dtype=np.int32) for row in encoding[name]]
            parts.setdefault(name, []).append(np.concatenate(rows))
    return {
        **{f"tokens/{name}": np.concatenate(arrays) for name, arrays in parts.items()},
        **{f"padding/{name}": np.array([fillers[name]], dtype=np.int32) for name in parts},
        "left": np.array([padding.pads_left(config)]),
        "starts": np.concatenate([[0], np.cumsum(lengths)]),
        "cut": np.array(cut),
    }


def _cut(tokenizer: Any, texts: list[list[str]], encoding: Any, max_length: int) -> list[bool]:
    """Of every row, whether tokens were cut off."""
    if encoding.encodings is not None:
        return [bool(row.overflowing) for row in encoding.encodings]
    whole = plain_encoding(tokenizer, texts, return_attention_mask=False)["input_ids"]  # one in Python does not tell
    return [len(row) > max_length for row in whole]


@functools.lru_cache(maxsize=4)
def _tokenizer(model: str, fingerprint: str) -> Any:
    """Kept, since every run asks for it, while the model stays as it is. Not for texts: they may change it."""
    return pretrained.load_tokenizer(model)


def _shown(tokenizer: Any, number: int) -> str:
    return f"{number} ({tokenizer.convert_ids_to_tokens(number)!r})"


def group_numbers(values: Sequence[Hashable]) -> np.ndarray:
    """(rows,) int64: equal values get equal numbers, in order of first appearance."""
    import numpy as np

    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)
