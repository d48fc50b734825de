"""GLUE (Wang et al., 2019): eight sentence and sentence-pair tasks, scored on their published validation sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from harness.errors import unknown
from harness.task import Examples
from tasks.hub import read_split
from tasks.metrics import scores
from tasks.text import TextClassification, group_numbers

if TYPE_CHECKING:
    import numpy as np

REPOSITORY = "nyu-mll/glue"
SIMILARITY_RANGE = (0.0, 5.0)  # of STS-B's labels


@dataclass(frozen=True)
class GlueTask:
    """One row of the table. The first column of texts is the group that the holdout keeps together; the first
    metric is the headline; `classes` are in the order of the Hub's label numbers, none for regression."""

    columns: tuple[str, ...]
    classes: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    evaluation: tuple[str, ...] = ("validation",)


PAIR = ("sentence1", "sentence2")
TABLE = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    "sst2": GlueTask(("sentence",), ("negative", "positive")),
    "mrpc": GlueTask(PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "stsb": GlueTask(PAIR, (), ("pearson", "spearmanr")),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        evaluation=("validation_matched", "validation_mismatched"),
    ),
    "qnli": GlueTask(("question", "sentence"), ("entailment", "not_entailment")),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "rte": GlueTask(PAIR, ("entailment", "not_entailment")),
}


class Glue(TextClassification):
    """GLUE's eight single-sentence and sentence-pair tasks; MNLI's score is on its matched set.

    Only the labelled splits are used: the hidden test sets are not on the Hub. The holdout keeps rows together that
    share their first text (MNLI's premise, QNLI's question, SST-2's repeated phrases).
    """

    members: ClassVar[tuple[str, ...]] = tuple(TABLE)
    default_model: ClassVar[str | None] = "microsoft/deberta-v3-base"
    capabilities: ClassVar[tuple[str, ...]] = ("text", "regression")

    member: str = Field("", description="which of the eight; the registry sets it from the task's name")

    @classmethod
    def of(cls, values: dict[str, Any], owner: str) -> Self:
        _check_member(values.get("member", ""))
        return super().of(values, owner)

    @model_validator(mode="after")
    def _known_member(self) -> Self:
        _check_member(self.member)
        return self

    @property
    def table(self) -> GlueTask:
        """This task's row of the table."""
        return TABLE[self.member]

    @property
    def headline(self) -> str:
        return self.table.metrics[0]

    @property
    def num_labels(self) -> int:
        return len(self.table.classes) or 1

    def load(self, data_root: str | None) -> tuple[Examples, dict[str, Examples]]:
        return self._split("train", data_root), {name: self._split(name, data_root) for name in self.table.evaluation}

    def _split(self, split: str, data_root: str | None) -> Examples:
        rows = read_split(REPOSITORY, self.member, split, [*self.table.columns, "label"], data_root)
        columns = {name: rows.texts(name) for name in self.table.columns}
        labels = (
            rows.classes("label", self.table.classes) if self.table.classes else rows.values("label", *SIMILARITY_RANGE)
        )
        return Examples(columns, labels, group_numbers(columns[self.table.columns[0]]))

    def metrics(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return scores(self.table.metrics, predictions, references)


def _check_member(member: str) -> None:
    if member not in TABLE:
        raise unknown("task", f"glue/{member}", [f"glue/{name}" for name in TABLE])
