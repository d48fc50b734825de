"""Texts as token ids. A special token's name inside a text ("</s>", "[SEP]", "<|endoftext|>") is text too."""

from __future__ import annotations

import itertools
import json
from typing import Any

from harness.errors import InputError

UNMATCHED = "\U000f5ecf"  # of Unicode's private use: it makes a piece of a vocabulary one that no text holds
SHOWN = 60  # characters of a text in a message


def plain_encoding(tokenizer: Any, texts: list[list[str]], **options: Any) -> Any:
    """What `tokenizer(*texts, **options)` gives, with the template's special tokens and none from within the texts.

    texts: one list, or two of equal length for pairs. A tokenizer whose own vocabulary would find a special token in a
    text loses its names there, for good. Raises InputError where that cannot be done, naming the text.
    """
    # A tokenizer in Python would take all added tokens for text, not only the special ones: only where it must.
    encoding = tokenizer(*texts, split_special_tokens=tokenizer.is_fast, **options)
    rows = _with_special(tokenizer, texts, encoding, options)
    if rows and tokenizer.is_fast:
        _unname_special(tokenizer)
        encoding = tokenizer(*texts, split_special_tokens=True, **options)
    elif rows:
        plain = tokenizer(*([column[row] for row in rows] for column in texts), split_special_tokens=True, **options)
        for name, values in plain.items():
            for row, value in zip(rows, values, strict=True):
                encoding[name][row] = value
    rows = rows and _with_special(tokenizer, texts, encoding, options)
    if rows:
        text = " | ".join(column[rows[0]] for column in texts)
        raise InputError(
            f"the tokenizer takes a part of the text {text[:SHOWN]!r} for one of its special tokens "
            f"({', '.join(tokenizer.all_special_tokens[:8])}): take it out of the text"
        )
    return encoding


def _special_ids(tokenizer: Any) -> list[int]:
    """All but the one for unknown words, which any text may hold."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted((added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id})


def _with_special(tokenizer: Any, texts: list[list[str]], encoding: Any, options: dict[str, Any]) -> list[int]:
    """The rows that hold more special tokens than empty texts do, which have the template's."""
    import numpy as np

    special = _special_ids(tokenizer)
    template = np.isin(tokenizer(*([""] for _ in texts), **options)["input_ids"][0], special).sum()
    lengths = [len(row) for row in encoding["input_ids"]]
    ids = np.fromiter(itertools.chain.from_iterable(encoding["input_ids"]), dtype=np.int64, count=sum(lengths))
    found = np.bincount(np.repeat(np.arange(len(lengths)), lengths), np.isin(ids, special), minlength=len(lengths))
    return np.flatnonzero(found > template).tolist()


def _unname_special(tokenizer: Any) -> None:
    """Rename the special tokens in the vocabulary that texts are matched with: Unigram models and word lists hold them
    as pieces. Ids, scores and all other pieces stay, and so do the ids that the template puts in."""
    from tokenizers import Tokenizer

    backend = tokenizer.backend_tokenizer
    model = json.loads(backend.to_str())["model"]
    special, vocabulary = set(_special_ids(tokenizer)), model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {_unnamed(piece, number in special): number for piece, number in vocabulary.items()}
    else:
        model["vocab"] = [
            [_unnamed(piece, number in special), score] for number, (piece, score) in enumerate(vocabulary)
        ]
    backend.model = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model})).model


def _unnamed(piece: str, special: bool) -> str:
    return f"{UNMATCHED}{piece}{UNMATCHED}" if special else piece


def begin_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text."""
    bare, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    places = range(len(whole) - len(bare) + 1)
    return whole[: next((place for place in places if whole[place : place + len(bare)] == bare), 0)]
