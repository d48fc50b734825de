"""A tuner of PEFT tried on a backbone before anything runs: put into a copy of it, which is given a batch of tokens."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from harness.errors import InputError
from methods.shared.peft_model import peft_model

LENGTH = 8  # tokens of a row that is made here
MOST_NUMBERS = 1_000_000_000  # that a tuner may train on a small backbone


def takes_tokens(module: Any) -> bool:
    """Whether it is a model of transformers whose inputs are token ids."""
    return getattr(module, "main_input_name", None) == "input_ids"


@torch.no_grad()
def trial_inputs(module: Any) -> dict[str, Tensor] | None:
    """Inputs, on the module's device, that the model takes without an error; None where none are found. It is left in
    evaluation mode.

    transformers' own dummy batch comes first. Some models refuse it: classifiers that read the end token want it in
    every row (T5, BART), others take one row at a time without a padding token.
    """
    if not takes_tokens(module):
        return None
    device = next(module.parameters()).device
    module.eval()
    for inputs in _candidates(module):
        placed = {name: value.to(device) for name, value in inputs.items()}
        try:
            module(**placed)
        except Exception:  # it says nothing about a tuner
            continue
        return placed
    return None


def _candidates(module: Any) -> Iterator[dict[str, Tensor]]:
    yield module.dummy_inputs
    config = module.config.get_text_config()
    end, pad, begin = (getattr(config, f"{name}_token_id", None) for name in ("eos", "pad", "bos"))
    end = end[0] if isinstance(end, list) else end
    word = next(number for number in range(getattr(config, "vocab_size", LENGTH)) if number not in (end, pad, begin))
    for rows in (2, 1):
        ids = torch.full((rows, LENGTH), word)
        if end is not None:
            ids[:, -1] = end
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        yield inputs
        if module.config.is_encoder_decoder:
            yield inputs | {"decoder_input_ids": ids}


def failure(module: Any, config: Any, inputs: dict[str, Tensor] | None) -> Exception | None:
    """Why PEFT cannot put the tuner into `module`, which is lost, or the result does not take `inputs` as it did."""
    most = max(MOST_NUMBERS, 10 * sum(p.numel() for p in module.parameters()))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            model = peft_model(module, copy.deepcopy(config))
            count = sum(p.numel() for p in model.parameters() if p.requires_grad)
            if count > most:
                kind = str(config.peft_type.value).lower()
                return InputError(f"peft[type={kind}] would train {count:,} parameters here: give smaller sizes", kind)
            if (left := _left_out(model, config) or _lower_than_float32(model)) is not None:
                return left
            if inputs is not None:
                model.eval()(**inputs)
        except Exception as error:
            return error
    return None


def _left_out(model: Any, config: Any) -> ValueError | None:
    """What is wrong where PEFT, without a word, left a layer as it was that the configuration names."""
    parts = dict(model.get_base_model().named_modules())
    for name in getattr(config, "target_modules", None) or ():
        if name in parts and not isinstance(parts[name], BaseTunerLayer):
            kind = type(parts[name]).__name__
            return ValueError(f"it passes over layer '{name}', which is of kind {kind}; leave it out of target_modules")
    return None


def _lower_than_float32(model: nn.Module) -> ValueError | None:
    """What is wrong where the tuner would train in the backbone's own, lower precision."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            return ValueError(f"it would train '{name}' in {str(parameter.dtype).removeprefix('torch.')}")
    return None


def without_values(module: nn.Module) -> nn.Module:
    """A copy on the meta device, at no cost in memory."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in module.parameters()}
    memo |= {id(buffer): buffer.to("meta") for buffer in module.buffers()}
    return copy.deepcopy(module, memo)
