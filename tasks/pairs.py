"""Prompts and responses as token ids."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.task import Examples
from tasks import pretrained
from tasks.causal import filler_of
from tasks.plain_text import begin_tokens, plain_encoding
from tasks.sequences import Sequences, end_to_end
from tasks.wording import Wording, wording

if TYPE_CHECKING:
    import numpy as np

TOKENIZED_AT_ONCE = 4096  # rows handed to the tokenizer together
END = re.compile(r"end|eo[stmd](?![a-z])|^</s>$", re.IGNORECASE)  # in a special token's name
ANCHOR = "\n"  # a text before another, so that this one does not begin a line


@dataclass(frozen=True)
class EncodedPairs:
    """Token ids of one split: row i's prompt, then its response, are tokens[starts[i]:starts[i + 1]].

    prompts: (rows,) tokens of the prompt; the rest is the response with the end token. cut: (rows,) whether tokens
    were lost. ended: (rows,) whether the response came with an end token of its own, which was taken off. named:
    (rows,) whether prompt or response holds a special token's name, which is text. written: (rows,) whether the
    response is what its tokens are decoded to. text, text_starts: the responses as UTF-8, without end tokens, laid out
    like the tokens.
    """

    tokens: np.ndarray
    starts: np.ndarray
    prompts: np.ndarray
    cut: np.ndarray
    ended: np.ndarray
    named: np.ndarray
    written: np.ndarray
    text: np.ndarray
    text_starts: np.ndarray
    shots: np.ndarray
    begin: np.ndarray
    padding: np.ndarray

    @property
    def rows(self) -> Sequences:
        return Sequences(self.tokens, self.starts)

    @property
    def responses(self) -> list[str]:
        """The whole responses, without end tokens of their own."""
        raw = self.text.tobytes()
        return [raw[start:end].decode() for start, end in itertools.pairwise(self.text_starts.tolist())]


def tokenized(
    examples: Examples,
    model: str,
    max_length: int,
    max_response: int,
    template: str,
    between: str = "",
    chat: bool = False,
) -> dict[str, np.ndarray]:
    """The arrays of `EncodedPairs`; `template`, `between` and `chat` are those of `wording`. A response has at
    most `max_response` tokens, a prompt what that leaves of `max_length`, whatever its response: what is longer loses
    its end, and what the template says after a prompt stays. Special tokens are those of the template; in prompts and
    responses they are text."""
    import numpy as np

    tokenizer = pretrained.load_tokenizer(model)
    around = wording(tokenizer, model, template, between, chat)
    tail = _tail(tokenizer, around)
    room = max(0, max_length - max_response - len(tail))
    ends = _end_tokens(tokenizer, around.before + around.after)
    parts: list[list[int]] = []
    responses: list[str] = []
    prompts, cut, named, written = [], [], [], []
    names = re.compile("|".join(map(re.escape, _special(tokenizer))))
    for first in range(0, len(examples), TOKENIZED_AT_ONCE):
        some = slice(first, first + TOKENIZED_AT_ONCE)
        asked = list(examples.columns["prompt"][some])
        texts = [_without_end(text, ends) for text in examples.columns["response"][some]]
        heads = _heads(tokenizer, around, asked)
        said = [around.between + text for text in texts]
        encoded = plain_encoding(tokenizer, [said], add_special_tokens=False)["input_ids"]
        written += [one.strip() == two.strip() for one, two in zip(decoded(tokenizer, encoded), texts, strict=True)]
        named += [bool(names.search(one) or names.search(two)) for one, two in zip(asked, texts, strict=True)]
        responses += texts
        for head, ids in zip(heads, encoded, strict=True):
            response = [*ids, around.end][:max_response]
            cut.append(len(ids) + 1 > max_response or len(head) > room)
            prompt = [*head[:room], *tail] or [around.end]
            parts.append([*prompt, *response])
            prompts.append(len(prompt))
    begin = begin_tokens(tokenizer)
    shots = _shots(tokenizer, begin, examples)
    raw = [text.encode() for text in responses]
    tokens, starts = end_to_end(parts)
    return {
        "tokens": tokens,
        "starts": starts,
        "prompts": np.array(prompts),
        "cut": np.array(cut),
        "ended": np.array([len(a) != len(b) for a, b in zip(responses, examples.columns["response"], strict=True)]),
        "named": np.array(named),
        "written": np.array(written),
        "text": np.frombuffer(b"".join(raw), dtype=np.uint8),
        "text_starts": np.concatenate([[0], np.cumsum([len(text) for text in raw])]),
        "shots": np.array(shots, dtype=np.int32),
        "begin": np.array([len(begin)]),
        "padding": np.array([filler_of(tokenizer)], dtype=np.int32),
    }


def _shots(tokenizer: Any, begin: list[int], examples: Examples) -> list[int]:
    """What is read before each prompt in evaluations; nothing where there are no such texts."""
    text = next(iter(examples.columns.get("shots", ())), "")
    return [*begin, *plain_encoding(tokenizer, [[text]], add_special_tokens=False)["input_ids"][0]] if text else []


def decoded(tokenizer: Any, ids: Sequence[Sequence[int]]) -> list[str]:
    """The texts of rows of token ids, without special tokens and with every space as it is."""
    if not ids:
        return []
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return texts


def _special(tokenizer: Any) -> dict[str, int]:
    """Ids of the special tokens by their names; not that for unknown words."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    added |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {name: number for name, number in added.items() if number != tokenizer.unk_token_id}


