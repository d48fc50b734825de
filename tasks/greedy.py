"""Greedy answers of a causal language model, in batches, with its cache of keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from harness.task import Batch
from tasks.causal import filler_of

if TYPE_CHECKING:
    from torch import nn


def generated(model: nn.Module, tokenizer: Any, batch: Batch, end: int, **settings: Any) -> Any:
    """Token ids (rows, tokens) of the greedy answers to the batch's prompts, filled up after the token `end`; or
    what `settings` make `generate` return."""
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
