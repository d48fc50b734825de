"""How rows of different lengths become one batch: with which token, and on which side."""

from __future__ import annotations

from typing import Any

from harness.errors import InputError
from tasks import pretrained


def configuration(model: str) -> Any:
    """The model's configuration; of a model with code of its own only what config.json says."""
    import transformers

    pretrained.quieten()
    folder = pretrained.model_folder(model)
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError):
        return transformers.PreTrainedConfig.from_pretrained(folder)


def own_padding(config: Any) -> int | None:
    """The configuration's padding token, by which models tell padding from text; None where it names none that the
    model has."""
    text = config.get_text_config()
    number, size = text.pad_token_id, getattr(text, "vocab_size", None)
    return number if isinstance(number, int) and number >= 0 and (size is None or number < size) else None


def padding_token(config: Any, tokenizer: Any, model: str) -> int:
    """The id to pad with: the configuration's own, else one that no row ends with, of the tokenizer's (padding, end,
    begin, unknown). Raises InputError where there is none."""
    own = own_padding(config)
    if own is not None:
        return own
    size = getattr(config.get_text_config(), "vocab_size", None) or len(tokenizer)
    last = tokenizer("a")["input_ids"][-1:]
    for number in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id):
        if number is not None and number < size and number not in last:
            return int(number)
    raise InputError(f"model '{model}' has no padding token, and no other special token to pad batches with", model)


def pads_left(config: Any) -> bool:
    """Whether the model reads a row by its last place, padding or not (XLNet); elsewhere the right side is safe."""
    return getattr(config.get_text_config(), "summary_type", None) == "last"


def set_padding(config: Any, padding: int) -> None:
    """Tell a loaded model what rows are padded with."""
    config.get_text_config().pad_token_id = config.pad_token_id = padding
