"""GLUE (Wang et al., 2019): eight sentence and sentence-pair tasks, scored on their published validation sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from harness.errors import InputError
from harness.splits import holdout_rows
from harness.task import Examples
from tasks import glue_submission
from tasks.family import FamilyTask
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
    test: tuple[str, ...] = ("test",)


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
        test=("test_matched", "test_mismatched"),
    ),
    "qnli": GlueTask(("question", "sentence"), ("entailment", "not_entailment")),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "rte": GlueTask(PAIR, ("entailment", "not_entailment")),
}
# What the papers' tables print for a task, where it is more than the headline: the average counts their mean.
PRINTED = {"qqp": ("accuracy", "f1")}


class Glue(FamilyTask, TextClassification):
    """GLUE's eight single-sentence and sentence-pair tasks; MNLI's score is on its matched set.

    The test sets' labels are not public: `run --predict-test` keeps predictions for them and `export-glue` makes the
    submission of them. The holdout keeps rows together that
    share their first text (MNLI's premise, QNLI's question, SST-2's repeated phrases).
    """

    family: ClassVar[str] = "glue"
    members: ClassVar[tuple[str, ...]] = tuple(TABLE)
    default_model: ClassVar[str | None] = "microsoft/deberta-v3-base"
    capabilities: ClassVar[tuple[str, ...]] = ("text", "regression")

    member: str = Field("", description="which of the eight; the registry sets it from the task's name")
    reserved: int = Field(
        0,
        ge=0,
        description="training rows that no run trains on or selects by, as a further evaluation split: "
        "a smaller error of measurement where the validation set is small",
    )

    @property
    def table(self) -> GlueTask:
        """This task's row of the table."""
        return TABLE[self.member]

    @property
    def headline(self) -> str:
        return self.table.metrics[0]

    @property
    def metric_names(self) -> tuple[str, ...]:
        return self.table.metrics

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.table.classes

    def load(self, data_root: str | None) -> tuple[Examples, dict[str, Examples]]:
        train = self._split("train", data_root)
        evaluation = {name: self._split(name, data_root) for name in self.table.evaluation}
        if self.reserved:
            if self.reserved > len(train) // 2:
                raise InputError(
                    f"reserved = {self.reserved} is more than half of the {len(train):,} training rows of "
                    f"glue/{self.member}: at most {len(train) // 2:,} are allowed",
                    "reserved",
                )
            rest, held = holdout_rows(train, 1.0, self.reserved)
            train, evaluation["reserved"] = train.select(rest), train.select(held)
        return train, evaluation

    def test(self, data_root: str | None) -> dict[str, Examples]:
        """The unlabelled test splits, in the order of their `idx`."""
        import numpy as np

        found = {}
        for split in self.table.test:
            rows = read_split(REPOSITORY, self.member, split, [*self.table.columns, "idx"], data_root)
            labels = np.zeros(len(rows.table), dtype=np.int64 if self.table.classes else np.float64)
            examples = Examples({name: rows.texts(name) for name in self.table.columns}, labels)
            found[split] = examples.select(np.argsort(rows.table.column("idx").to_numpy(), kind="stable"))
        return found

    @classmethod
    def submission(cls, predictions: Mapping[str, Mapping[str, np.ndarray]]) -> tuple[dict[str, str], list[str]]:
        """The eleven files that gluebenchmark.com asks for; see `Task.submission`."""
        classes = {f"glue/{member}": row.classes for member, row in TABLE.items()}
        return glue_submission.files(predictions, classes)

    @classmethod
    def average(cls, metrics: Mapping[str, Mapping[str, float]]) -> float | None:
        """The mean over the eight tasks of what the papers' tables print: the headline metric (MNLI's on its matched
        set), for QQP the mean of accuracy and F1. None unless all eight are there."""
        if not set(TABLE) <= set(metrics):
            return None
        printed = {member: PRINTED.get(member, row.metrics[:1]) for member, row in TABLE.items()}
        return sum(sum(metrics[member][name] for name in names) / len(names) for member, names in printed.items()) / 8

    def _split(self, split: str, data_root: str | None) -> Examples:
        rows = read_split(REPOSITORY, self.member, split, [*self.table.columns, "label"], data_root)
        columns = {name: rows.texts(name) for name in self.table.columns}
        labels = (
            rows.classes("label", self.table.classes) if self.table.classes else rows.values("label", *SIMILARITY_RANGE)
        )
        return Examples(columns, labels, group_numbers(columns[self.table.columns[0]]))

    def metrics(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return scores(self.table.metrics, predictions, references)
