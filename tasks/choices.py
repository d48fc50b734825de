"""Choices as token ids, and their log-likelihoods: a prompt is read once, whatever the number of its choices."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.errors import InputError
from harness.task import Batch, Examples
from tasks import pretrained
from tasks.causal import IGNORED, filler_of, has_prompt, response_losses
from tasks.plain_text import begin_tokens, plain_encoding
from tasks.sequences import Sequences, end_to_end, padded, tensor

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

TOKENIZED_AT_ONCE = 1024  # questions handed to the tokenizer together


@dataclass(frozen=True)
class EncodedChoices:
    """Token ids of one split. Question i has the choices first[i] to first[i + 1], right[i] of which is the right one.

    contexts, choices: their tokens, end to end, see `Sequences`; choice j continues context context_of[j]. characters:
    (choices,) of the choice's text. cut: (questions,) whether a context lost its beginning.
    """

    context_tokens: np.ndarray
    context_starts: np.ndarray
    choice_tokens: np.ndarray
    choice_starts: np.ndarray
    context_of: np.ndarray
    first: np.ndarray
    right: np.ndarray
    characters: np.ndarray
    cut: np.ndarray
    padding: np.ndarray

    @property
    def contexts(self) -> Sequences:
        return Sequences(self.context_tokens, self.context_starts)

    @property
    def choices(self) -> Sequences:
        return Sequences(self.choice_tokens, self.choice_starts)

    def of(self, questions: Sequence[int]) -> list[list[int]]:
        """The choices of each question."""
        return [list(range(self.first[number], self.first[number + 1])) for number in questions]

    def right_rows(self, questions: Sequence[int]) -> tuple[list[np.ndarray], list[int]]:
        """(the context and the right choice, tokens of the context) of each question."""
        import numpy as np

        right = [int(self.first[number] + self.right[number]) for number in questions]
        contexts = [self.contexts[self.context_of[choice]] for choice in right]
        rows = [np.concatenate([one, self.choices[two]]) for one, two in zip(contexts, right, strict=True)]
        return rows, [len(context) for context in contexts]


def tokenized_choices(examples: Examples, model: str, max_length: int, task: str) -> dict[str, np.ndarray]:
    """The arrays of `EncodedChoices`. A context and a choice are tokenised as one text; what the texts of one context
    have in common, up to its end, is read as the context. Too long a context loses its beginning; choices are whole.

    Raises InputError, which names the task, where `max_length` has no room for a choice and a token before it.
    """
    import numpy as np

    tokenizer = pretrained.load_tokenizer(model)
    begin = begin_tokens(tokenizer)
    contexts: list[list[int]] = []
    choices: list[list[int]] = []
    context_of, cut, counts = [], [], []
    lacking = 0  # tokens
    for start in range(0, len(examples), TOKENIZED_AT_ONCE):
        few = [examples.columns[name][start : start + TOKENIZED_AT_ONCE] for name in ("contexts", "choices")]
        asked = [_by_context(*pair) for pair in zip(*few, strict=True)]
        texts = [text for question in asked for context, group in question for text in (context, *group)]
        ids = iter(plain_encoding(tokenizer, [texts], add_special_tokens=False)["input_ids"])
        for question in asked:
            lost = False
            for _, group in question:
                context, *wholes = itertools.islice(ids, 1 + len(group))
                shared = _shared(context, wholes)
                room = max_length - len(begin) - max(len(whole) - shared for whole in wholes)
                lacking = max(lacking, 1 - room)
                lost |= shared > room
                contexts.append([*begin, *context[max(0, shared - room) : shared]] or [filler_of(tokenizer)])
                choices += [whole[shared:] for whole in wholes]
                context_of += [len(contexts) - 1] * len(wholes)
            cut.append(lost)
            counts.append(sum(len(group) for _, group in question))
    if lacking > 0:
        least = max_length + lacking
        raise InputError(f"task '{task}': max_length = {max_length} is too short for its choices: give {least} or more")
    context_tokens, context_starts = end_to_end(contexts)
    choice_tokens, choice_starts = end_to_end(choices)
    return {
        "context_tokens": context_tokens,
        "context_starts": context_starts,
        "choice_tokens": choice_tokens,
        "choice_starts": choice_starts,
        "context_of": np.array(context_of),
        "first": np.concatenate([[0], np.cumsum(counts)]),
        "right": examples.labels,
        "characters": np.array([len(text) for row in examples.columns["choices"] for text in row]),
        "cut": np.array(cut),
        "padding": np.array([filler_of(tokenizer)], dtype=np.int32),
    }


def _by_context(contexts: Sequence[str], choices: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each context with the texts of it and its choices, in the choices' order."""
    pairs = zip(contexts, choices, strict=True)
    grouped = itertools.groupby(pairs, key=lambda pair: pair[0])
    return [(context, [f"{context} {choice}" for _, choice in group]) for context, group in grouped]


