"""The metrics equal scikit-learn's, SciPy's and the formulas, and never warn."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import pytest

from harness.errors import Diverged, InputError
from harness.metric import METRICS
from tasks.metrics import scores

CLASS_METRICS = ("accuracy", "f1", "matthews_correlation")
VALUE_METRICS = ("pearson", "spearmanr")


def random_classes(seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    references = generator.integers(0, 2, size=int(generator.integers(10, 200)))
    wrong = generator.random(len(references)) < generator.uniform(0, 0.6)
    return np.where(wrong, 1 - references, references), references


def random_values(seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    references = generator.integers(0, 11, size=int(generator.integers(10, 200))) / 2  # with ties, as STS-B has
    return references * generator.normal() + generator.normal(size=len(references)), references.astype(np.float64)


def ranks(values: np.ndarray) -> np.ndarray:
    """Places in ascending order, ties sharing their mean place."""
    return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])


def correlation(one: np.ndarray, two: np.ndarray) -> float:
    one, two = one - one.mean(), two - two.mean()
    return float((one * two).sum() / math.sqrt((one**2).sum() * (two**2).sum()))


@pytest.mark.parametrize("seed", range(20))
def test_class_metrics_are_the_formulas(seed):
    predicted, actual = random_classes(seed)
    found = scores(CLASS_METRICS, predicted, actual)
    hits, false, missed = (int(((predicted == p) & (actual == a)).sum()) for p, a in ((1, 1), (1, 0), (0, 1)))
    assert found["accuracy"] == pytest.approx((predicted == actual).mean())
    assert found["f1"] == pytest.approx(2 * hits / (2 * hits + false + missed))
    # For two classes Matthews' coefficient is Pearson's of the 0/1 variables.
    assert found["matthews_correlation"] == pytest.approx(correlation(predicted, actual))


@pytest.mark.parametrize("seed", range(20))
def test_class_metrics_are_scikit_learns(seed):
    from sklearn import metrics

    predicted, actual = random_classes(seed)
    found = scores(CLASS_METRICS, predicted, actual)
    assert found["accuracy"] == metrics.accuracy_score(actual, predicted)
    assert found["f1"] == metrics.f1_score(actual, predicted)
    assert found["matthews_correlation"] == metrics.matthews_corrcoef(actual, predicted)


@pytest.mark.parametrize("seed", range(20))
def test_value_metrics_are_scipys_and_the_formulas(seed):
    from scipy.stats import pearsonr, spearmanr

    predicted, actual = random_values(seed)
    found = scores(VALUE_METRICS, predicted, actual)
    assert found["pearson"] == pearsonr(predicted, actual).statistic == pytest.approx(correlation(predicted, actual))
    assert found["spearmanr"] == spearmanr(predicted, actual).statistic
    assert found["spearmanr"] == pytest.approx(correlation(ranks(predicted), ranks(actual)))


def test_accuracy_of_three_classes():
    assert scores(("accuracy",), np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])) == {"accuracy": 0.75}


@pytest.mark.parametrize("constant", [0, 1])
@pytest.mark.parametrize("actual", [np.array([0, 1, 1, 0, 1]), np.zeros(5, dtype=int), np.ones(5, dtype=int)])
def test_constant_classes(constant, actual):
    found = scores(CLASS_METRICS, np.full(5, constant), actual)
    share = (actual == 1).mean()
    assert found["matthews_correlation"] == 0.0
    assert found["accuracy"] == (actual == constant).mean()
    assert found["f1"] == pytest.approx(2 * share / (1 + share) if constant == 1 else 0.0)


def test_constant_and_nearly_constant_values():
    actual = np.linspace(0, 5, 20)
    assert scores(VALUE_METRICS, np.full(20, 2.5), actual) == {"pearson": 0.0, "spearmanr": 0.0}
    assert scores(VALUE_METRICS, actual, np.full(20, 2.5)) == {"pearson": 0.0, "spearmanr": 0.0}
    found = scores(VALUE_METRICS, 1.0 + np.arange(20) % 2 * 1e-15, actual)  # SciPy warns of this one
    assert all(math.isfinite(value) for value in found.values())


def test_single_precision_predictions_are_not_rounded_further():
    predicted = np.array([0.1, 0.2, 0.4, 0.3], dtype=np.float32)
    found = scores(("pearson",), predicted, np.array([0.0, 1.0, 3.0, 2.0]))
    assert found["pearson"] == pytest.approx(1.0, abs=1e-6)


def test_wrong_arguments():
    with pytest.raises(InputError, match=r"unknown metric 'acuracy'\. Did you mean 'accuracy'"):
        scores(("acuracy",), np.zeros(2), np.zeros(2))
    with pytest.raises(ValueError, match="shape"):
        scores(("accuracy",), np.zeros(2), np.zeros(3))
    with pytest.raises(Diverged, match="1 predictions are not finite"):
        scores(("pearson",), np.array([0.0, math.nan]), np.array([0.0, 1.0]))


def test_it_is_an_evaluate_metric_that_leaves_no_file(tmp_path: Path, monkeypatch):
    import evaluate

    init, metrics = evaluate.Metric.__init__, []

    def watched(metric, *given, **named):
        metrics.append(metric)
        init(metric, *given, **named)

    monkeypatch.setattr(evaluate.Metric, "__init__", watched)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    predicted, actual = (np.tile(values, 200) for values in random_classes(0))
    scores(tuple(METRICS), predicted, actual)
    assert len(metrics) == 1
    assert list(tmp_path.iterdir()) == []
