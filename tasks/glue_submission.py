"""GLUE's submission: eleven tab-separated files of index and prediction, as gluebenchmark.com takes them in one zip."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from harness.errors import InputError

if TYPE_CHECKING:
    import numpy as np

SIMILARITY_RANGE = (0.0, 5.0)  # of STS-B's predictions


class TestFile(NamedTuple):
    """One file of the submission: its name, the test split behind it, the rows of the official set, whether it holds
    classes by name, and what stands in every row where no run is on the task."""

    name: str
    task: str
    split: str
    rows: int
    by_name: bool
    filler: str


TEST_FILES = (  # WNLI and the diagnostic set AX are no tasks here; the site wants their files all the same
    TestFile("CoLA.tsv", "glue/cola", "test", 1063, False, "0"),
    TestFile("SST-2.tsv", "glue/sst2", "test", 1821, False, "0"),
    TestFile("MRPC.tsv", "glue/mrpc", "test", 1725, False, "0"),
    TestFile("STS-B.tsv", "glue/stsb", "test", 1379, False, "0.000"),
    TestFile("MNLI-m.tsv", "glue/mnli", "test_matched", 9796, True, "entailment"),
    TestFile("MNLI-mm.tsv", "glue/mnli", "test_mismatched", 9847, True, "entailment"),
    TestFile("QNLI.tsv", "glue/qnli", "test", 5463, True, "entailment"),
    TestFile("QQP.tsv", "glue/qqp", "test", 390965, False, "0"),
    TestFile("RTE.tsv", "glue/rte", "test", 3000, True, "entailment"),
    TestFile("WNLI.tsv", "glue/wnli", "test", 146, False, "0"),
    TestFile("AX.tsv", "glue/ax", "test", 1104, True, "entailment"),
)


def files(
    predictions: Mapping[str, Mapping[str, np.ndarray]], classes: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, str], list[str]]:
    """(the eleven files, content by name; what is to be said of them), from predictions by task and split.

    `classes`: the names of a task's classes by number, none for regression. A file without predictions is filled with a
    constant. Raises InputError where a split is missing, the number of predictions is not that of the official test
    set, or one of them is no class, or no number.
    """
    content, filled = {}, []
    for file in TEST_FILES:
        splits = predictions.get(file.task)
        if splits is None:
            filled.append(file.name)
            content[file.name] = _table([file.filler] * file.rows)
            continue
        if file.split not in splits:
            raise InputError(
                f"{file.name} needs '{file.split}'; the run on {file.task} has {', '.join(splits) or 'none'}"
            )
        found = splits[file.split]
        if len(found) != file.rows:
            raise InputError(
                f"{file.name} would have {len(found):,} rows; the official test set of {file.task} has {file.rows:,}"
            )
        _check(file, found, classes[file.task])
        content[file.name] = _table(_written(found, classes[file.task], file.by_name))
    note = f"no run given for {', '.join(filled)}: every row there holds a constant, so their scores mean nothing"
    return content, [note] if filled else []


def _check(file: TestFile, predictions: np.ndarray, classes: tuple[str, ...]) -> None:
    if classes and predictions.dtype.kind not in "iu":
        raise InputError(f"{file.name}: the predictions are {predictions.dtype}, not numbers of classes")
    fit = (predictions >= 0) & (predictions < len(classes)) if classes else abs(predictions) < float("inf")
    if not fit.all():
        wanted = f"a class from 0 to {len(classes) - 1}" if classes else "a finite number"
        raise InputError(f"{file.name}: the prediction {predictions[~fit][0]} is not {wanted}")


def _written(predictions: np.ndarray, classes: tuple[str, ...], by_name: bool) -> Iterable[str]:
    if not classes:
        return (f"{value:.3f}" for value in predictions.clip(*SIMILARITY_RANGE).tolist())
    return (classes[number] if by_name else str(number) for number in predictions.tolist())


def _table(values: Iterable[str]) -> str:
    return "index\tprediction\n" + "".join(f"{index}\t{value}\n" for index, value in enumerate(values))
