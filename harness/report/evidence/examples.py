"""A run's score as a mean over examples, from its kept predictions: what paired statistics are made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from harness.metric import Metric, declared
from harness.record.record import HOLDOUT, at
from harness.storage import Damaged

# The metric of a task's name and its own; None where nobody declares it.
FindMetric = Callable[[str, str], Metric | None]


def common(task: str, name: str) -> Metric | None:
    """The common metric of this name, whatever the task declares."""
    return declared(name)


def example_scores(
    path: Path, split: str, metric: Metric, score: float, rows: int | None = None, cut: int | None = None
) -> np.ndarray | None:
    """(examples,) values of one run whose mean is its score: where the metric is a mean over examples their own
    scores, for others the jackknife's pseudo-values n f(all) - (n - 1) f(all but i), moved so that their mean is
    `score`.

    `path`: the run's predictions, `split`: the one that the score is on, `rows`: of it (None: not known), `cut`: the
    rank that the adapter was cut to for the score (None: it was not). None where the values cannot be had: the metric
    is not declared as a function of sums, is none of these predictions, or does not give the run's score. Raises
    OSError (FileNotFoundError, too, where an older run kept nothing of its holdout or of this rank), and Damaged where
    the file does not hold finite predictions and references, (rows, ...) both.
    """
    if metric.parts is None or metric.of_sums is None:
        return None
    predictions, references = _read(path, split, rows, cut)
    n = len(predictions)
    if n < 2:
        return None
    with np.errstate(all="ignore"):  # huge values are no error: they do not give the score
        try:
            parts = metric.parts(predictions, references)
        except (ValueError, TypeError, IndexError):  # these are no predictions that the metric is of
            return None
        sums = parts.sum(axis=0)
        if not abs(float(metric.of_sums(sums)) - score) <= 1e-6:
            return None
        values = n * score - (n - 1) * metric.of_sums(sums - parts)
        return values - values.mean() + score


def _read(path: Path, split: str, rows: int | None, cut: int | None) -> list[np.ndarray]:
    """Predictions and references. Shapes are looked at before anything is loaded. Raises OSError and Damaged."""
    from safetensors import SafetensorError, safe_open

    names = [f"{split}/predictions" if cut is None else f"{split}/{at(cut)}", f"{split}/references"]
    older_lack = names if split == HOLDOUT else names[:1] if cut is not None else []
    try:
        with safe_open(path, framework="numpy") as file:
            if older_lack and not {*older_lack} & {*file.keys()}:
                raise FileNotFoundError(f"no '{names[0]}'")
            shapes = [tuple(file.get_slice(name).get_shape()) for name in names]
            lengths = {shape[:1] for shape in shapes}
            if () in lengths or len(lengths) != 1 or (rows is not None and lengths != {(rows,)}):
                raise Damaged(f"'{names[0]}' and '{names[1]}' have shapes {shapes[0]} and {shapes[1]}")
            found = [file.get_tensor(name) for name in names]
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:  # no such name, or a type NumPy lacks
        raise Damaged(" ".join(str(error).split())) from None
    for name, values in zip(names, found, strict=True):
        if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
            raise Damaged(f"'{name}' holds something else than finite numbers")
    return found
