"""A causal language model that learns to answer prompts: instructions, summaries, your own pairs of texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from harness.errors import InputError
from harness.metric import Metric, mean_of
from harness.splits import fingerprint_of
from harness.task import Batch, Examples
from tasks import own, pretrained
from tasks.cache import cached
from tasks.causal import CausalTask, check_finite, filler_of, response_losses, tokenizer_of, training_batch
from tasks.hub import Rows, first_split, read_split
from tasks.pairs import PROMPT, EncodedPairs, decoded, tokenized
from tasks.rouge import counting, rouge, words
from tasks.sequences import padded, tensor
from tasks.text import group_numbers

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

LARGEST_LOG = 80.0  # perplexities above e^80 are given as that


def _each(score: Callable[[str, str], float]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """(predictions, references) -> (rows,) scores of an answer and the true one."""

    def of_rows(predictions: np.ndarray, references: np.ndarray) -> np.ndarray:
        import numpy as np

        pairs = zip(_texts(predictions), _texts(references), strict=True)
        return np.array([score(guess, truth) for guess, truth in pairs])

    return of_rows


def _perplexity(predictions: np.ndarray, references: np.ndarray) -> float:
    import numpy as np

    nats = float(predictions[:, 0].sum(dtype=np.float64) / predictions[:, 1].sum(dtype=np.float64))
    return math.exp(min(nats, LARGEST_LOG))


MEASURES = (
    mean_of("rougeL", _each(lambda guess, truth: rouge(guess, truth, longest=True))),
    mean_of("rouge1", _each(lambda guess, truth: rouge(guess, truth, longest=False))),
    mean_of("exact_match", _each(lambda guess, truth: guess.strip() == truth.strip()), right_or_wrong=True),
    Metric("perplexity", _perplexity, higher_is_better=False),
)


class Generation(CausalTask, own.TableFile):
    """Prompts and responses for a causal language model, called as generation:PATH (or a Hub dataset's id).

    The loss is on the response alone (its tokens and the end token): the mean over its tokens, then over examples.
    In an evaluation the response is generated greedily, up to the tokenizer's end token, and compared with the whole
    true one: exact_match, rouge1 and rougeL; perplexity is that of the true responses. The model's own
    generation_config.json has no say. PATH is a table (JSONL, parquet, CSV) or a folder with train and test or
    validation; of a single table a fifth is the evaluation. Equal prompts stay together. The model gets no new head.
    """

    version: ClassVar[int] = 2
    capabilities: ClassVar[tuple[str, ...]] = ("text", "generation", "own data")
    measures: ClassVar[tuple[Metric, ...]] = MEASURES

    path: str = Field("", description="set by the task's name, generation:PATH")
    prompt: str = Field("prompt", description="column of the prompts")
    response: str = Field("response", description="column of the responses")
    template: str = Field("{prompt}\n", description="what the model reads; {prompt} stands for the prompt")
    configuration: str = Field("default", description="of a Hub dataset")
    max_length: int = Field(256, ge=8, description="tokens kept of an example; the prompt is cut at its end")
    max_response: int = Field(64, ge=1, description="most tokens of a response, the end token included")
    metric: Literal["rougeL", "rouge1", "exact_match"] = Field("rougeL", description="the score")

    @model_validator(mode="after")
    def _consistent(self) -> Generation:
        if self.template.count(PROMPT) != 1:
            raise ValueError(f"template = {self.template!r} is not allowed: it should hold {PROMPT} once")
        if self.max_response >= self.max_length:
            raise ValueError(f"max_response = {self.max_response} should be below max_length = {self.max_length}")
        return self

    @property
    def headline(self) -> str:
        return self.metric

    @property
    def metric_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([self.metric, *(metric.name for metric in self.measures)]))

    def load(self, data_root: str | None) -> tuple[Examples, dict[str, Examples]]:
        columns = [self.prompt, self.response]
        if own.is_local(self.path):
            splits: dict[str, Rows] = {**own.read_own(self.path, [self.prompt], self, self.response)}
        else:
            splits = {"train": read_split(self.path, self.configuration, "train", columns, data_root)}
            split = first_split(self.path, self.configuration, own.EVALUATIONS, data_root)
            if split is not None:
                splits[split] = read_split(self.path, self.configuration, split, columns, data_root)
        train, evaluation = own.with_evaluation({name: self._examples(rows) for name, rows in splits.items()})
        for name, examples in evaluation.items():
            if self.metric != "exact_match" and not any(map(words, examples.columns["response"])):
                raise InputError(
                    f"metric = {self.metric} counts words, and no response of split '{name}' has one; "
                    "metric=exact_match fits",
                    "metric",
                )
        return train, evaluation

    def _examples(self, rows: Rows) -> Examples:
        """Labels number the different responses; see `gold` for what is compared."""
        prompts, responses = rows.texts(self.prompt), rows.texts(self.response)
        labels = group_numbers(responses).astype("float64")  # no classes
        groups, notes = own.text_groups([prompts, responses])
        read = rows.notes if isinstance(rows, own.OwnRows) else ()
        if len(set(responses)) == 1:
            notes = (*notes, "every response is the same text: the scores tell nothing of a method")
        return Examples({"prompt": prompts, "response": responses}, labels, groups, notes=(*read, *notes))

    def encode(self, examples: Examples, model: str | None) -> EncodedPairs:
        """Token ids of every row; kept on disk, so that all runs share them."""
        name = self.model_name(model)
        settings = (self.max_length, self.max_response, self.template)
        return EncodedPairs(
            **cached(
                "pairs",
                (pretrained.fingerprint(name), *settings, fingerprint_of(pairs=examples)),
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
        if lost := int((~encoded.written).sum()):
            notes.append(f"{lost:,} responses have signs that the tokenizer cannot write: no exact_match there")
        responses = encoded.responses
        if self.metric != "exact_match" and (line := counting(responses)):
            notes.append(line)
        return {"truncated_share": round(float(encoded.cut.mean()), 6)} | ({"notes": notes} if notes else {})

    def gold(self, examples: Examples, encoded: EncodedPairs) -> np.ndarray:
        """The whole responses, without end tokens of their own, as `_packed` has texts; int16."""
        import numpy as np

        responses = encoded.responses
        return _packed(responses, [0] * len(responses), [1] * len(responses), np.int16)

    def collate(self, encoded: EncodedPairs, rows: Sequence[int], generator: torch.Generator | None) -> Batch:
        """See `CausalTask`; in evaluations the prompts too, `prompt_ids` and `prompt_mask`, padded on the left."""
        prompts, filler = encoded.prompts[list(rows)], int(encoded.padding[0])
        wholes = [encoded.rows[row] for row in rows]
        batch = training_batch(wholes, prompts, filler)
        if generator is None:
            found = padded([whole[:size] for whole, size in zip(wholes, prompts, strict=True)], filler, left=True)
            batch.inputs["prompt_ids"], batch.inputs["prompt_mask"] = map(tensor, found)
        return batch

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, 2 + bytes of the longest), float32: see `_packed`."""
        import numpy as np
        import torch

        sums, counts = response_losses(model, batch)
        check_finite(sums)
        tokenizer = tokenizer_of(model)
        ids = _generated(model, tokenizer, batch, max_new_tokens=self.max_response).tolist()
        end = tokenizer.eos_token_id
        texts = decoded(tokenizer, [row[: row.index(end)] if end in row else row for row in ids])
        return torch.from_numpy(_packed(texts, sums.tolist(), counts.tolist(), np.float32)).to(sums.device)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of each row the mean loss of the response, and the logits of its first token as generation has them."""
        import torch

        sums, counts = response_losses(model, batch)
        found = _generated(
            model, tokenizer_of(model), batch, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
        )
        return torch.cat([(sums / counts)[:, None], found.logits[0].float()], dim=1)


def _generated(model: nn.Module, tokenizer: Any, batch: Batch, **settings: Any) -> Any:
    """Token ids (rows, tokens) of the greedy answers to the batch's prompts, filled up after an end token; or what
    `settings` make `generate` return."""
    from transformers import GenerationConfig

    prompts = batch.inputs["prompt_ids"]
    filler = filler_of(tokenizer)
    greedy = GenerationConfig(do_sample=False, pad_token_id=filler, eos_token_id=tokenizer.eos_token_id, **settings)
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


def _packed(texts: Sequence[str], nats: Sequence[float], counts: Sequence[int], kind: type) -> np.ndarray:
    """Texts and their losses as one array of a `kind` of number, one row each: summed cross-entropy in nats, number of
    tokens, then the text's UTF-8 bytes and -1 after its end."""
    import numpy as np

    encoded = [text.encode() for text in texts]
    rows: np.ndarray = np.full((len(texts), 2 + max(map(len, encoded))), -1, dtype=kind)
    rows[:, 0], rows[:, 1] = nats, counts
    for row, text in zip(rows, encoded, strict=True):
        row[2 : 2 + len(text)] = np.frombuffer(text, dtype=np.uint8)
    return rows


def _texts(rows: np.ndarray) -> list[str]:
    """The texts of `_packed` rows."""
    import numpy as np

    return [row[row >= 0].astype(np.uint8).tobytes().decode() for row in rows[:, 2:]]
