"""Prompts and responses as token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.errors import InputError
from harness.task import Examples
from tasks import pretrained

if TYPE_CHECKING:
    import numpy as np

PROMPT = "{prompt}"  # in a template
TOKENIZED_AT_ONCE = 4096  # rows handed to the tokenizer together


@dataclass(frozen=True)
class EncodedPairs:
    """Token ids of one split: row i's prompt, then its response, are tokens[starts[i]:starts[i + 1]].

    prompts: (rows,) tokens of the prompt; the rest is the response with the end token. cut: (rows,) whether tokens
    were lost.
    """

    tokens: np.ndarray
    starts: np.ndarray
    prompts: np.ndarray
    cut: np.ndarray
    padding: int


def tokenized(
    examples: Examples, model: str, max_length: int, max_response: int, template: str
) -> dict[str, np.ndarray]:
    """The arrays of `EncodedPairs`. Too long a response loses its end; then the prompt loses its own, so that what the
    template says after it stays."""
    import numpy as np

    tokenizer = pretrained.load_tokenizer(model, pads=False)
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of model '{model}' has no end token; a response needs one", model)
    before, after = template.split(PROMPT)
    tail = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    parts: list[list[int]] = []
    prompts, cut = [], []
    for first in range(0, len(examples), TOKENIZED_AT_ONCE):
        some = slice(first, first + TOKENIZED_AT_ONCE)
        heads = tokenizer([before + text for text in examples.columns["prompt"][some]])["input_ids"]
        ends = tokenizer(list(examples.columns["response"][some]), add_special_tokens=False)["input_ids"]
        for head, end in zip(heads, ends, strict=True):
            response = [*end, tokenizer.eos_token_id][:max_response]
            room = max(0, max_length - len(tail) - len(response))
            cut.append(len(end) + 1 > max_response or len(head) > room)
            prompt = [*head[:room], *tail] or [tokenizer.eos_token_id]
            parts.append([*prompt, *response])
            prompts.append(len(prompt))
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return {
        "tokens": np.concatenate([np.asarray(part, dtype=np.int32) for part in parts]),
        "starts": np.concatenate([[0], np.cumsum([len(part) for part in parts])]),
        "prompts": np.array(prompts),
        "cut": np.array(cut),
        "padding": np.array([padding], dtype=np.int32),
    }


def padded(
    encoded: EncodedPairs, starts: np.ndarray, ends: np.ndarray, *, left: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, which are filled), both (rows, longest), of stretches of the tokens."""
    import numpy as np

    lengths = ends - starts
    places = np.arange(lengths.max())
    offsets = (
        places - (lengths.max() - lengths)[:, None] if left else np.broadcast_to(places, (len(starts), len(places)))
    )
    filled = (offsets >= 0) & (offsets < lengths[:, None])
    ids = np.where(filled, encoded.tokens[np.where(filled, starts[:, None] + offsets, 0)], encoded.padding)
    return ids, filled