def _shared(context: Sequence[int], wholes: Sequence[Sequence[int]]) -> int:
    """How many tokens the context and all texts begin with; at least one of each text is left."""
    most = min(len(context), *(len(whole) - 1 for whole in wholes))
    return next((n for n in range(most) if any(whole[n] != context[n] for whole in wholes)), most)


def choices_batch(encoded: EncodedChoices, questions: Sequence[int]) -> Batch:
    """`context_ids`, `context_mask` (contexts, longest), padded on the left; `choice_ids`, `choice_mask` (choices,
    1 + longest), padded on the right, which begin with the last token of their context; `context_of`, `question` and
    `characters` (choices,). Labels: places of the right choices."""
    import numpy as np

    of_each = encoded.of(questions)
    chosen = np.concatenate(of_each)
    used, context_of = np.unique(encoded.context_of[chosen], return_inverse=True)
    contexts = [encoded.contexts[number] for number in used]
    filler = int(encoded.padding[0])
    context_ids, context_mask = padded([context[:-1] for context in contexts], filler, left=True)
    choice_ids, choice_mask = padded(
        [
            np.concatenate([contexts[context][-1:], encoded.choices[choice]])
            for choice, context in zip(chosen, context_of, strict=True)
        ],
        filler,
    )
    inputs = {
        "context_ids": context_ids,
        "context_mask": context_mask,
        "choice_ids": choice_ids,
        "choice_mask": choice_mask,
        "context_of": context_of,
        "question": np.repeat(np.arange(len(of_each)), [len(choices) for choices in of_each]),
        "characters": encoded.characters[chosen],
    }
    return Batch({name: tensor(array) for name, array in inputs.items()}, tensor(encoded.right[np.asarray(questions)]))


def log_likelihoods(model: nn.Module, batch: Batch) -> Tensor:
    """(choices,) in nats, float32: of all tokens of each choice, given its context. The contexts are read once, into
    the cache of keys and values; the choices go on from there. A tuner that puts tokens of its own before the text, or
    before its keys and values, would put them before the choices too: then each choice is read with its context."""
    if has_prompt(model):
        return _read_whole(model, batch)
    given, of = batch.inputs, batch.inputs["context_of"]
    known, following = given["context_mask"], given["choice_mask"]
    positions = (known.cumsum(1) - 1).clamp(min=0)
    later = known.sum(1)[of][:, None] + following.cumsum(1) - 1
    cache = _forward(
        model, input_ids=given["context_ids"], attention_mask=known, position_ids=positions, logits_to_keep=1
    ).past_key_values
    cache.batch_select_indices(of)
    logits = _forward(
        model,
        input_ids=given["choice_ids"][:, :-1],
        attention_mask=_concatenated(known[of], following[:, :-1]),
        position_ids=later.clamp(min=0)[:, :-1],
        past_key_values=cache,
    ).logits
    targets = given["choice_ids"][:, 1:, None]
    found = logits.float().log_softmax(-1).gather(2, targets).squeeze(2)
    return (found * following[:, 1:]).sum(1)


def _read_whole(model: nn.Module, batch: Batch) -> Tensor:
    """(choices,) as `log_likelihoods`, without a cache."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    given, of = batch.inputs, batch.inputs["context_of"]
    wholes = _concatenated(given["context_ids"][of], given["choice_ids"])
    masks = _concatenated(given["context_mask"][of], given["choice_mask"]).bool()
    rows = [whole[mask] for whole, mask in zip(wholes, masks, strict=True)]
    ids = pad_sequence(rows, batch_first=True)
    places = torch.arange(ids.shape[1], device=ids.device)
    there = places < masks.sum(1, keepdim=True)
    known = places <= given["context_mask"].sum(1)[of][:, None]  # a choice begins with the last token of its context
    labels = ids.masked_fill(known | ~there, IGNORED)
    sums, _ = response_losses(model, Batch({"input_ids": ids, "attention_mask": there.long()}, labels))
    return -sums


def _concatenated(one: Tensor, other: Tensor) -> Tensor:
    import torch

    return torch.cat([one, other], dim=1)


def _forward(model: nn.Module, **inputs: Any) -> Any:
    """The model's outputs, with a cache. Not every model takes positions, or is asked for its last logits alone."""
    from transformers import PreTrainedModel

    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    taken = inspect.signature(inner.forward).parameters
    optional = {"position_ids", "logits_to_keep"} - taken.keys()
    return model(**{name: value for name, value in inputs.items() if name not in optional}, use_cache=True)
