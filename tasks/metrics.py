"""The metrics of the text tasks, as an `evaluate.Metric` that needs no Hub (`evaluate.load("glue")` does)."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from harness.errors import Diverged, unknown
from harness.metric import METRICS

if TYPE_CHECKING:
    import numpy as np


def scores(names: Sequence[str], predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """The metrics `names` of predictions against references, both (rows,).

    accuracy; f1 (of class 1; 0 where class 1 is neither predicted nor there); macro_f1 (mean of every class's f1);
    matthews_correlation; pearson; spearmanr; r2 (1 - squared error over variance): see `harness.metric`. A correlation
    with something constant is not defined and counts as 0; so does r2 where the references are constant and not met.

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
            return {name: float(METRICS[name].value(predicted, actual)) for name in names}

    return Scores