def _end_tokens(tokenizer: Any, template: str) -> tuple[str, ...]:
    """What people put after a response: the end and padding tokens, and special tokens that the template holds or whose
    names say that something ends ("<|im_end|>", "<|eot_id|>")."""
    names = [name for name in _special(tokenizer) if name in template or END.search(name)]
    return tuple(name for name in (tokenizer.eos_token, tokenizer.pad_token, *names) if name)


def _without_end(text: str, ends: Iterable[str]) -> str:
    """The text without end tokens after it and the space around them; as it is where there is none."""
    shortened = text.rstrip()
    while found := next((end for end in ends if shortened.endswith(end)), None):
        text = shortened = shortened[: -len(found)].rstrip()
    return text


def _tail(tokenizer: Any, around: Wording) -> list[int]:
    """Token ids of what stands after a prompt; of a chat template as they are after a text."""
    tail: list[int] = tokenizer(around.after, add_special_tokens=False)["input_ids"] if around.after else []
    if not around.whole:
        return tail
    head, both = (
        tokenizer(f"{around.before}a{after}", add_special_tokens=False)["input_ids"] for after in ("", around.after)
    )
    return list(both[len(head) :]) if both[: len(head)] == head else tail


def _heads(tokenizer: Any, around: Wording, prompts: list[str]) -> list[list[int]]:
    """Token ids of what stands before each prompt, and the prompt."""
    if not around.whole:
        return _with_own(tokenizer, around.before, prompts)
    heads = _with_own(tokenizer, around.before, [text.strip() for text in prompts] if around.strips else prompts)
    begin, (_, end) = begin_tokens(tokenizer), _around(tokenizer, "a")
    return [head[len(begin) : len(head) - len(end)] for head in heads]


def _with_own(tokenizer: Any, before: str, prompts: list[str]) -> list[list[int]]:
    """Token ids of `before` and each prompt, tokenised as one text, with what the tokenizer puts at a text's start and
    end. Names of special tokens are special in `before` alone."""
    whole = [before + prompt for prompt in prompts]
    special = _special(tokenizer)
    place = max((at + len(name) for name in special if (at := before.rfind(name)) >= 0), default=0)
    if not place:
        heads: list[list[int]] = plain_encoding(tokenizer, [whole])["input_ids"]
        return heads
    heads = tokenizer(whole)["input_ids"]
    numbers = frozenset(special.values())
    expected = _count(tokenizer(before)["input_ids"], numbers)
    named = [row for row, head in enumerate(heads) if _count(head, numbers) != expected]
    if named:
        rest = [before[place:] + prompts[row] for row in named]
        start, end = _around(tokenizer, before[:place])
        for row, ids in zip(named, _continued(tokenizer, before[:place], rest), strict=True):
            heads[row] = [*start, *ids, *end]
    return heads


def _count(ids: Iterable[int], numbers: frozenset[int]) -> int:
    return sum(number in numbers for number in ids)


def _around(tokenizer: Any, lead: str) -> tuple[list[int], list[int]]:
    """(ids of `lead` with what the tokenizer puts before a text, what it puts after one)."""
    bare, whole = (tokenizer(lead, add_special_tokens=special)["input_ids"] for special in (False, True))
    places = range(len(whole) - len(bare) + 1)
    end = next((place for place in places if whole[place : place + len(bare)] == bare), 0) + len(bare)
    return whole[:end], whole[end:]


def _continued(tokenizer: Any, lead: str, texts: list[str]) -> list[list[int]]:
    """Token ids of texts as they stand after `lead`, which ends with a special token. Where a tokenizer marks the
    beginning of a line (SentencePiece), there is no such mark in them."""
    alone: list[list[int]] = plain_encoding(tokenizer, [texts], add_special_tokens=False)["input_ids"]
    one, other, both = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (lead, "a", lead + "a"))
    if [*one, *other] == both:
        return alone
    anchored = plain_encoding(tokenizer, [[ANCHOR + text for text in texts]], add_special_tokens=False)["input_ids"]
    anchor = plain_encoding(tokenizer, [[ANCHOR]], add_special_tokens=False)["input_ids"][0]
    return [
        ids[len(anchor) :] if ids[: len(anchor)] == anchor else as_it_is
        for ids, as_it_is in zip(anchored, alone, strict=True)
    ]
