"""Greedy answers of a causal language model, in batches, with its cache of keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from harness.task import Batch
from tasks.causal import filler_of, has_prompt

if TYPE_CHECKING:
    from torch import Tensor, nn


def generated(model: nn.Module, tokenizer: Any, batch: Batch, end: int, tokens: int, at_least: int = 0) -> Tensor:
    """Token ids (rows, up to `tokens`) of the greedy answers to the batch's prompts, filled up after the token `end`,
    which does not come before `at_least` tokens."""
    import torch

    parts = [
        (rows, _generate(model, tokenizer, some, end, max_new_tokens=tokens, min_new_tokens=at_least or None))
        for rows, some in _pieces(model, batch)
    ]
    found = parts[0][1].new_full((len(batch.inputs["prompt_ids"]), max(ids.shape[1] for _, ids in parts)), end)
    for rows, ids in parts:
        found[torch.as_tensor(rows), : ids.shape[1]] = ids
    return found


def first_logits(model: nn.Module, tokenizer: Any, batch: Batch, end: int) -> Tensor:
    """Logits of the first token of each answer, (rows, vocabulary), float32."""
    import torch

    settings = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    parts = [(rows, _generate(model, tokenizer, some, end, **settings)) for rows, some in _pieces(model, batch)]
    order = torch.as_tensor([row for rows, _ in parts for row in rows])
    found: Tensor = torch.cat([each.logits[0].float() for _, each in parts])[order.argsort()]
    return found


def _pieces(model: nn.Module, batch: Batch) -> Iterator[tuple[list[int], Batch]]:
    """(rows, their batch): all at once; where a tuner puts tokens of its own before the row, those of one length, since
    padding would come between."""
    ids, mask = batch.inputs["prompt_ids"], batch.inputs["prompt_mask"]
    if not has_prompt(model):
        yield list(range(len(ids))), batch
        return
    lengths = mask.sum(1).tolist()
    for length in sorted(set(lengths)):
        rows = [row for row, each in enumerate(lengths) if each == length]
        some = {"prompt_ids": ids[rows, -length:], "prompt_mask": mask[rows, -length:]}
        yield rows, Batch(some, batch.labels[rows])


def _generate(model: nn.Module, tokenizer: Any, batch: Batch, end: int, **settings: Any) -> Any:
    """Token ids of the answers alone, or what `settings` make `generate` return."""
    from transformers import GenerationConfig

    prompts = batch.inputs["prompt_ids"]
    greedy = GenerationConfig(do_sample=False, pad_token_id=filler_of(tokenizer), eos_token_id=end, **settings)
    with _no_settings_of_its_own(model):
        found: Any = model.generate(  # type: ignore[operator]
            input_ids=prompts, attention_mask=batch.inputs["prompt_mask"], generation_config=greedy
        )
    return found if greedy.return_dict_in_generate else found[:, prompts.shape[1] :]


@contextmanager
def _no_settings_of_its_own(model: nn.Module) -> Iterator[None]:
    """Meanwhile the model's generation_config is empty: transformers takes from it whatever it is not given, such as a
    repetition penalty."""
    from transformers import GenerationConfig

    kept = [
        (module, vars(module)["generation_config"]) for module in model.modules() if "generation_config" in vars(module)
    ]
    for module, _ in kept:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, own_settings in kept:
            module.generation_config = own_settings
