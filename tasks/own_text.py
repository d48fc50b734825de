"""Texts or text pairs of your own, with classes or numbers to predict: `--tasks "text:reviews.csv[label=stars]"`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field

from harness.task import Examples
from tasks import own, pretrained
from tasks.hub import Rows
from tasks.text import TextClassification, group_numbers

if TYPE_CHECKING:
    import numpy as np


class OwnText(TextClassification):
    """Your own texts or text pairs, called as text:PATH (CSV, TSV, JSONL, parquet, or a folder of them).

    A folder holds train.csv and, as far as there are any, test.csv and validation.csv; the score is on the first of
    them. Of a single table a fifth of the rows is the evaluation split; rows that share their first text, or their
    `group`, stay together. Whole numbers, words and true/false are classes, numbers with a fraction are values.
    """

    default_model: ClassVar[str | None] = pretrained.PACKAGED_MODEL
    capabilities: ClassVar[tuple[str, ...]] = ("text", "regression", "own data")

    path: str = Field("", description="set by the task's name, text:PATH")
    text: tuple[str, ...] = Field(
        ("text",), min_length=1, max_length=2, description='column of the texts; two for pairs: ["question","answer"]'
    )
    label: str = Field("label", description="column of the labels")
    group: str | None = Field(None, description="column whose equal values never go into different splits")
    labels: own.LabelKind | None = Field(None, description="classes or values to predict; null: by the column's type")
    classes: tuple[str, ...] | None = Field(
        None, description="the classes, in the order of their numbers; null: as in the data"
    )
    metric: str | None = Field(
        None, description="the score; null: accuracy of classes, pearson of values; also f1, macro_f1, r2 and others"
    )

    @classmethod
    def of(cls, values: dict[str, Any], owner: str) -> Self:
        """As `Parameters.of`; what is null is looked up in the data. Raises InputError for what is wrong with them."""
        if isinstance(values.get("text"), str):
            values = {**values, "text": [values["text"]]}
        given = super().of(values, owner)  # wrong names and types are told before the data are read
        found = own.described(given.model_dump(mode="json"), lambda: own.read_own(given.path, given.columns)["train"])
        return super().of(found, owner)

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        return [*self.text, self.label, *([self.group] if self.group else [])]

    @property
    def headline(self) -> str:
        assert self.metric is not None
        return self.metric

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes or ()

    def load(self, data_root: str | None) -> tuple[Examples, dict[str, Examples]]:
        """As `Task.load`; `data_root` is not used."""
        splits = own.read_own(self.path, self.columns)
        return own.with_evaluation({name: self._examples(rows) for name, rows in splits.items()})

    def _examples(self, rows: Rows) -> Examples:
        columns = {name: rows.texts(name) for name in self.text}
        groups = group_numbers(columns[self.text[0]])
        if self.group:
            groups = own.joined(groups, group_numbers(rows.filled(self.group).to_pylist()))
        return Examples(columns, own.labels_of(rows, self.label, self.classes or ()), groups)

    def metrics(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return own.scored(self.metric, self.classes, predictions, references)
