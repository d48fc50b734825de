"""One trained adapter at several ranks, in the report: areas, columns, tables with tests, the picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from harness import cli, installed
from harness.record.record import PREDICTIONS, RunRecord
from harness.record.store import RecordStore
from harness.report.board.leaderboard import Board, leaderboards
from harness.report.board.runs import runs_of
from harness.report.evidence.compare import ExampleReader, row_of
from harness.report.pictures import lines
from harness.report.statistics import crossed, holm, paired, rank_aurac
from harness.report.tables import rank_curves
from harness.report.tables.rank_scores import RankScores, rank_differences, rank_scores, rank_tables
from tests.support.report_records import NAMING, board, record, stored

ROWS = 200
SHARES = {"lora": {1: 0.5, 4: 0.8}, "debora": {1: 0.75, 4: 0.8}, "adalora": {1: 0.45, 4: 0.79}}  # right, by rank
TRAINED = {1: 0.7, 4: 0.8}  # LoRAs of these ranks


def is_lora(run: RunRecord) -> bool:
    return run.spec.method == "lora"


def right(share: float, *key: int) -> np.ndarray:
    """(ROWS,) which answers are right: some examples are hard for every model."""
    hard = np.random.default_rng(7).random(ROWS)
    return 0.7 * hard + 0.3 * np.random.default_rng(key).random(ROWS) < share


def keep(store: RecordStore, answers: Mapping[int | None, np.ndarray], with_curve: bool, **changes: Any) -> None:
    """A run whose whole adapter (None) and whose cut ones give these answers, with its predictions."""
    references = np.random.default_rng(3).integers(0, 2, ROWS)
    scores = {rank: float(found.mean()) for rank, found in answers.items()}
    curve = {rank: score for rank, score in scores.items() if rank is not None}
    made = record(score=scores[None], rank_curve=curve, rows={"train": 9, "holdout": 1, "validation": ROWS}, **changes)
    draft = store.draft(made.run_id)
    names = {rank: "predictions" if rank is None else f"rank_{rank}" for rank in answers}
    kept = {f"validation/{names[rank]}": np.where(found, references, 1 - references) for rank, found in answers.items()}
    kept = {name: value for name, value in kept.items() if with_curve or name.endswith("predictions")}
    save_file(kept | {"validation/references": references}, draft / PREDICTIONS)
    store.write(made, [], draft)


def study(folder: Path, with_curve: bool = True) -> RecordStore:
    """Three methods cut to ranks 1 and 4, LoRA among them, and a LoRA trained at rank 1, three seeds each."""
    store = stored(folder)
    for seed in range(3):
        for place, (method, shares) in enumerate(SHARES.items()):
            answers: dict[int | None, np.ndarray] = {rank: right(share, seed, place) for rank, share in shares.items()}
            ranks = {"q": 4, "v": 4} if method == "lora" else {"q": 1, "v": 6}
            parameters = {"rank": 4} if method == "lora" else {}
            answers[None] = answers[4]
            keep(store, answers, with_curve, method=method, method_parameters=parameters, seed=seed, ranks=ranks)
        whole: dict[int | None, np.ndarray] = {None: right(TRAINED[1], seed, 9)}
        keep(store, whole, with_curve, method_parameters={"rank": 1}, seed=seed, ranks={"q": 1, "v": 1})
    return store


def whole_board(store: RecordStore) -> Board:
    (only,) = leaderboards(runs_of(store.records(), NAMING))
    return only


def scores_of(store: RecordStore, baseline: str | None = None) -> RankScores:
    found = whole_board(store)
    made = rank_scores(found, row_of(found, baseline) if baseline else None, ExampleReader(store), is_lora)
    assert made is not None
    return made


def by_place(found: RankScores) -> pd.DataFrame:
    return rank_differences(found).set_index(["less", "method", "rank"]).sort_index()


class TestArea:
    def test_of_the_source(self) -> None:
        ranks, scores = [1, 2, 4, 8, 16, 32], [10.0, 20, 30, 40, 50, 60]
        found = rank_aurac(ranks, scores)
        assert found["linear"] == pytest.approx(46.6129, abs=1e-4)
        assert found["log2"] == pytest.approx(35.0)

    def test_of_one_rank_or_a_constant_is_the_score(self) -> None:
        assert rank_aurac([7], [0.3]) == {"linear": 0.3, "log2": 0.3}
        constant = rank_aurac([1, 3, 5, 64], [0.4] * 4)
        assert constant == {"linear": pytest.approx(0.4), "log2": pytest.approx(0.4)}

    @pytest.mark.parametrize("seed", range(5))
    def test_invariances(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        ranks = [int(rank) for rank in draw.choice(np.arange(1, 100), 6, replace=False)]
        scores = [float(score) for score in draw.random(6)]
        found = rank_aurac(ranks, scores)
        ordered = sorted(ranks)
        by_rank = [scores[ranks.index(rank)] for rank in ordered]
        slow = {axis: np.trapezoid(by_rank, x) / (x[-1] - x[0]) for axis, x in (
            ("linear", np.array(ordered, float)), ("log2", np.log2(ordered)))}  # fmt: skip
        assert found == pytest.approx(slow)
        assert rank_aurac(ranks[::-1], scores[::-1]) == pytest.approx(found)
        assert rank_aurac([3 * rank for rank in ranks], scores) == pytest.approx(found)
        moved = rank_aurac(ranks, [2 * score + 1 for score in scores])
        assert moved == pytest.approx({axis: 2 * value + 1 for axis, value in found.items()})

    def test_on_octaves_the_logarithm_weighs_them_alike(self) -> None:
        scores = [0.1, 0.5, 0.2, 0.9]
        assert rank_aurac([2, 4, 8, 16], scores)["log2"] == pytest.approx((sum(scores) - (0.1 + 0.9) / 2) / 3)

    @pytest.mark.parametrize("wrong", [[], [1, 1], [0, 1]])
    def test_wrong_ranks(self, wrong: list[int]) -> None:
        with pytest.raises(ValueError, match="ranks"):
            rank_aurac(wrong, [0.5] * len(wrong))


class TestColumns:
    def values(self, found: Board) -> dict[str, tuple[object, object]]:
        linear, log2 = (column for column in found.table if column.name.startswith("rank_aurac"))
        return {row.label: (linear.value(row), log2.value(row)) for row in found.rows}

    def shown(self, found: Board) -> list[str]:
        return [column.heading for column in found.across("console") if hasattr(column, "heading")]

    def test_where_there_are_curves_over_the_same_ranks(self) -> None:
        runs = [record("lora", seed=seed, rank_curve={2: 0.6 + seed / 10, 1: 0.4, 4: 0.8}) for seed in (0, 1)]
        found = board(*runs, record("head"))
        assert self.values(found) == {
            "lora": (pytest.approx((1.9 + 2.05) / 6), pytest.approx((0.6 + 0.65) / 2)),
            "head": (None, None),
        }
        assert {"rank aurac linear", "rank aurac log2"} < set(self.shown(found))
        assert "rank aurac linear" not in self.shown(board(record("lora"))), "no curve"
        other = board(*runs, record("debora", rank_curve={1: 0.5, 8: 0.5}))
        assert "rank aurac linear" not in self.shown(other), "areas over different ranks cannot be compared"
        assert self.values(other)["debora"] == (0.5, 0.5)

    def test_over_tasks_it_is_the_mean_and_needs_every_run(self) -> None:
        runs = [record("lora", task, rank_curve={1: 0.2 + at, 2: 0.4 + at}) for at, task in ((0, "a"), (0.4, "b"))]
        assert self.values(board(*runs))["lora"][0] == pytest.approx(0.5)
        assert self.values(board(*runs, record("lora", "b", seed=1)))["lora"] == (None, None)
        down = record("lora", "b", rank_curve={1: 0.2, 2: 0.1}, higher_is_better=False)
        assert self.values(board(runs[0], down))["lora"] == (None, None)

    def test_sorts(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        runs = [record(method, rank_curve={1: at, 2: 0.5}) for method, at in (("lora", 0.1), ("debora", 0.4))]
        stored(tmp_path, *runs)
        assert cli.main(["report", "--sort", "rank_aurac_log2", "--results", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        assert out.index("debora") < out.index("lora")


class TestScores:
    def test_areas_of_the_same_ranks_stand_together(self) -> None:
        runs = [record("lora", seed=seed, rank_curve={2: 0.6 + seed / 10, 1: 0.4, 4: 0.8}) for seed in (0, 1)]
        runs += [record("debora", rank_curve={1: 0.5, 2: 0.5}), record("adalora", rank_curve={1: 0.1, 2: 0.2, 4: 0.3})]
        found = board(*runs, record("head"))
        table = rank_curves.areas(found)
        assert table[["ranks", "method", "n"]].to_numpy().tolist() == [
            ["1,2", "debora", 1], ["1,2,4", "lora", 2], ["1,2,4", "adalora", 1],
        ]  # fmt: skip
        # Over 1, 2, 4: (0.5 + 2 x 0.7) / 3 and (0.55 + 2 x 0.75) / 3; over their logarithms (0.5 + 0.7) / 2 and so on.
        lora = table[table["method"] == "lora"].iloc[0]
        assert lora["aurac_linear"] == pytest.approx((1.9 + 2.05) / 6)
        assert lora["aurac_log2"] == pytest.approx((0.6 + 0.65) / 2)
        assert lora["log2_interval_95"] == pytest.approx(12.706 * 0.025, rel=1e-3)
        points = rank_curves.rank_curves(found).set_index("method").loc["lora"]
        assert points[["rank", "mean"]].to_numpy() == pytest.approx(np.array([[1, 0.4], [2, 0.65], [4, 0.8]]))

    def test_the_table_and_the_line_to_beat(self, tmp_path: Path) -> None:
        table = rank_tables(scores_of(study(tmp_path)))[0]
        assert [name for name, _ in table.headings] == ["task", "method", "rank 1", "rank 4", "whole"]
        texts = {row[1].text: [entry.text for entry in row[2:]] for row in table.rows}
        found = whole_board(RecordStore(tmp_path))
        means = {row.label: f"{row.cells['digits'].score.mean:.3f}" for row in found.rows}
        assert texts["lora[rank=4]"][1:] == [means["lora[rank=4]"]] * 2
        assert texts[rank_curves.TRAINED] == [means["lora[rank=1]"], means["lora[rank=4]"], "-"]
        assert "lora[rank=1]" not in texts, "its adapter was not cut"

    def test_of_several_loras_of_a_rank_the_best_is_the_line(self) -> None:
        runs = [
            record(
                "lora", score=score, method_parameters={"rank": 4, "lr": rate}, ranks={"q": 4}, rank_curve={4: score}
            )
            for rate, score in ((0.1, 0.6), (0.2, 0.7), (0.3, 0.5))
        ]
        runs += [record("lora", score=0.9, method_parameters={"rank": 8}, ranks={"q": 8, "v": 4})]  # of no one rank
        runs += [record("debora", score=0.9, ranks={"q": 4})]
        found = board(*runs)
        assert {rank: row.label for rank, row in rank_curves.trained_at(found, found.columns[0], is_lora).items()} == {
            4: "lora[rank=4,lr=0.2]"
        }

    def test_which_methods_train_a_lora_at_its_ranks(self) -> None:
        found = {name: installed.is_lora(name, {}, {"q": 4, "v": 4}) for name in ("lora", "adalora", "pruned_lora")}
        assert found == {"lora": True, "adalora": False, "pruned_lora": False}
        assert not installed.is_lora("head", {}, {})
        assert not installed.is_lora("gone", {}, {"q": 4})
        assert not installed.is_lora("lora", {"gone": 1}, {"q": 4})

    def test_no_curve_no_table(self, tmp_path: Path) -> None:
        store = stored(tmp_path, record())
        assert rank_scores(whole_board(store), None, ExampleReader(store), is_lora) is None
        assert rank_tables(None) == []


class TestAgainst:
    def test_the_lora_trained_at_the_rank(self, tmp_path: Path) -> None:
        found = by_place(scores_of(study(tmp_path)))
        differences = np.stack([right(0.75, seed, 1) * 1.0 - right(TRAINED[1], seed, 9) for seed in range(3)])
        expected = crossed(differences)
        assert expected is not None
        debora = found.loc["lora[rank=1]", "debora", 1]
        assert debora["difference"] == pytest.approx(expected.mean)
        assert debora["p"] == pytest.approx(expected.p_value)
        assert debora["examples"] == ROWS
        of_rank = found.loc["lora[rank=1]"].xs(1, level="rank")
        assert of_rank["holm_p"].to_list() == pytest.approx(holm(of_rank["p"].to_list()))
        assert found["verdict"].to_dict() == {
            ("lora[rank=1]", "debora", 1): "better",
            ("lora[rank=1]", "adalora", 1): "worse",
            ("lora[rank=1]", "lora[rank=4]", 1): "worse",
            ("lora[rank=4]", "debora", 4): "not significantly different",
            ("lora[rank=4]", "adalora", 4): "not significantly different",
        }

    def test_a_baseline_cut_to_the_same_rank(self, tmp_path: Path) -> None:
        found = by_place(scores_of(study(tmp_path), "debora")).loc["debora"]
        differences = np.stack([right(0.45, seed, 2) * 1.0 - right(0.75, seed, 1) for seed in range(3)])
        expected = crossed(differences)
        assert expected is not None
        assert found.loc["adalora", 1]["p"] == pytest.approx(expected.p_value)
        assert sorted(found.index) == [("adalora", 1), ("adalora", 4), ("lora[rank=4]", 1), ("lora[rank=4]", 4)]

    def test_runs_that_kept_no_predictions_at_ranks_are_tested_over_seeds(self, tmp_path: Path) -> None:
        made = scores_of(study(tmp_path, with_curve=False))
        debora = by_place(made).loc["lora[rank=1]", "debora", 1]
        expected = paired(np.array([right(0.75, s, 1).mean() - right(TRAINED[1], s, 9).mean() for s in range(3)]))
        assert expected is not None
        assert debora["examples"] is None
        assert debora["p"] == pytest.approx(expected.p_value)
        (note,) = [note for note in rank_tables(made)[1].notes if "Over seeds alone" in note]
        assert "debora" in note

    def test_files_page_and_console(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        study(tmp_path)
        assert cli.main(["report", "--baseline", "adalora", "--results", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        texts = [(tmp_path / "tables" / f"rank_curves.{form}").read_text() for form in ("md", "tex")]
        for text in (out, *texts, (tmp_path / "report.html").read_text()):
            plain = " ".join(text.split())
            assert "Scores at ranks less those of LoRA trained at each rank" in plain
            assert "Scores at ranks less those of adalora at the same rank" in plain
        table = pd.read_csv(tmp_path / "tables" / "rank_differences.csv")
        assert len(table) == 5 + 4

    def test_a_selection_changes_no_figure(self, tmp_path: Path) -> None:
        study(tmp_path)
        assert cli.main(["report", "--results", str(tmp_path)]) == 0
        every = pd.read_csv(tmp_path / "tables" / "rank_differences.csv")
        assert cli.main(["report", "--rows", "adalora", "--results", str(tmp_path)]) == 0
        shown = pd.read_csv(tmp_path / "tables" / "rank_differences.csv")
        assert set(shown["method"]) == {"adalora"}
        expected = every[every["method"] == "adalora"].reset_index(drop=True)
        pd.testing.assert_frame_equal(shown, expected)


class TestPicture:
    def drawn(self, found: Board) -> tuple[Any, list[str]]:
        figure = lines.rank_curves(found, is_lora)
        assert figure is not None
        labels = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        return figure, labels

    def test_curves_and_the_line_to_beat(self, tmp_path: Path) -> None:
        figure, labels = self.drawn(whole_board(study(tmp_path)))
        assert labels == ["adalora", "debora", "lora[rank=4]", rank_curves.TRAINED]
        (panel,) = figure.axes
        assert [text.get_text() for text in panel.get_xticklabels()] == ["1", "4"]
        heights = [container[0].get_ydata() for container in panel.containers]
        assert len(heights) == 4
        scores = {row.label: row.cells["digits"].score.mean for row in whole_board(RecordStore(tmp_path)).rows}
        assert list(heights[-1]) == pytest.approx([scores["lora[rank=1]"], scores["lora[rank=4]"]])

    def test_loras_on_the_line_have_no_curve_but_the_largest(self) -> None:
        runs = [
            record(score=0.5, method_parameters={"rank": rank}, ranks={"q": rank}, rank_curve={1: 0.3, 2: 0.4, 4: 0.5})
            for rank in (1, 2, 4)
        ]
        assert self.drawn(board(*runs))[1] == ["lora[rank=4]", rank_curves.TRAINED]

    def test_many_rows_share_a_few_panels_at_one_scale(self) -> None:
        runs = [record(f"m{place}", score=0.9 - place / 20, rank_curve={1: 0.1, 2: 0.2}) for place in range(8)]
        figure, labels = self.drawn(board(*runs))
        assert labels == [f"m{place}" for place in range(8)]
        panels = [panel for panel in figure.axes if panel.get_visible()]
        assert [len(panel.containers) for panel in panels] == [6, 2]
        assert [panel.get_title() for panel in panels] == ["digits (1 of 2)", "digits (2 of 2)"]
        assert panels[0].get_ylim() == panels[1].get_ylim()

    def test_nothing_without_a_curve(self) -> None:
        assert lines.rank_curves(board(record()), is_lora) is None
