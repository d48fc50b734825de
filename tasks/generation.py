"""A causal language model that learns to answer prompts: instructions, summaries, your own pairs of texts."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from harness.errors import InputError
from harness.metric import Metric, mean_of
from harness.task import Examples
from tasks import own
from tasks.answers import PERPLEXITY, AnswerTask, each
from tasks.hub import Rows, first_split, read_split
from tasks.pairs import EncodedPairs
from tasks.rouge import counting, rouge, words
from tasks.text import group_numbers

MEASURES = (
    mean_of("rougeL", each(lambda guess, truth: rouge(guess, truth, longest=True))),
    mean_of("rouge1", each(lambda guess, truth: rouge(guess, truth, longest=False))),
    mean_of("exact_match", each(lambda guess, truth: guess.strip() == truth.strip()), right_or_wrong=True),
    PERPLEXITY,
)


class Generation(AnswerTask, own.TableFile):
    """Prompts and responses for a causal language model, called as generation:PATH (or a Hub dataset's id).

    The loss is on the response alone (its tokens and the end token): the mean over its tokens, then over examples.
    In an evaluation the response is generated greedily, up to the tokenizer's end token, and compared with the whole
    true one: exact_match, rouge1 and rougeL; perplexity is that of the true responses. The model's own
    generation_config.json has no say. PATH is a table (JSONL, parquet, CSV) or a folder with train and test or
    validation; of a single table a fifth is the evaluation. Equal prompts stay together. The model gets no new head.
    """

    version: ClassVar[int] = 3
    capabilities: ClassVar[tuple[str, ...]] = ("text", "generation", "own data")
    measures: ClassVar[tuple[Metric, ...]] = MEASURES

    path: str = Field("", description="set by the task's name, generation:PATH")
    prompt: str = Field("prompt", description="column of the prompts")
    response: str = Field("response", description="column of the responses")
    configuration: str = Field("default", description="of a Hub dataset")
    metric: Literal["rougeL", "rouge1", "exact_match"] = Field("rougeL", description="the score")

    @property
    def headline(self) -> str:
        return self.metric

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

    def facts(self, encoded: EncodedPairs) -> dict[str, Any]:
        """As `AnswerTask.facts`, and what bears on the metrics."""
        found = super().facts(encoded)
        notes = [*found.pop("notes", ())]
        if lost := int((~encoded.written).sum()):
            notes.append(f"{lost:,} responses have signs that the tokenizer cannot write: no exact_match there")
        if self.metric.startswith("rouge") and (line := counting(encoded.responses)):
            notes.append(line)
        return found | ({"notes": notes} if notes else {})
