"""What stands around a prompt and a response: a template of the task, or the tokenizer's chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.errors import InputError

PROMPT = "{prompt}"  # in a template
# Before chat templates that write the date: the day is that which Llama 3's takes where it is told none.
ONE_DAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
MARK, OTHER = "\U000f5ed0", "\U000f5ed1"  # of Unicode's private use: they stand for a prompt and a response


@dataclass(frozen=True)
class Wording:
    """before, after, between: what is written before a prompt, after it, and then before the response. end: the token
    that ends a response. whole: nothing else is written, such as the token that a tokenizer puts before any text.
    strips: the space around a prompt is taken off."""

    before: str
    after: str
    between: str
    end: int
    whole: bool = False
    strips: bool = False


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has one."""
    return bool(tokenizer.chat_template)


def wording(tokenizer: Any, model: str, template: str, between: str = "", chat: bool = False) -> Wording:
    """With `chat` the tokenizer's chat template where it has one, with the prompt as the user's message, and on one day
    for all runs; else `template`. Raises InputError for a tokenizer without an end token, or a chat template that
    cannot be used."""
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of model '{model}' has no end token; a response needs one", model)
    if chat and has_chat_template(tokenizer):
        return _of_chat(tokenizer, model)
    before, after = template.split(PROMPT)
    return Wording(before, after, between, tokenizer.eos_token_id)


def _of_chat(tokenizer: Any, model: str) -> Wording:
    def written(message: str, *answer: str) -> str:
        messages = [{"role": "user", "content": message}, *({"role": "assistant", "content": text} for text in answer)]
        try:
            template = tokenizer.get_chat_template()
            text = tokenizer.apply_chat_template(
                messages,
                chat_template=ONE_DAY + template if "strftime_now" in template else template,
                tokenize=False,
                add_generation_prompt=not answer,
            )
        except Exception as error:  # the template is a program of its own
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise InputError(f"the chat template of model '{model}' cannot write a message: {reason}", model) from None
        return str(text)

    asked = written(MARK)
    if asked.count(MARK) != 1:
        raise InputError(f"the chat template of model '{model}' does not write a user's message once", model)
    before, after = asked.split(MARK)
    ending = written(MARK, OTHER).rpartition(OTHER)[2]
    strips = written(f" {MARK} ") == asked
    return Wording(before, after, "", _end_token(tokenizer, ending), whole=True, strips=strips)


def _end_token(tokenizer: Any, ending: str) -> int:
    """The first special token of what the chat template writes after an answer, else the tokenizer's end token."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = tokenizer(ending, add_special_tokens=False)["input_ids"] if ending else []
    return int(next((number for number in ids if number in special), tokenizer.eos_token_id))
