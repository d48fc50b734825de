"""Texts or text pairs of your own, with classes or numbers to predict: `--tasks "text:reviews.csv[label=stars]"`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field

from harness.task import Examples
from tasks import own, pretrained
from tasks.text import TextClassification, group_numbers

if TYPE_CHECKING:
    import numpy as np


class OwnText(TextClassification, own.TableFile):
    """Your own texts or text pairs, called as text:PATH (CSV, TSV, JSONL, parquet, or a folder of them).

    A folder holds train.csv and, as far as there are any, test.csv and validation.csv (any case; also training, valid,
    val, dev, eval, testing); the score is on test, else on validation. Of a single table a fifth of the rows is the
    evaluation split, each class in its proportion. Rows with an equal first text, or `group`, stay together (pairs:
    with both texts equal, where half of the rows or more have one first text). What is read is said before the runs.

    the file holds                 as a text              as a label
    words, "01" in JSONL, parquet  as they stand          class; also number or true/false where another split's are
    whole numbers: 1, 1.0, 01, 1e2 as they stand          class: all four are of one form, "1", "1", "1", "100"
    a number with a fraction       as it stands           value to predict (all labels then are), unless labels=classes
    TRUE, True, true               as it stands           class "true", where all are true or false
    dates and times                as they stand          class
    categories                     their words            as their words or numbers
    an empty cell, NaN in numbers  refused                refused ("NA" is a word; "" in JSONL is a text, no label)
    lists, records, binary data    refused                refused: one label a row
    test labels all -1 or empty                           the split is left out, not scored on
    "as it stands" is as in the CSV, TSV or JSONL; of numbers and dates in parquet their usual form is the text.
    """

    version: ClassVar[int] = 2
    default_model: ClassVar[str | None] = pretrained.PACKAGED_MODEL
    capabilities: ClassVar[tuple[str, ...]] = ("text", "regression", "own data")
    stratified: ClassVar[bool] = True

    path: str = Field("", description="set by the task's name, text:PATH")
    text: tuple[str, ...] = Field(
        ("text",), min_length=1, max_length=2, description='column of the texts; two for pairs: ["question","answer"]'
    )
    label: str = Field("label", description="column of the labels")
    group: str | None = Field(None, description="column whose equal values never go into different splits")
    labels: own.LabelKind | None = Field(None, description="classes or values to predict; null: see the table above")
    classes: tuple[str, ...] | None = Field(
        None, description="the classes, in the order of their numbers; null: as in the data"
    )
    metric: str | None = Field(
        None, description="the score; null: accuracy of classes, pearson of values; also f1, macro_f1, r2 and others"
    )

    @classmethod
    def of(cls, values: dict[str, Any], owner: str) -> Self:
        """As `Strict.of`; what is null is looked up in the data. Raises InputError for what is wrong with them."""
        if isinstance(values.get("text"), str):
            values = {**values, "text": [values["text"]]}
        given = super().of(values, owner)  # wrong names and types are told before the data are read
        return super().of(own.described(given.model_dump(mode="json"), given._rows), owner)

    @property
    def headline(self) -> str:
        assert self.metric is not None
        return self.metric

    @property
    def metric_names(self) -> tuple[str, ...]:
        return own.metric_names(self.metric, self.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes or ()

    def load(self, data_root: str | None) -> tuple[Examples, dict[str, Examples]]:
        """As `Task.load`; `data_root` is not used."""
        splits = self._rows()
        labels = own.Labels.of(splits, self.label)
        return own.with_evaluation({name: self._examples(name, rows, labels) for name, rows in splits.items()})

    def _rows(self) -> dict[str, own.OwnRows]:
        return own.read_own(self.path, [*self.text, *([self.group] if self.group else [])], self, self.label)

    def _examples(self, split: str, rows: own.OwnRows, labels: own.Labels) -> Examples:
        columns = {name: rows.texts(name) for name in self.text}
        groups, notes = own.text_groups(list(columns.values()))
        if self.group:
            groups = own.joined(groups, group_numbers(rows.texts(self.group)))
        notes = (*rows.notes, *rows.typed_notes(self.text), *notes)
        return Examples(columns, labels.numbered(split, self.classes or ()), groups, notes=notes)

    def metrics(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return own.scored(self.metric, self.classes, predictions, references)
