"""The user's own data: which tables are which splits, how a fifth is cut off for the evaluation, labels and metrics.

PATH is a table, or a folder that holds `train.csv` (or .tsv, .jsonl, .parquet, train-*.parquet) and, where there are
any, `test` and `validation` tables beside it. Of a single table a fifth of the rows is cut off for the evaluation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import InputError, unknown
from harness.splits import holdout_rows, stratified_rows
from harness.task import Examples
from tasks.delimited import PLAIN
from tasks.hub import check_shards
from tasks.labels import LabelKind, Labels, unlabelled
from tasks.metrics import scores
from tasks.tables import SUFFIXES, OwnRows, TableFile, read_table
from tasks.text import group_numbers

if TYPE_CHECKING:
    import numpy as np

__all__ = ["LabelKind", "Labels", "OwnRows", "TableFile"]

EVALUATIONS = {
    "test": ("test",),
    "validation": ("validation", "valid", "val", "dev"),
}  # the first there gives the score
SPLITS = {  # names of files and folders, in any case, also with "set" after them: training_set
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
}
NO_HUB_ID = (*SUFFIXES, ".json", ".txt", ".xlsx", ".xls", ".zip", ".gz")  # endings of files
EVALUATION_SHARE = 0.2  # of a single table

CLASS_METRICS = ("accuracy", "macro_f1", "matthews_correlation")
BINARY_METRICS = ("accuracy", "f1", "matthews_correlation")
VALUE_METRICS = ("pearson", "spearmanr", "r2")


def read_own(
    path: str, columns: Sequence[str], options: TableFile | None = None, label: str | None = None
) -> dict[str, OwnRows]:
    """The splits at PATH with these columns: "train", then "test" and "validation" as far as they are there.

    `label` is a further column. An evaluation split without labels is left out, with a note of "train". Raises
    InputError where there is no such file or folder, it holds no table, a table is damaged or a column missing.
    """
    wanted = [*columns, *([label] if label else [])]

    def read(split: str, files: tuple[Path, ...], options: TableFile | None) -> OwnRows:
        if split == "train" or label is None:
            return read_table(files, wanted, options=options)
        rows = read_table(files, [], wanted, options)
        if label in (present := rows.table.column_names) and set(present) < set(wanted):
            read_table(files, wanted, options=options)  # tells which column is missing
        return rows

    found = table_files(path)
    splits = {split: read(split, files, options) for split, files in found.items()}
    if any(PLAIN in rows.notes for rows in splits.values()):  # then in all: one text must not be two
        plain = TableFile(encoding=options.encoding if options else "utf-8", quoting="plain")
        for split, rows in splits.items():
            if PLAIN not in rows.notes:
                with contextlib.suppress(InputError):  # it does not fit: what is quoting there is plain to see
                    splits[split] = read(split, found[split], plain)
    splits["train"] = _noted(splits["train"], *_not_read(path))
    return labelled(splits, label) if label else splits


def labelled(splits: Mapping[str, OwnRows], label: str) -> dict[str, OwnRows]:
    """The splits that have labels; a note of "train" names the others."""
    without = unlabelled(splits, label)
    kept = {split: rows for split, rows in splits.items() if split not in without}
    # Without the folder: a record is the same wherever the data are.
    names = {split: Path(splits[split].source.strip("'")).name for split in without}
    notes = [f"'{names[split]}' is left out, not scored on: it {why}" for split, why in without.items()]
    return {**kept, "train": _noted(kept["train"], *notes)}


def _noted(rows: OwnRows, *notes: str) -> OwnRows:
    return dataclasses.replace(rows, notes=(*rows.notes, *notes))


def _not_read(path: str) -> list[str]:
    """What the path has of tables that are not read."""
    place = Path(path).expanduser()
    if place.is_file():
        part = re.search(r"-of-0*([2-9]|[1-9]\d+)\.parquet$", place.name)
        return [f"'{place.name}' is one of {part[1]} parts; the folder is the path of all"] if part else []
    used = {file for files in table_files(path).values() for file in files}
    others = sorted(file.name for file in _visible(place) if file.suffix.lower() in SUFFIXES and file not in used)
    return [f"tables that are no split are left out: {', '.join(others[:8])}"] if others else []


def table_files(path: str) -> dict[str, tuple[Path, ...]]:
    """The table files at PATH by split. Raises InputError where there are none."""
    place = Path(path).expanduser()
    if place.is_file():
        return {"train": (place,)}
    if not place.is_dir():
        raise missing(path)
    found = tables_in(place)
    if "train" not in found:
        present = ", ".join(sorted(child.name for child in place.iterdir())[:12]) or "nothing"
        raise InputError(f"folder '{path}' has no table 'train' ({', '.join(SUFFIXES)}); it holds: {present}", path)
    return found


def tables_in(folder: Path) -> dict[str, tuple[Path, ...]]:
    """The table of each split that a folder holds, or the shards of its parquet. Raises InputError for several tables
    of a split, and for missing shards."""
    found: dict[str, dict[str, list[Path]]] = {split: {} for split in SPLITS}
    for file in sorted(_visible(folder)):
        if file.suffix.lower() not in SUFFIXES or file.is_dir():
            continue
        if split := split_of(file.stem):
            found[split].setdefault(file.name, []).append(file)
        elif file.suffix.lower() == ".parquet" and (split := split_of(file.name.partition("-")[0])):
            found[split].setdefault("shards", []).append(file)
    for tables in found.values():
        if len(tables) > 1:
            listed = ", ".join(f"'{file.name}'" for files in tables.values() for file in files)
            raise InputError(f"folder '{folder}' holds more than one table of a split: {listed}; keep one", str(folder))
        check_shards(tables.get("shards", []))
    return {split: tuple(files) for split, tables in found.items() for files in tables.values()}


def split_of(name: str) -> str | None:
    """The split that a file or folder of this name holds, as far as one can tell: "Training_Set" is "train"."""
    word = re.sub(r"[\W_]+", "", name.lower())
    words = (word, re.sub(r"(set|split|data|images)$", "", word))
    return next((split for split, names in SPLITS.items() if not set(names).isdisjoint(words)), None)


def is_system(name: str) -> bool:
    """Whether a file or folder is the operating system's or an editor's, whatever its suffix."""
    return name.startswith((".", "__MACOSX", "@eaDir", "$RECYCLE.BIN")) or name.lower() in (
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "icon\r",
        "lost+found",
        "system volume information",
    )


def _visible(folder: Path) -> list[Path]:
    return [child for child in folder.iterdir() if not is_system(child.name)]


def is_local(path: str) -> bool:
    """Whether PATH is a file or folder here, or is written as one, and no dataset's id on the Hub (owner/name)."""
    written = path.startswith((".", "~", "/")) or path.lower().endswith(NO_HUB_ID)
    return written or path.count("/") != 1 or Path(path).expanduser().exists()


