"""How long a sequence a model can read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.errors import InputError

if TYPE_CHECKING:
    from torch import nn

TABLES = ("position_embeddings", "embed_positions", "positions_embed", "wpe")  # BERT; BART, OPT; GPT; GPT-2
BUFFERS = ("embed_positions", "pos_encoding")  # of fixed length: GPT-J, CTRL
CONFIGURED = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")


def check_positions(module: nn.Module, tokens: int, model: str, what: str = "max_length") -> None:
    """Raises InputError where so many `tokens` are more than the model has positions for."""
    positions = num_positions(module)
    if positions is not None and tokens > positions:
        raise InputError(f"{what} = {tokens} is above the {positions} positions of model '{model}'", what)


def num_positions(module: nn.Module) -> int | None:
    """The longest sequence in tokens: the position table's, or what the configuration says of rotary positions, of a
    fixed buffer or of MPT's ALiBi. None for relative positions of any distance (T5, XLNet, DeBERTa-v3, BLOOM)."""
    from torch import nn

    config: Any = module.config
    text = config.get_text_config()
    configured = next((number for name in CONFIGURED if (number := getattr(text, name, None))), None)
    tables = [
        table.num_embeddings - _offset(table)
        for name, table in module.named_modules()
        if name.endswith(TABLES) and isinstance(table, nn.Embedding)
    ]
    if not tables and not _is_bounded(module, text):
        return None
    limits = [*tables, *([configured] if configured else [])]
    return min(limits, default=None)


def _offset(table: Any) -> int:
    """Rows before the first position: BART and OPT keep two; RoBERTa and MPNet count from the padding index on."""
    padding = -1 if table.padding_idx is None else table.padding_idx
    return int(getattr(table, "offset", padding + 1))


def _is_bounded(module: nn.Module, config: Any) -> bool:
    """Whether a model without a position table has a longest sequence all the same."""
    rotary = any("Rotary" in type(part).__name__ for part in module.modules())
    buffers = any(getattr(part, name, None) is not None for part in module.modules() for name in BUFFERS)
    return rotary or buffers or hasattr(config, "max_seq_len")
