"""Multiple choice for a causal language model: the choice that it finds most likely."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from harness.metric import Metric, mean_of
from harness.splits import fingerprint_of
from harness.task import Batch, Examples
from tasks import pretrained
from tasks.cache import cached
from tasks.causal import CausalTask, check_finite, training_batch
from tasks.choice_sources import SOURCES, Question
from tasks.choices import EncodedChoices, choices_batch, log_likelihoods, tokenized_choices
from tasks.family import FamilyTask
from tasks.text import group_numbers

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

ACCURACY = mean_of("accuracy", lambda chosen, right: chosen[:, 0] == right[:, 0], right_or_wrong=True)
BY_LENGTH = mean_of("accuracy_by_length", lambda chosen, right: chosen[:, 1] == right[:, 1], right_or_wrong=True)


class MultipleChoice(FamilyTask, CausalTask):
    """Multiple-choice questions: ARC, OpenBookQA, BoolQ, HellaSwag, PIQA, WinoGrande.

    The model learns the text of the right choice; the prompt has no loss. In an evaluation the choice with the largest
    log-likelihood counts: the sum over its tokens (accuracy), or the sum divided by the characters of its text
    (accuracy_by_length). These are acc and acc_norm of lm-evaluation-harness, whose prompts and splits these are; the
    score is its first, acc. Questions may have unequal numbers of choices. The holdout is cut from the training rows,
    and a validation split beside a test split is not read. The model gets no new head.
    """

    family: ClassVar[str] = "multiple_choice"
    members: ClassVar[tuple[str, ...]] = tuple(SOURCES)
    capabilities: ClassVar[tuple[str, ...]] = ("text",)
    measures: ClassVar[tuple[Metric, ...]] = (ACCURACY, BY_LENGTH)

    member: str = Field("", description="which data set; the registry sets it from the task's name")
    max_length: int = Field(256, ge=8, description="tokens kept of an example; the prompt loses its beginning")
    metric: Literal["accuracy", "accuracy_by_length"] = Field("accuracy", description="the score")

    @property
    def headline(self) -> str:
        return self.metric

    def load(self, data_root: str | None) -> tuple[Examples, dict[str, Examples]]:
        source = SOURCES[self.member]
        train = _examples(source.read("train", data_root))
        return train, {source.evaluation: _examples(source.read(source.evaluation, data_root))}

    def encode(self, examples: Examples, model: str | None) -> EncodedChoices:
        """Token ids of every question; kept on disk, so that all runs share them."""
        name = self.model_name(model)
        return EncodedChoices(
            **cached(
                "choices",
                (pretrained.fingerprint(name), self.max_length, fingerprint_of(choices=examples)),
                ("transformers", "tokenizers"),
                lambda: tokenized_choices(examples, name, self.max_length, f"{self.family}/{self.member}"),
            )
        )

    def lengths(self, encoded: EncodedChoices) -> np.ndarray:
        """(questions,) tokens of the longest context with its choice."""
        import numpy as np

        whole = encoded.contexts.lengths[encoded.context_of] + encoded.choices.lengths
        return np.maximum.reduceat(whole, encoded.first[:-1])

    def facts(self, encoded: EncodedChoices) -> dict[str, Any]:
        """The share of questions whose context lost tokens; how many choices there are, where questions differ."""
        import numpy as np

        sizes, counts = np.unique(np.diff(encoded.first), return_counts=True)
        listed = ", ".join(f"{size} ({count:,})" for size, count in zip(sizes, counts, strict=True))
        notes = {"notes": [f"questions by their number of choices: {listed}"]} if len(sizes) > 1 else {}
        return {"truncated_share": round(float(encoded.cut.mean()), 6)} | notes

    def gold(self, examples: Examples, encoded: EncodedChoices) -> np.ndarray:
        """(questions, 2) the place of the right choice, for either metric."""
        import numpy as np

        return np.stack([examples.labels] * 2, axis=1)

    def collate(self, encoded: EncodedChoices, rows: Sequence[int], generator: torch.Generator | None) -> Batch:
        """In training the contexts with their right choices, see `CausalTask`; else all choices, see
        `choices_batch`."""
        if generator is None:
            return choices_batch(encoded, rows)
        return training_batch(*encoded.right_rows(rows), int(encoded.padding[0]))

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """(questions, 2) places of the most likely choice, by sum and by sum over characters; the first of equals."""
        import torch

        found = log_likelihoods(model, batch)
        check_finite(found)
        places = [_of_questions(values, batch).argmax(1) for values in (found, found / batch.inputs["characters"])]
        return torch.stack(places, dim=1)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """(questions, 2) the log-likelihoods of the first choice and of the likeliest."""
        import torch

        found = _of_questions(log_likelihoods(model, batch), batch)
        return torch.stack([found[:, 0], found.amax(1)], dim=1)


def _examples(questions: Sequence[Question]) -> Examples:
    import numpy as np

    columns = {
        "contexts": [question.contexts for question in questions],
        "choices": [question.choices for question in questions],
    }
    labels = np.array([question.right for question in questions], dtype=np.int64)
    return Examples(columns, labels, group_numbers([question.group for question in questions]))


def _of_questions(values: Tensor, batch: Batch) -> Tensor:
    """(questions, most choices) of (choices,) values, filled up with minus infinity."""
    question = batch.inputs["question"]
    counts = question.bincount(minlength=len(batch.labels))
    place = question.new_ones(len(question)).cumsum(0) - 1 - (counts.cumsum(0) - counts)[question]
    found = values.new_full((len(counts), int(counts.max())), -float("inf"))
    found[question, place] = values
    return found