def missing(path: str) -> InputError:
    """What to say of a path at which there is nothing."""
    place = Path(path).expanduser()
    if place.exists():
        return InputError(f"'{path}' is neither a regular file nor a folder: give a table or a folder", path)
    there = next(parent for parent in place.absolute().parents if parent.exists())
    if there != place.absolute().parent:
        hint = f" (nor is the folder '{place.parent}')"
    else:
        near = difflib.get_close_matches(place.name, [child.name for child in there.iterdir()], n=1, cutoff=0.6)
        hint = f" (nearest: '{place.parent / near[0]}')" if near else ""
    return InputError(f"'{path}' is not there{hint}: give a table ({', '.join(SUFFIXES)}) or a folder", path)


def text_groups(texts: Sequence[Sequence[str]]) -> tuple[np.ndarray, tuple[str, ...]]:
    """((rows,) group numbers, notes) of rows by their columns of texts: rows with an equal first text share a group.

    Where half of the rows or more have one and the same first text, it tells little of them: then rows share a group
    whose texts are all equal.
    """
    import numpy as np

    groups = group_numbers(texts[0])
    most = int(np.bincount(groups).max())
    if len(texts) == 1 or 2 * most < len(groups):
        return groups, ()
    note = f"{most:,} rows share one first text: rows are kept together by all of their texts"
    return group_numbers(list(zip(*texts, strict=True))), (note,)


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
    the evaluation where there is none; each class in its proportion."""
    import numpy as np

    train = splits.pop("train")
    one_class = np.issubdtype(train.labels.dtype, np.integer) and len(np.unique(train.labels)) < 2
    if train.groups is not None and len(train) > 1 and len(np.unique(train.groups)) < 2:
        raise InputError(
            f"all {len(train):,} training rows belong together (one text or prompt, or one value of `group`), so that "
            "none of them can be held out: give another column"
        )
    if not splits and len(train) and not one_class:
        cut = stratified_rows if np.issubdtype(train.labels.dtype, np.integer) else holdout_rows
        rest, held = cut(train, EVALUATION_SHARE, len(train))
        evaluation = dataclasses.replace(train.select(held), notes=("cut off from the training rows",))
        train, splits = train.select(rest), {"validation": evaluation}
    if one_class:
        raise InputError("the training rows hold one class: at least two are needed")
    return train, splits


def described(values: dict[str, Any], splits: Callable[[], Mapping[str, OwnRows]]) -> dict[str, Any]:
    """A task's parameters with what follows from its labels written out: "labels", "classes" and "metric".

    `values` has the column "label". A run's spec holds them, so that the record says how labels were mapped.
    """
    found: Labels | None = None
    if values.get("labels") is None or (values["labels"] == "classes" and values.get("classes") is None):
        found = Labels.of(splits(), values["label"])
    if values.get("labels") is None:
        assert found is not None
        values = {**values, "labels": "classes" if values.get("classes") else found.kind()}
    if values["labels"] == "values" and values.get("classes"):
        raise InputError("labels = values and classes are both given; give one of them", "classes")
    if values.get("classes") is None:
        values = {**values, "classes": list(found.classes()) if found and values["labels"] == "classes" else []}
    allowed = metrics_for(values["classes"])
    if values.get("metric") is None:
        values = {**values, "metric": allowed[0]}
    if values["metric"] not in allowed:
        raise unknown("metric", str(values["metric"]), allowed)
    return values


def scored(
    metric: str | None, classes: Sequence[str] | None, predictions: np.ndarray, references: np.ndarray
) -> dict[str, float]:
    """Every metric that fits the labels, the headline first."""
    return scores(metric_names(metric, classes), predictions, references)


def metric_names(metric: str | None, classes: Sequence[str] | None) -> tuple[str, ...]:
    """The metrics of a task, the headline first."""
    assert metric is not None
    return tuple(dict.fromkeys([metric, *metrics_for(classes or ())]))


def metrics_for(classes: Sequence[str]) -> tuple[str, ...]:
    """The metrics that fit the labels; the first is the default headline."""
    return VALUE_METRICS if not classes else BINARY_METRICS if len(classes) == 2 else CLASS_METRICS
