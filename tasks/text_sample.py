"""A fixed sample of text, cut into windows of tokens: what a language model's forgetting is measured on."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import InputError
from tasks import pretrained
from tasks.hub import read_split
from tasks.plain_text import plain_encoding
from tasks.positions import num_positions

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

WIKITEXT = "wikitext"
DATASET = ("Salesforce/wikitext", "wikitext-2-v1", "test", ["text"])
WINDOW = 256  # tokens, where the model can read as many


def windows(sample: str, count: int, module: nn.Module, model: str, data_root: str | None) -> np.ndarray:
    """(windows, tokens) token ids, int64: the first `count` windows of the sample, one after the other, or as many as
    it has. A window has 256 tokens, or as many as the model reads; with a tokenizer that puts a start token before a
    text, each window begins with one.

    `sample`: "wikitext" (WikiText-2's test text) or the path of a text file. Raises InputError where it cannot be read,
    or is shorter than one window.
    """
    import numpy as np

    text = "".join(read_split(*DATASET, data_root).texts("text")) if sample == WIKITEXT else _file(sample)
    tokenizer = pretrained.load_tokenizer(model)
    before = [number for number in tokenizer("")["input_ids"][:1] if number == tokenizer.bos_token_id]
    tokens = min(WINDOW, num_positions(module) or WINDOW)
    taken = tokens - len(before)
    (ids,) = plain_encoding(tokenizer, [[text]], add_special_tokens=False)["input_ids"]
    number = min(count, len(ids) // taken)
    if not number:
        raise InputError(
            f"--forgetting '{sample}': the text has {len(ids):,} tokens; one window takes {taken:,}", "forgetting"
        )
    cut = np.array(ids[: number * taken], dtype=np.int64).reshape(number, taken)
    start = np.array(before * number, dtype=np.int64).reshape(number, len(before))
    return np.concatenate([start, cut], axis=1)


def window_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """(windows,) mean cross-entropy in nats of the tokens after the first, of ids (windows, tokens)."""
    from torch.nn.functional import cross_entropy

    # a tuner may put tokens of its own before the window
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, -ids.shape[1] : -1].float()
    return cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def _file(sample: str) -> str:
    path = Path(sample)
    try:
        path = path.expanduser()
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"--forgetting '{sample}' is no text in UTF-8", "forgetting") from None
    except (OSError, ValueError, RuntimeError) as error:  # the last of nobody's home folder
        reason = getattr(error, "strerror", None) or "no such path"
        allowed = f"give {WIKITEXT} or a text file"
        raise InputError(f"--forgetting '{sample}' cannot be read ({reason}){_nearest(path)}: {allowed}") from None


def _nearest(path: Path) -> str:
    """The nearest match among the files beside it and "wikitext"."""
    beside: list[Any] = []
    if path.parent.is_dir():
        beside = [child.name for child in path.parent.iterdir() if child.is_file()]
    near = difflib.get_close_matches(path.name, [WIKITEXT, *beside], n=1, cutoff=0.6)
    return f" (nearest: '{near[0] if near[0] == WIKITEXT else path.parent / near[0]}')" if near else ""
