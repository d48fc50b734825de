"""Labels of the user's own data: one rule for what is a class and what a value, over all splits and file formats.

A column is numbers where every cell of every split is one, true/false where every cell is, else words. Columns that a
file itself calls strings are words, unless another split has them otherwise. Numbers without a fraction are classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Literal

from harness.errors import InputError, unknown
from tasks.tables import OwnRows

if TYPE_CHECKING:
    import numpy as np

MOST_CLASSES = 1000
LARGEST = 1e30  # size of a number to be predicted: losses are in float32
UNLABELLED = "-1"  # what benchmarks put in place of a label that is kept from the public

LabelKind = Literal["classes", "values"]
Form = Literal["numbers", "booleans", "words"]

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?inf(inity)?|nan", re.IGNORECASE)
TRUTH = {"True": "true", "TRUE": "true", "true": "true", "False": "false", "FALSE": "false", "false": "false"}


@dataclass(frozen=True)
class Labels:
    """The labels of every split in one form. cells: by split, each row's label as text; in a column of numbers "1" for
    1, 1.0 and "01", in one of booleans "true" for TRUE."""

    column: str
    form: Form
    cells: Mapping[str, Sequence[str]]
    sources: Mapping[str, str]

    @classmethod
    def of(cls, splits: Mapping[str, OwnRows], column: str) -> Labels:
        """The labels of these splits. Raises InputError for empty cells and for lists, dicts or binary data."""
        cells = {split: rows.cells(column) for split, rows in splits.items()}
        form = form_of(cells, all(rows.is_words(column) for rows in splits.values()))
        found = {}
        for split, rows in splits.items():
            texts = [None if cell is None else normalised(cell, form) for cell in cells[split]]
            rows.check_filled(column, sum(not text for text in texts), "empty or NaN" if form == "numbers" else "empty")
            found[split] = [text for text in texts if text is not None]
        return cls(column, form, found, {split: rows.source for split, rows in splits.items()})

    def kind(self) -> LabelKind:
        """Values where any number has a fraction."""
        numbers = set().union(*self.cells.values()) if self.form == "numbers" else ()
        return "values" if any(not _is_whole(text) for text in numbers) else "classes"

    def classes(self) -> tuple[str, ...]:
        """The classes of the training split in order: numbers by size, words by letter; a class's place is its number.

        Raises InputError for one class or too many.
        """
        where = f"{self.sources['train']}: column '{self.column}' holds"
        names = sorted(set(self.cells["train"]), key=float if self.form == "numbers" else str)
        if len(names) < 2:
            raise InputError(f"{where} one class, '{names[0]}'; it should hold two or more")
        if len(names) > MOST_CLASSES:
            raise InputError(
                f"{where} {len(names):,} different values; allowed are {MOST_CLASSES:,} "
                "classes (for numbers to be predicted: labels=values)"
            )
        return tuple(names)

    def numbered(self, split: str, classes: Sequence[str]) -> np.ndarray:
        """(rows,) int64 places in `classes`, or float64 values where there are none. Raises InputError for other
        labels."""
        import numpy as np

        texts = self.cells[split]
        where = f"column '{self.column}' of {self.sources[split]}"
        if not classes:
            if self.form != "numbers":
                odd = next(text for text in texts or self.cells["train"] if not NUMBER.fullmatch(text.strip()))
                raise InputError(f"{where} holds '{odd}'; it should hold numbers: {-LARGEST:g} to {LARGEST:g}")
            values = np.array([float(text) for text in texts], dtype=np.float64)
            if (wrong := ~(np.abs(values) <= LARGEST)).any():
                raise InputError(f"{where} holds {values[wrong][0]:g}; allowed is {-LARGEST:g} to {LARGEST:g}")
            return values
        numbers = {normalised(name, self.form): number for number, name in enumerate(classes)}
        for text in texts:
            if text not in numbers:
                raise unknown(f"class in {where}:", text, classes)
        return np.array([numbers[text] for text in texts], dtype=np.int64)


def form_of(cells: Mapping[str, Iterable[str | None]], words: bool) -> Form:
    """What the cells of all splits are; `words`: their files call them strings."""
    texts = {text for split in cells.values() for text in split if text is not None}
    if words or not texts:
        return "words"
    if all(NUMBER.fullmatch(text.strip()) for text in texts):
        return "numbers"
    return "booleans" if texts <= TRUTH.keys() else "words"


def normalised(text: str, form: Form) -> str | None:
    """The text of a label in its form; None for NaN, which is an empty cell."""
    if form == "booleans":
        return TRUTH.get(text, text)
    if form == "words" or not NUMBER.fullmatch(text := text.strip()):
        return text
    if "n" in text.lower():  # nan, inf
        return None if float(text) != float(text) else str(float(text))
    value = float(text)
    if abs(value) < LARGEST and (number := Decimal(text)) == number.to_integral_value():
        return str(int(number))
    return repr(value)


def _is_whole(text: str) -> bool:
    return text.lstrip("-").isdigit()


def unlabelled(splits: Mapping[str, OwnRows], column: str) -> dict[str, str]:
    """Splits other than "train" whose labels are kept from the public, and why it is thought so: they have no such
    column, it is empty, or every label is -1 where no training label is."""
    found = {}
    training = {normalised(cell, "numbers") for cell in splits["train"].cells(column) if cell is not None}
    for split, rows in splits.items():
        if split == "train":
            continue
        if column not in rows.table.column_names:
            found[split] = f"has no column '{column}'"
            continue
        cells = rows.cells(column)
        if not any(cells):
            found[split] = f"has nothing in column '{column}'"
        elif UNLABELLED not in training and all(cell and normalised(cell, "numbers") == UNLABELLED for cell in cells):
            found[split] = f"has {UNLABELLED} for every label in column '{column}'"
    return found
