"""A causal language model as it is, which learns what follows a prompt."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from harness.errors import Diverged, InputError
from harness.task import Batch, Task
from tasks import pretrained, text_sample
from tasks.positions import check_positions
from tasks.sequences import padded, tensor

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from harness.method import Backbone

IGNORED = -100  # label of a token that has no loss


class CausalTask(Task):
    """Abstract base of tasks for a causal language model. It gets no new head.

    A training batch has `input_ids` and `attention_mask` (rows, longest), padded on the right; its labels are the
    ids of what follows the prompts, elsewhere -100. The loss is the mean over those tokens, then over examples.
    """

    default_model: ClassVar[str | None] = "HuggingFaceTB/SmolLM2-135M"

    max_length: int = Field(256, ge=8, description="tokens kept of an example")

    @property
    def metric_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([self.headline, *(metric.name for metric in self.measures)]))

    def model_fingerprint(self, model: str | None, *, trust_remote_code: bool = False) -> str:
        return pretrained.fingerprint(self.model_name(model), trust_remote_code=trust_remote_code)

    def model_notes(self, model: str | None) -> list[str]:
        """As `Task.model_notes`: with what rows are padded where the tokenizer has no padding token."""
        name = self.model_name(model)
        tokenizer = pretrained.load_tokenizer(name)
        if tokenizer.pad_token_id is not None:
            return []
        end = tokenizer.eos_token
        used = "token 0, which a mask hides" if tokenizer.eos_token_id is None else f"its end token '{end}'"
        return [f"the tokenizer of model '{name}' has no padding token: rows are padded with {used}"]

    def backbone(self, model: str | None, *, meta: bool = False, trust_remote_code: bool = False) -> Backbone:
        """As `Task.backbone`, without a new head. Raises InputError for a model that is no causal language model, or
        where `max_length` is above its positions."""
        name = self.model_name(model)
        backbone = pretrained.load_backbone(
            name, "AutoModelForCausalLM", None, meta=meta, trust_remote_code=trust_remote_code
        )
        config: Any = backbone.module.config
        kinds = ", ".join(config.architectures or ["unknown"])
        if not any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in config.architectures or []):
            raise InputError(f"model '{name}' is no causal language model with its head: it holds a {kinds}", name)
        check_positions(backbone.module, self.max_length, name)
        return backbone

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator | None) -> Tensor:
        """Mean over examples of the mean cross-entropy of what follows the prompt."""
        sums, counts = response_losses(model, batch)
        return (sums / counts).mean()

    def text_windows(
        self, sample: str, count: int, module: nn.Module, model: str | None, data_root: str | None
    ) -> np.ndarray | None:
        return text_sample.windows(sample, count, module, self.model_name(model), data_root)

    def window_losses(self, model: nn.Module, ids: Tensor) -> Tensor:
        return text_sample.window_losses(model, ids)


def training_batch(rows: Sequence[np.ndarray], prompts: Sequence[int] | np.ndarray, filler: int) -> Batch:
    """Token ids of whole examples, of which the first `prompts` have no loss."""
    import numpy as np

    ids, mask = padded(rows, filler)
    labels = np.where((np.arange(mask.shape[1]) >= np.asarray(prompts)[:, None]) & mask, ids, IGNORED)
    return Batch({"input_ids": tensor(ids), "attention_mask": tensor(mask)}, tensor(labels))


def response_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(summed cross-entropy, number of tokens) of what follows each row's prompt, both (rows,)."""
    from torch.nn.functional import cross_entropy

    inputs = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
    length = batch.labels.shape[1]  # a tuner may put tokens of its own before the row
    logits = model(**inputs, use_cache=False).logits[:, -length:-1].float()
    targets = batch.labels[:, 1:]
    losses = cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return losses.sum(1), (targets != IGNORED).sum(1)


def has_prompt(model: nn.Module) -> bool:
    """Whether a tuner of PEFT puts tokens of its own, or their keys and values, before each row."""
    configs: Any = getattr(model, "peft_config", {})
    return any(getattr(config, "is_prompt_learning", False) for config in configs.values())


def check_finite(values: Tensor) -> None:
    """Raises Diverged where a prediction is not finite."""
    if not values.isfinite().all():
        raise Diverged("a prediction is not finite")


def filler_of(tokenizer: Any) -> int:
    """What rows are padded with: the padding token, else the end token, else the first token there is; a mask hides
    it from the model."""
    named = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((number for number in named if number is not None), 0)


def tokenizer_of(model: nn.Module) -> Any:
    """The tokenizer of the folder that the model was loaded from."""
    config: Any = model.config
    return _kept_tokenizer(config.name_or_path)


@functools.lru_cache(maxsize=2)
def _kept_tokenizer(folder: str) -> Any:
    return pretrained.load_tokenizer(folder)
