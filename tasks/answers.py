"""Prompts and responses for a causal language model, and what it answers itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from harness.metric import Metric
from harness.splits import fingerprint_of
from harness.task import Batch, Examples
from tasks import pretrained
from tasks.cache import cached
from tasks.causal import CausalTask, check_finite, response_losses, tokenizer_of, training_batch
from tasks.greedy import first_logits, generated
from tasks.pairs import EncodedPairs, decoded, tokenized
from tasks.positions import check_positions
from tasks.sequences import padded, tensor
from tasks.wording import PROMPT, has_chat_template, wording

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

LARGEST_LOG = 80.0  # perplexities above e^80 are given as that


def each(score: Callable[[str, str], float]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """(predictions, references) -> (rows,) scores of an answer and the true one."""

    def of_rows(predictions: np.ndarray, references: np.ndarray) -> np.ndarray:
        import numpy as np

        pairs = zip(texts(predictions), texts(references), strict=True)
        return np.array([score(guess, truth) for guess, truth in pairs], dtype=np.float64)

    return of_rows


def _perplexity(predictions: np.ndarray, references: np.ndarray) -> float:
    return float(_perplexity_of_sums(_nats_and_counts(predictions, references).sum(axis=0)))


def _nats_and_counts(predictions: np.ndarray, references: np.ndarray) -> np.ndarray:
    """(rows, 3): 1, the summed cross-entropy and the number of tokens of the true response."""
    import numpy as np

    return np.concatenate([np.ones((len(predictions), 1)), predictions[:, :2]], axis=1, dtype=np.float64)


def _perplexity_of_sums(sums: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.exp(np.minimum(sums[..., 1] / sums[..., 2], LARGEST_LOG))


PERPLEXITY = Metric(
    "perplexity", _perplexity, higher_is_better=False, parts=_nats_and_counts, of_sums=_perplexity_of_sums
)


class AnswerTask(CausalTask):
    """Abstract base of tasks whose Examples have the columns "prompt" and "response".

    The loss is on the response alone (its tokens and the end token). In an evaluation the response is generated
    greedily, up to the end token that training puts after it, and kept whole, so that every metric has its examples.
    The model's own generation_config.json has no say. A column "shots", one text in all rows, is read before each
    prompt in evaluations and not in training.
    """

    between: ClassVar[str] = ""  # what stands between the template and the response, where there is no chat template

    template: str = Field("{prompt}\n", description="what the model reads; {prompt} stands for the prompt")
    max_length: int = Field(
        256, ge=8, description="tokens kept of an example; a prompt has what max_response leaves, and loses its end"
    )
    max_response: int = Field(64, ge=1, description="most tokens of a response, the end token included")

    chat_template: bool = Field(
        False,
        description="the model reads the tokenizer's chat template, with the prompt as the user's message; `template` "
        "where there is none",
        exclude_if=lambda value: not value,  # younger than the first records
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.template.count(PROMPT) != 1:
            raise ValueError(f"template = {self.template!r} is not allowed: it should hold {PROMPT} once")
        if self.max_response >= self.max_length:
            raise ValueError(f"max_response = {self.max_response} should be below max_length = {self.max_length}")
        return self

    def model_fingerprint(self, model: str | None, *, trust_remote_code: bool = False) -> str:
        """As `Task.model_fingerprint`; with the chat template where it has a say."""
        found = super().model_fingerprint(model, trust_remote_code=trust_remote_code)
        template = pretrained.load_tokenizer(self.model_name(model)).chat_template if self.chat_template else None
        return hashlib.sha256(f"{found}:{template}".encode()).hexdigest()[:16] if template else found

    def model_notes(self, model: str | None) -> list[str]:
        """As `CausalTask.model_notes`; what is used where there is no chat template."""
        name = self.model_name(model)
        said = super().model_notes(model)
        if self.chat_template and not has_chat_template(pretrained.load_tokenizer(name)):
            said.append(f"the tokenizer of model '{name}' has no chat template: template = {self.template!r} is used")
        return said

    def encode(self, examples: Examples, model: str | None) -> EncodedPairs:
        """Token ids of every row; kept on disk, so that all runs share them."""
        name = self.model_name(model)
        settings = (self.max_length, self.max_response, self.template, self.between, self.chat_template)
        return EncodedPairs(
            **cached(
                "pairs",
                (self.model_fingerprint(name), *settings, fingerprint_of(pairs=examples)),
                ("transformers", "tokenizers"),
                lambda: tokenized(examples, name, *settings),
            )
        )

    def lengths(self, encoded: EncodedPairs) -> np.ndarray:
        """(rows,) number of tokens."""
        import numpy as np

        return np.diff(encoded.starts)

    def facts(self, encoded: EncodedPairs) -> dict[str, Any]:
        """The share of rows that lost tokens of the prompt or the response; notes on how texts are read."""
        notes = []
        if ended := int(encoded.ended.sum()):
            notes.append(f"{ended:,} responses came with an end token of their own, which was taken off")
        if named := int(encoded.named.sum()):
            notes.append(f"{named:,} rows hold a special token's name, which is text there (in template it is special)")
        return {"truncated_share": round(float(encoded.cut.mean()), 6)} | ({"notes": notes} if notes else {})

    def gold(self, examples: Examples, encoded: EncodedPairs) -> np.ndarray:
        """The whole responses, without end tokens of their own, as `packed` has texts; int16."""
        import numpy as np

        responses = encoded.responses
        return packed(responses, [0] * len(responses), [1] * len(responses), np.int16)

    def collate(self, encoded: EncodedPairs, rows: Sequence[int], generator: torch.Generator | None) -> Batch:
        """See `CausalTask`; in evaluations the prompts too, `prompt_ids` and `prompt_mask`, padded on the left."""
        import numpy as np

        filler, prompts = int(encoded.padding[0]), encoded.prompts[list(rows)]
        wholes = [encoded.rows[row] for row in rows]
        if generator is not None:
            return training_batch(wholes, prompts, filler)
        shots, begin = encoded.shots, int(encoded.begin[0]) if len(encoded.shots) else 0
        wholes = [np.concatenate([shots, whole[begin:]]) for whole in wholes]
        prompts = prompts + len(shots) - begin
        batch = training_batch(wholes, prompts, filler)
        found = padded([whole[:size] for whole, size in zip(wholes, prompts, strict=True)], filler, left=True)
        batch.inputs["prompt_ids"], batch.inputs["prompt_mask"] = map(tensor, found)
        return batch

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, 2 + bytes of the longest), float32: see `packed`."""
        import numpy as np
        import torch

        sums, counts = response_losses(model, batch)
        check_finite(sums)
        tokenizer = tokenizer_of(model)
        end = self._end(tokenizer)
        ids = generated(model, tokenizer, batch, end, self.max_response).tolist()
        answers = decoded(tokenizer, [row[: row.index(end)] if end in row else row for row in ids])
        return torch.from_numpy(packed(answers, sums.tolist(), counts.tolist(), np.float32)).to(sums.device)

    @property
    def longest_answer(self) -> int:
        """See `Task.longest_answer`."""
        return self.max_response

    def generate(self, model: nn.Module, batch: Batch, tokens: int) -> None:
        """See `Task.generate`."""
        tokenizer = tokenizer_of(model)
        generated(model, tokenizer, batch, self._end(tokenizer), tokens, at_least=tokens)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of each row the mean loss of the response, and the logits of its first token as generation has them."""
        import torch

        tokenizer = tokenizer_of(model)
        longest = batch.inputs["prompt_ids"].shape[1] + self.max_response  # with shots it may be above max_length
        check_positions(model, longest, tokenizer.name_or_path, "a prompt with its shots and max_response")
        sums, counts = response_losses(model, batch)
        logits = first_logits(model, tokenizer, batch, self._end(tokenizer))
        return torch.cat([(sums / counts)[:, None], logits], dim=1)

    def _end(self, tokenizer: Any) -> int:
        """The token that ends a response."""
        return wording(tokenizer, tokenizer.name_or_path, self.template, chat=self.chat_template).end


def packed(found: Sequence[str], nats: Sequence[float], counts: Sequence[int], kind: type) -> np.ndarray:
    """Texts and their losses as one array of a `kind` of number, one row each: summed cross-entropy in nats, number of
    tokens, then the text's UTF-8 bytes and -1 after its end."""
    import numpy as np

    encoded = [text.encode() for text in found]
    rows: np.ndarray = np.full((len(found), 2 + max(map(len, encoded))), -1, dtype=kind)
    rows[:, 0], rows[:, 1] = nats, counts
    for row, text in zip(rows, encoded, strict=True):
        row[2 : 2 + len(text)] = np.frombuffer(text, dtype=np.uint8)
    return rows


def texts(rows: np.ndarray) -> list[str]:
    """The texts of `packed` rows."""
    import numpy as np

    return [row[row >= 0].astype(np.uint8).tobytes().decode() for row in rows[:, 2:]]
