"""From records to leaderboards: labels, statistics, what may be averaged, what is shown."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

import pytest
import scipy.stats

from harness.installed import family_average
from harness.record.record import RunRecord
from harness.report.board.leaderboard import Board, leaderboards
from harness.report.board.runs import runs_of
from harness.report.forms.data import tidy
from harness.report.forms.latex import latex
from harness.report.forms.text import console, markdown
from harness.report.statistics import summarize
from harness.spec import Place, TrainSpec
from tasks.glue import TABLE
from tests.support.report_records import ENVIRONMENT, NAMING, board, boards, record


class TestStatistics:
    def test_by_hand(self) -> None:
        summary = summarize([1.0, 2.0, 3.0, 6.0])
        assert (summary.n, summary.mean) == (4, 3.0)
        assert summary.standard_deviation == pytest.approx(math.sqrt(14 / 3))
        # Student's t table: 3.182 at 3 degrees of freedom.
        assert summary.half_width == pytest.approx(3.182 * math.sqrt(14 / 3) / 2, rel=1e-3)

    @pytest.mark.parametrize("n", [2, 5, 40])
    def test_interval_is_scipys(self, n: int) -> None:
        values = [0.8 + 0.01 * math.sin(i) for i in range(n)]
        summary = summarize(values)
        assert summary.mean is not None
        low, high = scipy.stats.t.interval(0.95, n - 1, loc=summary.mean, scale=scipy.stats.sem(values))
        assert summary.half_width == pytest.approx((high - low) / 2, rel=1e-9)

    def test_one_value_has_no_spread(self) -> None:
        summary = summarize([0.7])
        assert (summary.n, summary.mean, summary.standard_deviation, summary.half_width) == (1, 0.7, None, None)

    def test_no_value_has_no_mean(self) -> None:
        assert summarize([]).mean is None

    def test_equal_values_have_no_spread(self) -> None:
        assert summarize([0.1] * 3).standard_deviation == pytest.approx(0, abs=1e-15)

    def test_infinity_is_refused(self) -> None:
        with pytest.raises(ValueError, match="finite"):
            summarize([0.5, math.inf])


class TestLabels:
    def label(self, *records: RunRecord) -> list[str]:
        return [run.label for run in runs_of(records, NAMING)]

    def test_names_what_is_not_default(self) -> None:
        changed = record("debora", method_parameters={"rank": 4, "tau": 8.0})
        plain = record("debora", method_parameters={"rank": 8, "tau": 16.0})
        assert self.label(changed, plain) == ["debora[tau=8,rank=4]", "debora"]

    def test_default_tuple_is_the_records_list(self) -> None:
        assert self.label(record("lora", method_parameters={"rank": 8, "targets": ["query", "value"]})) == ["lora"]
        changed = record("lora", method_parameters={"rank": 8, "targets": ["query", "key"]})
        assert self.label(changed) == ['lora[targets=["query","key"]]']

    def test_unknown_method_names_what_varies(self) -> None:
        first = record("plugin", method_parameters={"a": 1, "b": None})
        second = record("plugin", method_parameters={"a": 1, "b": True})
        assert self.label(first, second) == ["plugin[b=null]", "plugin[b=true]"]

    def test_parameter_of_an_older_version_is_shown(self) -> None:
        old = record("lora", method_parameters={"rank": 8, "gone": 0.0005}, method_version=1)
        new = record("lora", method_parameters={"rank": 8}, method_version=2)
        assert self.label(old, new) == ["lora[gone=0.0005] (v1)", "lora (v2)"]

    def test_same_words_for_two_configurations_are_told_apart(self) -> None:
        labels = self.label(record("lora", method_parameters={"rank": 8}), record("lora", method_parameters={}))
        assert len(set(labels)) == 2
        assert all(label.startswith("lora #") for label in labels)

    def test_run_given_twice_counts_once(self) -> None:
        assert len(runs_of([record(), record()])) == 1

    def test_folder_of_the_model_is_not_shown(self) -> None:
        (run,) = runs_of([record(place=Place(model="/home/somebody/models/minilm/"))])
        assert run.model == "minilm"


class TestLeaderboard:
    def test_golden_markdown_table(self) -> None:
        text = markdown(
            boards(
                record("lora", seed=0, score=0.81, ranks={"q": 8, "v": 7}, numbers=1_330_000),
                record("lora", seed=1, score=0.83, ranks={"q": 8, "v": 8}, numbers=1_330_000),
                record("head", seed=0, score=0.7, numbers=0),
                record("head", seed=1, score=0.7, numbers=0),
            )
        )
        table = [line for line in text.splitlines() if line.startswith("|")]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
        heads = ["method", "parameters", "rank", "digits (accuracy)", "settings", "batches", "seconds", "memory"]
        assert cells[0] == heads
        # 0.1271 = 12.706, Student's t at one degree of freedom, times 0.01, the standard error.
        assert cells[2] == ["lora", "1.33M", "7.8", "**0.820 ± 0.127 (n=2)**", "default", "100", "60", "1.24GB"]
        assert cells[3] == ["head", "0", "-", "<u>0.700 ± 0.000 (n=2)</u>", "as given", "100", "60", "1.24GB"]
        assert "Model 30de100000000000; 100 batches, batch size 32, all rows, 1 thread." in text
        assert f"- lora on digits: seed 0 `{record('lora', seed=0).run_id}`, seed 1" in text

    def test_one_run_has_no_spread(self) -> None:
        assert "0.500 ± n/a (n=1)" in markdown(boards(record()))

    @pytest.mark.parametrize("status", ["unsupported", "diverged", "out_of_memory", "failed"])
    def test_failures_are_shown_with_their_reason(self, status: str) -> None:
        failed = record(seed=1, score=None, status=status, error="loss is | inf")
        found = boards(record(seed=0), failed, record("head", score=0.4), record("head", seed=1, score=0.4))
        word = status.replace("_", " ")
        assert f"0.500 ± n/a (n=1); 1 of 2 {word}" in markdown(found)
        assert rf"- lora on digits: {word} (seed 1): loss is \| inf" in markdown(found)
        assert f"1 of 2 {word}" in console(found[0])
        assert f"lora on digits: {word} (seed 1): loss is | inf" in console(found[0])
        assert word in latex(found)
        rows = {row["label"]: row for row in csv.DictReader(io.StringIO(tidy(found).to_csv(index=False)))}
        assert (rows["lora"]["n"], rows["lora"][status], rows["lora"]["runs"]) == ("1", "1", "2")

    def test_cell_with_a_failure_is_neither_best_nor_first(self) -> None:
        lucky = [record("lora", seed=0, score=0.9), record("lora", seed=1, score=None, status="diverged")]
        others = [record(method, seed=seed, score=0.4) for method in ("full", "head") for seed in (0, 1)]
        found = board(*lucky, *others)
        assert [row.label for row in found.rows] == ["full", "head", "lora"]
        assert [found.is_best(row, found.columns[0]) for row in found.rows] == [True, True, False]

    def test_all_failed_is_a_row(self) -> None:
        found = board(record(score=None, status="diverged"), record(seed=1, score=None, status="failed"))
        assert "1 of 2 diverged, 1 of 2 failed" in markdown([found])
        assert found.n is None
        assert "1 of 2" in latex([found])

    def test_done_without_a_score(self) -> None:
        found = markdown(boards(record(score=None, status="done")))
        assert "1 of 1 done without a score" in found

    def test_scores_that_print_equal_are_equally_good(self) -> None:
        scores = {"lora": 0.82301, "head": 0.82304, "full": 0.8}
        found = board(*(record(name, seed=seed, score=score) for name, score in scores.items() for seed in (0, 1)))
        assert [row.label for row in found.rows if found.is_best(row, found.columns[0])] == ["head", "lora"]

    def test_average_needs_every_task(self) -> None:
        found = board(
            record("lora", "glue/rte", score=0.9),
            record("head", "glue/rte", score=0.6),
            record("head", "glue/cola", score=0.4),
        )
        assert [(row.label, row.average) for row in found.rows] == [("head", 0.5), ("lora", None)]
        assert [column.title for column in found.columns] == ["glue/cola", "glue/rte"]

    def test_a_family_may_count_its_average_itself(self) -> None:
        """QQP counts with the mean of accuracy and F1, once all eight tasks are there."""

        def boards_of(tasks: Sequence[str]) -> list[Board]:
            scored = [
                record(task=f"glue/{name}", score=0.8, headline=TABLE[name].metrics[0], others={"f1": 0.4})
                for name in tasks
            ]
            return leaderboards(runs_of([*scored], NAMING), family_average)

        (whole,), (part,) = boards_of(list(TABLE)), boards_of(["qqp", "rte"])
        assert whole.rows[0].average == pytest.approx((7 * 0.8 + 0.6) / 8)
        assert "average: as the family of these tasks counts it, from more than the scores shown" in whole.notes
        assert part.rows[0].average == pytest.approx(0.8)
        assert not part.notes

    def test_other_metrics_are_in_the_markdown(self) -> None:
        text = markdown(boards(record(task="glue/mrpc", others={"f1": 0.75}), record(task="glue/sst2", others={})))
        assert "glue/mrpc (f1) |" in text
        assert "0.750 ± n/a (n=1)" in text

    def test_different_seeds_are_noted(self) -> None:
        found = board(record("lora", seed=0), record("head", seed=1))
        assert found.notes == ("Scores on digits are over different seeds: 0: lora; 1: head.",)

    def test_different_devices_are_noted(self) -> None:
        elsewhere = ENVIRONMENT.model_copy(update={"device": "cuda:0: H100"})
        (note,) = board(record(seed=0), record(seed=1, environment=elsewhere)).notes
        assert "cpu, cuda:0: H100" in note

    def test_markdown_signs_are_escaped(self) -> None:
        text = markdown(boards(record(score=None, status="failed", error="a|b *c* <d> `e` __f__ g_h\nnext")))
        assert r"a\|b \*c\* \<d\> \`e\` \_\_f\_\_ g_h next" in text


class TestNothingIsMixed:
    @pytest.mark.parametrize(
        "change",
        [
            {"model_fingerprint": "other"},
            {"train": TrainSpec(batches=100, schedule="constant")},
            {"limit": 50},
            {"evaluation_limit": 50},
            {"threads": 2},
        ],
    )
    def test_other_settings_have_a_table_of_their_own(self, change: dict[str, Any]) -> None:
        found = boards(record(score=0.2), record(score=0.8, **change))
        assert [[cell.score.n for row in each.rows for cell in row.cells.values()] for each in found] == [[1], [1]]
        assert found[0].caption != found[1].caption

    @pytest.mark.parametrize(
        "change",
        [{"data_fingerprint": "bbbb0000cccc1111"}, {"task_parameters": {"noise": 0.1}}, {"task_version": 2}],
    )
    def test_other_data_have_a_column_of_their_own(self, change: dict[str, Any]) -> None:
        found = board(record(score=0.2), record(score=0.8, **change))
        assert len(found.columns) == 2
        assert sorted(cell.score.mean or 0 for cell in found.rows[0].cells.values()) == [0.2, 0.8]

    def test_names_of_such_columns(self) -> None:
        columns = board(record(), record(data_fingerprint="bbbb0000cccc1111")).columns
        assert [column.title for column in columns] == ["digits (data bbbb0000)", "digits (data da7a0000)"]

    def test_other_versions_have_a_row_of_their_own(self) -> None:
        found = board(record("debora", score=0.2), record("debora", score=0.8, method_version=2))
        assert [row.label for row in found.rows] == ["debora (v2)", "debora (v1)"]
