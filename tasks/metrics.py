"""The metrics of the text tasks, as an `evaluate.Metric` that needs no Hub (`evaluate.load("glue")` does)."""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from harness.errors import Diverged, unknown

if TYPE_CHECKING:
    import numpy as np


def scores(names: Sequence[str], predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """The metrics `names` of predictions against references, both (rows,).

    accuracy; f1 (of class 1; 0 where class 1 is neither predicted nor there); macro_f1 (mean of every class's f1);
    matthews_correlation; pearson; spearmanr; r2 (1 - squared error over variance). A correlation with something
    constant is not defined and counts as 0; so does r2 where the references are constant and not met.

    Raises InputError for an unknown name, ValueError for unequal lengths, Diverged for predictions that are not
    finite.
    """
    import numpy as np

    for name in names:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
    if predictions.shape != references.shape:
        raise ValueError(f"predictions have shape {predictions.shape}, references {references.shape}")
    if not np.isfinite(predictions).all():
        raise Diverged(f"{int((~np.isfinite(predictions)).sum())} predictions are not finite")
    kind = "int64" if np.issubdtype(references.dtype, np.integer) else "float64"
    with tempfile.TemporaryDirectory() as folder:  # evaluate makes a folder even where it keeps rows in memory
        metric = _metric_class()(kind, keep_in_memory=True, cache_dir=folder, seed=0)
        return metric.compute(predictions=predictions, references=references, names=tuple(names))


@functools.cache
def _metric_class() -> Callable[..., Any]:
    """The `evaluate.Metric` subclass, made at first use because importing evaluate takes seconds."""
    import datasets
    import evaluate
    import numpy as np

    class Scores(evaluate.Metric):
        """Its configuration is the columns' type: "int64" classes or "float64" values."""

        def _info(self) -> evaluate.MetricInfo:
            column = datasets.Value(self.config_name)
            return evaluate.MetricInfo(
                description="Accuracy, F1, R2, Matthews, Pearson and Spearman correlation.",
                citation="",
                inputs_description="predictions, references: classes or values; names: the metrics wanted.",
                features=datasets.Features({"predictions": column, "references": column}),
            )

        def _compute(self, predictions: Any, references: Any, names: tuple[str, ...]) -> dict[str, float]:
            predicted, actual = np.asarray(predictions), np.asarray(references)
            return {name: float(METRICS[name](predicted, actual)) for name in names}

    return Scores


def _accuracy(predicted: np.ndarray, actual: np.ndarray) -> float:
    from sklearn.metrics import accuracy_score

    return accuracy_score(actual, predicted)


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


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "matthews_correlation": _matthews,
    "pearson": _pearson,
    "spearmanr": _spearman,
    "r2": _r2,
}
