"""The user's own data: tables (CSV, TSV, JSONL, parquet) and folders of images, their splits and their labels.

PATH is a table, or a folder that holds `train.csv` (or .tsv, .jsonl, .parquet, train-*.parquet) and, where there are
any, `test` and `validation` tables beside it. Of a single table a fifth of the rows is cut off for the evaluation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.errors import InputError, unknown
from harness.task import Examples, holdout_rows
from tasks.hub import Rows, check_columns, read_parquet
from tasks.metrics import scores

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
EVALUATIONS = {
    "test": ("test",),
    "validation": ("validation", "valid", "val", "dev"),
}  # the first there gives the score
EVALUATION_SHARE = 0.2  # of a single table
MOST_CLASSES = 1000
LARGEST = 1e30  # size of a number to be predicted: losses are in float32

LabelKind = Literal["classes", "values"]
CLASS_METRICS = ("accuracy", "macro_f1", "matthews_correlation")
BINARY_METRICS = ("accuracy", "f1", "matthews_correlation")
VALUE_METRICS = ("pearson", "spearmanr", "r2")


def read_own(path: str, columns: Sequence[str]) -> dict[str, Rows]:
    """The splits at PATH with these columns: "train", then "test" and "validation" as far as they are there.

    Raises InputError where there is no such file or folder, it holds no table, a table is damaged or a column missing.
    """
    return {split: read_tables(files, columns) for split, files in table_files(path).items()}


def table_files(path: str) -> dict[str, tuple[Path, ...]]:
    """The table files at PATH by split. Raises InputError where there are none."""
    place = Path(path).expanduser()
    if place.is_file():
        return {"train": (place,)}
    if not place.is_dir():
        what = "is neither a regular file nor a folder" if place.exists() else "is not there"
        raise InputError(f"'{path}' {what}: give a table ({', '.join(TABLES)}) or a folder", path)
    found = {"train": tables_named(place, ("train",))}
    found |= {split: tables_named(place, names) for split, names in EVALUATIONS.items()}
    if not found["train"]:
        present = ", ".join(sorted(child.name for child in place.iterdir())[:12]) or "nothing"
        raise InputError(f"folder '{path}' has no table 'train' ({', '.join(TABLES)}); it holds: {present}", path)
    return {split: files for split, files in found.items() if files}


def tables_named(folder: Path, names: Sequence[str]) -> tuple[Path, ...]:
    """The one table of a split, or the shards of one parquet, or none. Raises InputError for several tables."""
    single = [file for name in names for suffix in TABLES if (file := folder / f"{name}{suffix}").is_file()]
    shards = sorted(file for name in names for file in folder.glob(f"{name}-*.parquet"))
    if len(single) + bool(shards) > 1:
        listed = ", ".join(f"'{file.name}'" for file in [*single, *shards])
        raise InputError(f"folder '{folder}' holds more than one table of a split: {listed}; keep one", str(folder))
    return tuple(single or shards)


def read_tables(files: tuple[Path, ...], columns: Sequence[str]) -> Rows:
    """These columns of a table. Raises InputError where it is damaged, empty or lacks a column."""
    stamps = tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    table = _read(files, tuple(dict.fromkeys(columns)), stamps)
    if len(table) == 0:
        raise InputError(f"'{files[0]}' has no rows", str(files[0]))
    return Rows(table, f"'{files[0]}'")


@functools.lru_cache(maxsize=4)
def _read(files: tuple[Path, ...], columns: tuple[str, ...], stamps: tuple[tuple[int, int], ...]) -> pa.Table:
    """Kept while the files stay as they are: one command looks at its data several times."""
    import pyarrow as pa

    suffix = files[0].suffix.lower()
    if suffix == ".parquet":
        return read_parquet(list(files), columns, str(files[0].parent))
    readers: dict[str, Callable[[Path], pa.Table]] = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_json}
    if suffix not in readers:
        raise unknown(f"kind of table: '{files[0]}' ends in", suffix, TABLES)
    try:
        table = readers[suffix](files[0])
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"'{files[0]}' cannot be read as {suffix}: {str(error).splitlines()[0]}", files[0].name
        ) from None
    check_columns(columns, table.column_names, f"'{files[0]}'")
    return table.select(list(columns))


def _read_csv(path: Path) -> pa.Table:
    """Empty cells are missing; "NA" and its like are text."""
    from pyarrow import csv

    return csv.read_csv(
        path,
        parse_options=csv.ParseOptions(
            delimiter="\t" if path.suffix.lower() == ".tsv" else ",", newlines_in_values=True
        ),
        convert_options=csv.ConvertOptions(null_values=[""], strings_can_be_null=True),
    )


def _read_json(path: Path) -> pa.Table:
    from pyarrow import json

    return json.read_json(path, parse_options=json.ParseOptions(newlines_in_values=False))


def label_kind(rows: Rows, column: str) -> LabelKind:
    """Numbers with a fraction are values to predict; whole numbers, words and true/false are classes."""
    import pyarrow as pa

    return "values" if pa.types.is_floating(rows.table.schema.field(column).type) else "classes"


def class_names(rows: Rows, column: str) -> tuple[str, ...]:
    """The classes of a column in order (numbers by size, words by letter), as text; a class's place is its number.

    Raises InputError for one class or too many.
    """
    import pyarrow.compute as pc

    values = sorted(pc.unique(rows.filled(column)).to_pylist())
    if len(values) < 2:
        raise InputError(f"{rows.source}: column '{column}' holds one class, '{values[0]}'; it should hold two or more")
    if len(values) > MOST_CLASSES:
        raise InputError(
            f"{rows.source}: column '{column}' holds {len(values):,} different values; allowed are {MOST_CLASSES:,} "
            "classes (for numbers to be predicted: labels=values)"
        )
    return tuple(_as_text(value) for value in values)


def labels_of(rows: Rows, column: str, classes: Sequence[str]) -> np.ndarray:
    """(rows,) int64 places in `classes`, or float64 values where there are none. Raises InputError for other labels."""
    import numpy as np

    if not classes:
        return rows.values(column, -LARGEST, LARGEST)
    numbers = {name: number for number, name in enumerate(classes)}
    texts = [_as_text(value) for value in rows.filled(column).to_pylist()]
    for text in texts:
        if text not in numbers:
            raise unknown(f"class in column '{column}' of {rows.source}:", text, classes)
    return np.array([numbers[text] for text in texts], dtype=np.int64)


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def joined(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(rows,) group numbers: rows that share a number of either kind, also by way of other rows, share one. Both kinds
    are counted from 0."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    size = int(one.max() + other.max() + 2)
    links = coo_array((one == one, (one, one.max() + 1 + other)), shape=(size, size))
    return connected_components(links, directed=False)[1][one]


def with_evaluation(splits: dict[str, Examples]) -> tuple[Examples, dict[str, Examples]]:
    """(training rows, evaluation splits): a fifth of the training rows, whole groups only and the same every time, is
    the evaluation where there is none."""
    import numpy as np

    train = splits.pop("train")
    if not splits:
        rest, held = holdout_rows(train, EVALUATION_SHARE, len(train))
        train, splits = train.select(rest), {"validation": train.select(held)}
    if np.issubdtype(train.labels.dtype, np.integer) and len(np.unique(train.labels)) < 2:
        raise InputError("the training rows hold one class: at least two are needed")
    return train, splits


def described(values: dict[str, Any], rows: Callable[[], Rows]) -> dict[str, Any]:
    """A task's parameters with what follows from its labels written out: "labels", "classes" and "metric".

    `values` has the column "label". A run's spec holds them, so that the record says how labels were mapped.
    """
    values = {**values, "labels": values.get("labels") or label_kind(rows(), values["label"])}
    if values["labels"] == "values" and values.get("classes"):
        raise InputError("labels = values and classes are both given; give one of them", "classes")
    if values.get("classes") is None:
        values["classes"] = list(class_names(rows(), values["label"])) if values["labels"] == "classes" else []
    allowed = metrics_for(values["classes"])
    if values.get("metric") is None:
        values["metric"] = allowed[0]
    if values["metric"] not in allowed:
        raise unknown("metric", str(values["metric"]), allowed)
    return values


def scored(
    metric: str | None, classes: Sequence[str] | None, predictions: np.ndarray, references: np.ndarray
) -> dict[str, float]:
    """Every metric that fits the labels, the headline first."""
    assert metric is not None
    return scores(list(dict.fromkeys([metric, *metrics_for(classes or ())])), predictions, references)


def metrics_for(classes: Sequence[str]) -> tuple[str, ...]:
    """The metrics that fit the labels; the first is the default headline."""
    return VALUE_METRICS if not classes else BINARY_METRICS if len(classes) == 2 else CLASS_METRICS
