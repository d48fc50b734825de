"""Metrics: name, sense, value, and what the paired test takes of each example. A metric is declared here or by its task
(`Task.measures`), and nowhere else."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.errors import Diverged

if TYPE_CHECKING:
    import numpy as np

Value = Callable[["np.ndarray", "np.ndarray"], float]
Parts = Callable[["np.ndarray", "np.ndarray"], "np.ndarray"]


@dataclass(frozen=True)
class Metric:
    """A score of predictions against references, both with the rows first, as `Task.predict` and `Task.gold` give them.

    name: as records, tables and the command line have it.
    value: (predictions, references) -> the score.
    higher_is_better: its sense.
    parts, of_sums: the score as a function of sums over examples, from which the paired test takes each example's share
    by the jackknife. `parts`: (predictions, references) -> (rows, k), the first of k being 1; it raises ValueError
    where the score is no such function of them. `of_sums`: sums (..., k) -> scores (...). None: tested on seeds alone.
    right_or_wrong: it is the share of examples that are right (or wrong), so that McNemar's test applies.
    of_class: the class that it is of, where it is of one alone.
    """

    name: str
    value: Value
    higher_is_better: bool = True
    parts: Parts | None = None
    of_sums: Callable[[np.ndarray], np.ndarray] | None = None
    right_or_wrong: bool = False
    of_class: int | None = None


def mean_of(name: str, each: Parts, higher_is_better: bool = True, right_or_wrong: bool = False) -> Metric:
    """The metric that is the mean of `each`: (predictions, references) -> (rows,) scores of the examples."""

    def value(predictions: np.ndarray, references: np.ndarray) -> float:
        return float(each(predictions, references).mean())

    def parts(predictions: np.ndarray, references: np.ndarray) -> np.ndarray:
        return _ones(each(predictions, references))

    return Metric(name, value, higher_is_better, parts, _mean, right_or_wrong)


def declared(name: str, measures: Iterable[Metric] = ()) -> Metric | None:
    """The metric of this name among a task's own, or else among the common ones; None for one that nobody declares."""
    return next((metric for metric in measures if metric.name == name), METRICS.get(name))


def finite(metrics: Mapping[str, float], where: str) -> dict[str, float]:
    """The metrics as plain numbers. Raises Diverged where one is not finite."""
    plain = {name: float(value) for name, value in metrics.items()}
    for name, value in plain.items():
        if not math.isfinite(value):
            raise Diverged(f"{name} is {value} on {where}")
    return plain


def _ones(*columns: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.stack([np.ones(len(columns[0])), *columns], axis=1).astype(np.float64)


def _mean(sums: np.ndarray) -> np.ndarray:
    return sums[..., 1] / sums[..., 0]


def _right(predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
    return predicted == actual


def _f1(predicted: np.ndarray, actual: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return f1_score(actual, predicted, zero_division=0)


def _macro_f1(predicted: np.ndarray, actual: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return f1_score(actual, predicted, average="macro", zero_division=0)


def _r2(predicted: np.ndarray, actual: np.ndarray) -> float:
    from sklearn.metrics import r2_score

    return r2_score(actual, predicted) if len(actual) > 1 else 0.0


def _matthews(predicted: np.ndarray, actual: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return 0.0 if _either_constant(predicted, actual) else matthews_corrcoef(actual, predicted)


def _pearson(predicted: np.ndarray, actual: np.ndarray) -> float:
    from scipy.stats import NearConstantInputWarning, pearsonr

    if _either_constant(predicted, actual):
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NearConstantInputWarning)  # an untrained model is nearly constant
        return pearsonr(predicted, actual).statistic


def _spearman(predicted: np.ndarray, actual: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return 0.0 if _either_constant(predicted, actual) else spearmanr(predicted, actual).statistic


def _either_constant(predicted: np.ndarray, actual: np.ndarray) -> bool:
    return bool((predicted == predicted[0]).all() or (actual == actual[0]).all())


def _counts(predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """(rows, 4): 1, predicted, actual, both, of class 1. Raises ValueError for more than two classes."""
    import numpy as np

    if not (np.isin(predicted, (0, 1)).all() and np.isin(actual, (0, 1)).all()):
        raise ValueError("more than two classes")
    return _ones(predicted, actual, predicted * actual)


def _moments(predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
    import numpy as np

    x, y = (values.astype(np.float64) for values in (predicted, actual))
    x, y = x - x.mean(), y - y.mean()  # no digits lost in the squares
    return _ones(x, y, x * y, x * x, y * y)


def _ranks(predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """As `_moments`, of the ranks, which the jackknife holds fixed."""
    from scipy.stats import rankdata

    return _moments(rankdata(predicted), rankdata(actual))


def _f1_of_sums(sums: np.ndarray) -> np.ndarray:
    import numpy as np

    _, predicted, actual, both = np.moveaxis(sums, -1, 0)
    return _ratio(2 * both, predicted + actual)


def _matthews_of_sums(sums: np.ndarray) -> np.ndarray:
    import numpy as np

    n, predicted, actual, both = np.moveaxis(sums, -1, 0)
    return _ratio(n * both - predicted * actual, np.sqrt(predicted * (n - predicted) * actual * (n - actual)))


def _correlation_of_sums(sums: np.ndarray) -> np.ndarray:
    import numpy as np

    n, x, y, xy, xx, yy = np.moveaxis(sums, -1, 0)
    spread = np.clip((xx - x * x / n) * (yy - y * y / n), 0, None)
    return _ratio(xy - x * y / n, np.sqrt(spread))


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """0 where nothing is below the line, as the values count it."""
    import numpy as np

    return np.divide(over, under, out=np.zeros(np.shape(over)), where=np.asarray(under) > 0)


ACCURACY = mean_of("accuracy", _right, right_or_wrong=True)
F1 = Metric("f1", _f1, parts=_counts, of_sums=_f1_of_sums, of_class=1)  # 0 where class 1 is neither predicted nor there
MACRO_F1 = Metric("macro_f1", _macro_f1)  # mean of every class's f1
MATTHEWS = Metric("matthews_correlation", _matthews, parts=_counts, of_sums=_matthews_of_sums)
PEARSON = Metric("pearson", _pearson, parts=_moments, of_sums=_correlation_of_sums)
SPEARMAN = Metric("spearmanr", _spearman, parts=_ranks, of_sums=_correlation_of_sums)
R2 = Metric("r2", _r2)  # 1 - squared error over variance
METRICS = {metric.name: metric for metric in (ACCURACY, F1, MACRO_F1, MATTHEWS, PEARSON, SPEARMAN, R2)}
