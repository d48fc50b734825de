"""Statistics against SciPy, hand-computed cases and simulated data whose truth is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from safetensors.numpy import save_file

from harness.metric import ACCURACY, MATTHEWS, METRICS, Metric, mean_of
from harness.record.record import PREDICTIONS
from harness.report.evidence.examples import example_scores
from harness.report.pictures.critical import cliques, mean_ranks, refusal
from harness.report.statistics import (
    Difference,
    crossed,
    holm,
    interquartile_mean,
    mcnemar,
    over_tasks,
    paired,
    probability_of_improvement,
)
from harness.storage import Damaged
from tests.support.report_records import board, record
from tests.support.report_records import predicted as write_predictions


def simulated(
    random: np.random.Generator, seeds: int, of_seed: float, of_example: float, rest: float, examples: int = 200
) -> np.ndarray:
    """(seeds, examples) differences whose true mean is 0."""
    return (
        of_seed * random.standard_normal((seeds, 1))
        + of_example * random.standard_normal((1, examples))
        + rest * random.standard_normal((seeds, examples))
    )


class TestIntervals:
    @pytest.mark.parametrize("seeds", [3, 5])
    @pytest.mark.parametrize(
        ("of_seed", "of_example", "rest"), [(0.05, 0.0, 0.3), (0.03, 0.3, 0.3), (0.0, 1.0, 1.0), (0.03, 1.0, 0.3)]
    )
    def test_crossed_covers(self, seeds: int, of_seed: float, of_example: float, rest: float) -> None:
        random = np.random.default_rng(seeds)
        found = [crossed(simulated(random, seeds, of_seed, of_example, rest)) for _ in range(600)]
        covered = [each is not None and each.interval[0] <= 0 <= each.interval[1] for each in found]
        assert 0.90 <= np.mean(covered) <= 0.99

    def test_percentile_bootstrap_does_not_which_is_why_there_is_none(self) -> None:
        random = np.random.default_rng(0)
        means = random.standard_normal((600, 3))
        draws = means[:, random.integers(0, 3, (400, 3))].mean(axis=2)
        low, high = np.quantile(draws, [0.025, 0.975], axis=1)
        assert np.mean((low <= 0) & (high >= 0)) < 0.8

    def test_seeds_alone_do_not_cover_new_examples(self) -> None:
        random = np.random.default_rng(0)
        found = [paired(simulated(random, 3, 0.03, 1.0, 0.3).mean(axis=1)) for _ in range(600)]
        assert np.mean([each is not None and each.interval[0] <= 0 <= each.interval[1] for each in found]) < 0.85

    def test_crossed_error_is_what_resampling_both_gives(self) -> None:
        """The pigeonhole bootstrap, on many seeds and examples, where it has no bias to speak of."""
        random = np.random.default_rng(1)
        values = simulated(random, 40, 0.2, 1.0, 0.5, examples=60)
        draws = [values[np.ix_(random.integers(0, 40, 40), random.integers(0, 60, 60))].mean() for _ in range(3000)]
        found = crossed(values)
        assert found is not None
        assert found.standard_error == pytest.approx(np.std(draws), rel=0.06)

    def test_crossed_without_examples_effect_is_the_paired_test(self) -> None:
        values = np.array([[0.1, 0.1], [0.2, 0.2], [0.6, 0.6]])
        found, by_seed = crossed(values), paired(values[:, 0])
        assert found is not None
        assert by_seed is not None
        assert found.standard_error == pytest.approx(by_seed.standard_error)
        assert found.degrees == pytest.approx(2)

    def test_paired_is_scipys(self) -> None:
        first, second = np.array([0.8, 0.82, 0.79, 0.85]), np.array([0.78, 0.81, 0.8, 0.8])
        found = paired(first - second)
        assert found is not None
        expected = scipy.stats.ttest_rel(first, second)
        assert found.p_value == pytest.approx(expected.pvalue)
        assert found.interval == pytest.approx(tuple(expected.confidence_interval()))

    def test_interval_excludes_zero_exactly_where_p_is_small(self) -> None:
        random = np.random.default_rng(2)
        for _ in range(50):
            found = crossed(simulated(random, 3, 0.05, 0.2, 0.3) + 0.1)
            assert found is not None
            assert (found.interval[0] > 0 or found.interval[1] < 0) == (found.p_value < 0.05)

    def test_detectable_difference_is_found_with_its_power(self) -> None:
        random = np.random.default_rng(3)
        noise = random.standard_normal((2000, 8))
        error = 1 / math.sqrt(8)
        expected = (scipy.stats.t.ppf(0.975, 7) + scipy.stats.t.ppf(0.8, 7)) * error
        found = [paired(row + expected) for row in noise]
        assert np.mean([each is not None and each.p_value < 0.05 for each in found]) == pytest.approx(0.8, abs=0.04)
        each = paired(noise[0])
        assert each is not None
        assert each.detectable == pytest.approx(expected * each.standard_error / error)

    def test_over_tasks_by_hand(self) -> None:
        found = over_tasks([Difference(0.1, 0.03, 2.0), Difference(0.3, 0.04, 4.0)])
        assert found is not None
        assert found.mean == pytest.approx(0.2)
        assert found.standard_error == pytest.approx(0.025)
        assert found.degrees == pytest.approx(25**2 / (9**2 / 2 + 16**2 / 4))
        alone = Difference(0.1, 0.03, 2.0)
        same = over_tasks([alone])
        assert same is not None
        assert same.interval == pytest.approx(alone.interval)
        assert over_tasks([alone, None]) is None
        assert over_tasks([]) is None

    @pytest.mark.parametrize("noise", [(0.03, 0.03, 0.03), (0.3, 0.03, 0.03)])
    def test_over_tasks_covers(self, noise: tuple[float, ...]) -> None:
        random = np.random.default_rng(6)
        found = [
            over_tasks([crossed(simulated(random, 3, of_seed, 0.3, 0.3)) for of_seed in noise]) for _ in range(600)
        ]
        covered = [each is not None and each.interval[0] <= 0 <= each.interval[1] for each in found]
        assert 0.90 <= np.mean(covered) <= 0.99

    @pytest.mark.parametrize("shape", [(1, 50), (3, 1), (0, 50)])
    def test_not_available(self, shape: tuple[int, int]) -> None:
        assert crossed(np.random.default_rng(0).standard_normal(shape)) is None
        assert paired(np.full(3, 0.1)) is None
        assert paired(np.zeros(1)) is None


class TestTests:
    def test_holm_by_hand(self) -> None:
        assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
        assert holm([0.9, 0.8]) == [1.0, 1.0]
        assert holm([]) == []

    @pytest.mark.parametrize(("first", "second"), [(0, 0), (5, 5), (1, 9), (12, 3)])
    def test_mcnemar_is_the_binomial_test(self, first: int, second: int) -> None:
        n = first + second
        expected = scipy.stats.binomtest(first, n).pvalue if n else 1.0
        assert mcnemar(first, second) == pytest.approx(expected)

    def test_probability_of_improvement_is_mann_whitneys(self) -> None:
        first, second = np.array([0.8, 0.9, 0.7]), np.array([0.75, 0.8])
        u = scipy.stats.mannwhitneyu(first, second).statistic
        assert probability_of_improvement([first], [second]) == pytest.approx(u / 6)
        assert probability_of_improvement([first, second], [second, first]) == pytest.approx(0.5)

    def test_interquartile_mean(self) -> None:
        runs = [np.array([0.0, 0.5]), np.array([0.6, 9.0]), np.array([0.7, 0.4]), np.array([0.1, 0.9])]
        mean, low, high = interquartile_mean(runs)
        assert mean == pytest.approx(scipy.stats.trim_mean(np.concatenate(runs), 0.25))
        assert low is not None
        assert high is not None
        assert low < mean < high
        assert interquartile_mean([np.array([0.5]), *runs])[1:] == (None, None)

    def test_interquartile_mean_covers(self) -> None:
        random = np.random.default_rng(4)
        centres = np.linspace(0.5, 0.9, 6)
        hits = 0
        for _ in range(150):
            _, low, high = interquartile_mean([centre + 0.03 * random.standard_normal(3) for centre in centres])
            hits += low is not None and high is not None and low <= 0.7 <= high
        assert 0.88 <= hits / 150 <= 0.99


def both(predictions: np.ndarray, references: np.ndarray) -> dict[str, np.ndarray]:
    return {"validation/predictions": predictions, "validation/references": references}


OF_EXAMPLES = {name: metric for name, metric in METRICS.items() if metric.parts is not None}


class TestExamples:
    @pytest.mark.parametrize("metric", OF_EXAMPLES.values(), ids=OF_EXAMPLES)
    def test_mean_is_the_score_and_spread_is_the_jackknifes(self, tmp_path: Path, metric: Metric) -> None:
        random = np.random.default_rng(0)
        references = random.integers(0, 2, 60)
        predictions = np.where(random.random(60) < 0.8, references, 1 - references)
        if metric.name in ("pearson", "spearmanr"):
            references, predictions = references + random.random(60), predictions + random.random(60)
        score = float(metric.value(predictions, references))
        write_predictions(tmp_path, predictions, references)
        values = example_scores(tmp_path / PREDICTIONS, "validation", metric, score, 60)
        assert values is not None
        assert values.mean() == pytest.approx(score)
        left_out = np.array([metric.value(np.delete(predictions, i), np.delete(references, i)) for i in range(60)])
        error = math.sqrt(59 / 60 * ((left_out - left_out.mean()) ** 2).sum())
        tolerance = 0.1 if metric.name == "spearmanr" else 1e-6  # its ranks are held fixed
        assert values.std(ddof=1) / math.sqrt(60) == pytest.approx(error, rel=tolerance)

    def test_a_mean_over_examples_gives_their_own_scores_whatever_a_prediction_is(self, tmp_path: Path) -> None:
        predictions, references = np.array([[1, 2], [3, 4], [5, 6]]), np.array([[1, 2, 0], [3, 0, 0], [0, 0, 0]])
        shared = mean_of("shared", lambda one, other: (one == other[:, :2]).mean(axis=1))
        write_predictions(tmp_path, predictions, references)
        values = example_scores(tmp_path / PREDICTIONS, "validation", shared, 0.5, 3)
        assert values == pytest.approx([1.0, 0.5, 0.0])

    def test_nothing_to_go_by(self, tmp_path: Path) -> None:
        path = tmp_path / PREDICTIONS
        with pytest.raises(OSError, match="No such file"):
            example_scores(path, "validation", ACCURACY, 0.5)
        write_predictions(tmp_path, np.array([0, 1, 2]), np.array([0, 1, 1]))
        assert example_scores(path, "validation", ACCURACY, 2 / 3) is not None
        assert example_scores(path, "validation", ACCURACY, 0.9) is None, "not this run's score"
        assert example_scores(path, "validation", MATTHEWS, 0.5) is None, "three classes"
        write_predictions(tmp_path, np.zeros((3, 1)), np.zeros((3, 1)))
        assert example_scores(path, "validation", ACCURACY, 1.0) is None, "no classes"
        assert example_scores(path, "validation", METRICS["r2"], 0.5) is None, "it has no parts"

    @pytest.mark.parametrize("metric", OF_EXAMPLES.values(), ids=OF_EXAMPLES)
    def test_huge_values_are_no_score(self, tmp_path: Path, metric: Metric) -> None:
        """Their sums are beyond floats, which is no warning, and never equal to a score."""
        write_predictions(tmp_path, np.array([1e200, -1e300, 1e308]), np.array([1e300, 1e308, -1e308]))
        assert example_scores(tmp_path / PREDICTIONS, "validation", metric, 0.25, 3) is None

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            (b"no tensors", "."),
            ({"validation/predictions": np.arange(3)}, "references"),
            ({"test/predictions": np.arange(3), "test/references": np.arange(3)}, "validation/predictions"),
            (both(np.arange(2), np.arange(3)), "shapes"),
            (both(np.arange(2), np.arange(2)), r"shapes \(2,\)"),
            (both(np.zeros((3, 1)), np.zeros((2, 1))), "shapes"),
            (both(np.zeros(()), np.zeros(())), "shapes"),
            (both(np.array([0, np.nan, 1]), np.zeros(3)), "finite numbers"),
            (both(np.zeros(3), np.array([0, np.inf, 1])), "finite numbers"),
            (both(np.zeros(3, dtype=bool), np.zeros(3, dtype=bool)), "finite numbers"),
        ],
    )
    def test_anything_else_is_damaged(
        self, tmp_path: Path, arrays: bytes | dict[str, np.ndarray], message: str
    ) -> None:
        path = tmp_path / PREDICTIONS
        path.write_bytes(arrays) if isinstance(arrays, bytes) else save_file(arrays, path)
        with pytest.raises(Damaged, match=message) as caught:
            example_scores(path, "validation", ACCURACY, 0.5, 3)
        assert "\n" not in str(caught.value)


class TestCriticalDifference:
    def scores(self, num_tasks: int, methods: int = 4) -> list[list[float]]:
        random = np.random.default_rng(0)
        return (np.arange(methods)[:, None] * 0.05 + 0.03 * random.random((methods, num_tasks)) + 0.5).tolist()

    def test_ranks_are_friedmans(self) -> None:
        scores = self.scores(7)
        found = mean_ranks(
            board(*(record(f"m{i}", f"t{j}", score=s) for i, row in enumerate(scores) for j, s in enumerate(row)))
        )
        assert found.labels == ("m3", "m2", "m1", "m0")
        assert found.ranks == pytest.approx((1, 2, 3, 4), abs=0.5)
        assert found.p_value == pytest.approx(scipy.stats.friedmanchisquare(*scores).pvalue)
        # Demsar's table 5: q is 2.569 for four classifiers at 0.05.
        assert found.critical_difference == pytest.approx(2.569 * math.sqrt(4 * 5 / (6 * 7)), rel=1e-3)
        assert cliques(found) == [(0, 1), (1, 2), (2, 3)]

    def test_refused_with_the_reason(self) -> None:
        few = board(*(record(f"m{i}", f"t{j}", score=0.5) for i in range(3) for j in range(5)))
        assert refusal(few) == "a critical-difference diagram needs 6 tasks or more, here are 5"
        with pytest.raises(ValueError, match="6 tasks or more"):
            mean_ranks(few)
        one_lacks = board(
            *(record(f"m{i}", f"t{j}", score=0.5) for i in range(3) for j in range(6) if (i, j) != (0, 0))
        )
        assert "here are 2" in (refusal(one_lacks) or "")
