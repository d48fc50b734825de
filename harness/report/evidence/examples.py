"""A run's score as a mean over examples, from its kept predictions: what paired statistics are made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness.storage import Damaged


class _Additive(NamedTuple):
    """A metric that is a function of sums over examples. `parts`: (predictions, references) -> (examples, k);
    `of_sums`: (..., k) sums, the first of them the number of examples -> (...) scores."""

    parts: Callable[[np.ndarray, np.ndarray], np.ndarray]
    of_sums: Callable[[np.ndarray], np.ndarray]


def example_scores(path: Path, split: str, metric: str, score: float, rows: int | None = None) -> np.ndarray | None:
    """(examples,) values of one run whose mean is its score: right or wrong for the accuracy, for other metrics the
    jackknife's pseudo-values n f(all) - (n - 1) f(all but i), moved so that their mean is `score`.

    `path`: the run's predictions, `split`: the evaluation split the score is on, `rows`: of it (None: not known). None
    where the values cannot be had: the metric is not known here as a function of sums (accuracy, f1,
    matthews_correlation of two classes, pearson, spearmanr with the ranks held fixed), or does not give the run's
    score. Raises OSError, and Damaged where the file does not hold finite predictions and references, (rows,) both.
    """
    if metric not in METRICS:
        return None
    predictions, references = _read(path, split, rows)
    additive, n = METRICS[metric], len(predictions)
    if n < 2:
        return None
    with np.errstate(all="ignore"):  # huge values are no error: they do not give the score
        try:
            parts = additive.parts(predictions, references)
        except ValueError:
            return None
        sums = parts.sum(axis=0)
        if not abs(float(additive.of_sums(sums)) - score) <= 1e-6:
            return None
        values = n * score - (n - 1) * additive.of_sums(sums - parts)
        return values - values.mean() + score


def _read(path: Path, split: str, rows: int | None) -> list[np.ndarray]:
    """Predictions and references. Shapes are looked at before anything is loaded. Raises OSError and Damaged."""
    from safetensors import SafetensorError, safe_open

    names = [f"{split}/predictions", f"{split}/references"]
    try:
        with safe_open(path, framework="numpy") as file:
            shapes = [tuple(file.get_slice(name).get_shape()) for name in names]
            expected = shapes[0] if rows is None else (rows,)
            if len(expected) != 1 or any(shape != expected for shape in shapes):
                raise Damaged(f"'{names[0]}' and '{names[1]}' have shapes {shapes[0]} and {shapes[1]}")
            found = [file.get_tensor(name) for name in names]
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:  # no such name, or a type NumPy lacks
        raise Damaged(" ".join(str(error).split())) from None
    for name, values in zip(names, found, strict=True):
        if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
            raise Damaged(f"'{name}' holds something else than finite numbers")
    return found


def _ones(*columns: np.ndarray) -> np.ndarray:
    return np.stack([np.ones(len(columns[0])), *columns], axis=1).astype(np.float64)


def _right(predictions: np.ndarray, references: np.ndarray) -> np.ndarray:
    return _ones(predictions == references)


def _counts(predictions: np.ndarray, references: np.ndarray) -> np.ndarray:
    """(examples, 4): 1, predicted, actual, both, of class 1. Raises ValueError for more than two classes."""
    if not (np.isin(predictions, (0, 1)).all() and np.isin(references, (0, 1)).all()):
        raise ValueError("more than two classes")
    return _ones(predictions, references, predictions * references)


def _moments(predictions: np.ndarray, references: np.ndarray) -> np.ndarray:
    x, y = (values.astype(np.float64) for values in (predictions, references))
    x, y = x - x.mean(), y - y.mean()  # no digits lost in the squares
    return _ones(x, y, x * y, x * x, y * y)


def _ranks(predictions: np.ndarray, references: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    return _moments(rankdata(predictions), rankdata(references))


def _accuracy(sums: np.ndarray) -> np.ndarray:
    return sums[..., 1] / sums[..., 0]


def _f1(sums: np.ndarray) -> np.ndarray:
    _, predicted, actual, both = np.moveaxis(sums, -1, 0)
    return _ratio(2 * both, predicted + actual)


def _matthews(sums: np.ndarray) -> np.ndarray:
    n, predicted, actual, both = np.moveaxis(sums, -1, 0)
    return _ratio(n * both - predicted * actual, np.sqrt(predicted * (n - predicted) * actual * (n - actual)))


def _correlation(sums: np.ndarray) -> np.ndarray:
    n, x, y, xy, xx, yy = np.moveaxis(sums, -1, 0)
    spread = np.clip((xx - x * x / n) * (yy - y * y / n), 0, None)
    return _ratio(xy - x * y / n, np.sqrt(spread))


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """0 where nothing is below the line, as the tasks count it."""
    return np.divide(over, under, out=np.zeros(np.shape(over)), where=np.asarray(under) > 0)


METRICS = {
    "accuracy": _Additive(_right, _accuracy),
    "f1": _Additive(_counts, _f1),
    "matthews_correlation": _Additive(_counts, _matthews),
    "pearson": _Additive(_moments, _correlation),
    "spearmanr": _Additive(_ranks, _correlation),
}
