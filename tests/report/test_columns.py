"""Columns are declared once and stand in every form; a task's further evaluation splits can be columns."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import cli
from harness.errors import InputError
from harness.record.record import RunRecord
from harness.report import frame
from harness.report.board.added_columns import with_added
from harness.report.board.columns import COLUMNS, FORMS, TableColumn
from harness.report.board.leaderboard import Board, leaderboards, sorted_by
from harness.report.board.notes import with_notes
from harness.report.board.rows import over
from harness.report.board.runs import every_split, runs_of
from harness.report.forms.data import structured, tidy
from harness.report.forms.latex import latex
from harness.report.forms.page import page
from harness.report.forms.text import console, markdown
from harness.report.tables import budget, rank_curves
from tests.support.report_records import NAMING, record, stored

OWN = TableColumn(
    "own_cost", lambda row: over(row.scored, "batches"), "a cost of one's own", lambda cost: f"{cost:.1f}!"
)


def with_column(column: TableColumn, *records: RunRecord) -> Board:
    (only,) = leaderboards(runs_of(records, NAMING), table=(*COLUMNS, column))
    return only


def tables(of: Board) -> dict[str, str]:
    """Every form of the board's table, as text."""
    return {
        "console": console(of),
        "markdown": markdown([of]),
        "latex": latex([of]),
        "page": page([of], [], {}, {}),
        "csv": tidy([of]).to_csv(),
        "json": json.dumps(structured([of])),
    }


class TestDeclaredOnce:
    def test_a_column_stands_in_every_form(self) -> None:
        found = tables(with_column(OWN, record()))
        assert found.keys() == set(FORMS)
        for form, text in found.items():
            assert re.search("own.cost", text, re.IGNORECASE), form
            assert ("100.0!" if form not in ("csv", "json") else "100") in text, form

    @pytest.mark.parametrize("form", FORMS)
    def test_a_column_stands_in_the_forms_that_it_names_alone(self, form: str) -> None:
        found = tables(with_column(dataclasses.replace(OWN, forms=[form]), record()))
        assert [name for name, text in found.items() if re.search("own.cost", text, re.IGNORECASE)] == [form]

    def test_every_column_of_the_tables_can_be_sorted_by(self) -> None:
        runs = [record("lora", score=0.5, numbers=10, batches=5), record("head", score=0.9, numbers=20, batches=9)]
        found = with_column(OWN, *runs)
        for column in found.table:
            assert {row.label for row in sorted_by([found], column.name)[0].rows} == {"lora", "head"}
        assert [row.label for row in sorted_by([found], "own_cost")[0].rows] == ["lora", "head"]
        assert [row.label for row in sorted_by([found], "parameters")[0].rows] == ["lora", "head"]
        assert [row.label for row in sorted_by([found], "average")[0].rows] == ["head", "lora"]
        with pytest.raises(InputError, match="own_cost"):
            sorted_by([found], "own_costs")

    def test_what_packages_add_wrongly_is_a_line(self) -> None:
        names = {"a": "memory", "b": "mean", "c": "parameters_final"}  # of columns, and of what else data hold
        taken = {entry: dataclasses.replace(OWN, name=name) for entry, name in names.items()}
        columns, told = with_added({"own": OWN, "number": 5} | taken)
        assert columns == (*COLUMNS, OWN)
        for entry, name in names.items():
            assert [line for line in told if f"'{entry}'" in line and f"'{name}'" in line]
        assert [line for line in told if "'number' is 5" in line]

    @pytest.mark.parametrize(
        "fault",
        [
            {"value": lambda row: [1]},
            {"value": lambda row: float("nan")},
            {"value": lambda row: np.int64(5)},  # which JSON does not hold
            {"value": lambda row: row.nothing},
            {"value": lambda row: 1 / 0},
            {"shown": lambda rows: 1 / 0},
            {"forms": None},
            {"forms": ["papyrus"]},
        ],
    )
    def test_a_column_that_cannot_be_made_costs_no_table(self, fault: dict[str, Any]) -> None:
        found = with_column(dataclasses.replace(OWN, **fault), record())
        assert found.table == COLUMNS
        (note,) = found.notes
        assert note.startswith("The column 'own_cost' is left out (")


class TestEverySplit:
    def split(self, score: float | None, second: float, **changes: object) -> RunRecord:
        metrics = {} if score is None else {"b_accuracy": second, "f1": 0.1, "b_f1": 0.2}
        rows = {"train": 9, "holdout": 1, "a": 5, "b": 5}
        return record(task="pair", score=score, others=metrics, rows=rows, **changes)  # type: ignore[arg-type]

    def made(self, counted: dict[str, str] | None = None) -> Board:
        runs = [self.split(0.5, 0.8, seed=seed) for seed in (0, 1)]
        runs += [self.split(0.6, 0.3, method="head"), record("head", seed=1, task="pair", score=None)]
        runs += [record(each, "other", seed=seed, score=0.4) for each in ("lora", "head") for seed in (0, 1)]
        (only,) = leaderboards(every_split(runs_of(runs, NAMING), counted))
        return with_notes(only)

    def test_a_further_split_is_a_column_with_its_own_metrics(self) -> None:
        found = self.made()
        assert [column.title for column in found.columns] == ["other", "pair", "pair, b"]
        assert [column.others for column in found.columns] == [(), ("f1",), ("f1",)]
        lora = next(row for row in found.rows if row.label == "lora")
        assert (lora.cells["pair"].score.mean, lora.cells["pair, b"].score.mean) == (0.5, 0.8)
        assert lora.cells["pair, b"].others["f1"].mean == 0.2
        assert "pair, b (accuracy)" in markdown([found])

    def test_a_run_that_failed_before_its_rows_were_known_failed_on_every_split(self) -> None:
        head = next(row for row in self.made().rows if row.label == "head")
        assert [cell.failures for cell in head.cells.values()] == [[], [("failed", 1)], [("failed", 1)]]

    def test_a_task_counts_once_and_costs_once(self) -> None:
        found, by_second = self.made(), self.made({"pair": "b"})
        averages = [next(row.average for row in each.rows if row.label == "lora") for each in (found, by_second)]
        assert averages == [pytest.approx(0.45), pytest.approx(0.6)]
        assert "Left out of averages and of the order of rows, where each task counts once: pair, b." in found.notes
        assert "Left out of averages and of the order of rows, where each task counts once: pair." in by_second.notes
        costs = budget.costs(found).set_index("method")
        assert costs.loc["lora", "runs"] == 4
        assert costs.loc["lora", "batches"] == 400

    def test_a_failure_is_told_once(self) -> None:
        assert len([note for note in self.made().notes if note.startswith("head on pair")]) == 1

    def test_rank_curves_are_of_the_first_split(self) -> None:
        runs = [self.split(0.5, 0.8, rank_curve={1: 0.3, 2: 0.5})]
        (only,) = leaderboards(every_split(runs_of(runs, NAMING)))
        assert list(rank_curves.areas(only)["task"]) == ["pair"]
        (row,) = only.rows
        log2 = next(column for column in only.table if column.name == "rank_aurac_log2")
        assert (log2.value(row), log2.value(row.on("pair, b"))) == (pytest.approx(0.4), None)

    def test_on_request(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        stored(tmp_path, self.split(0.5, 0.8))
        assert cli.main(["report", "--results", str(tmp_path)]) == 0
        assert "pair, b" not in capsys.readouterr().out
        assert cli.main(["report", "--every-split", "--sort", "pair, b", "--results", str(tmp_path)]) == 0
        assert "pair, b" in capsys.readouterr().out
        assert "pair, b" in (tmp_path / "report.html").read_text()


def test_runs_as_a_data_frame(tmp_path: Path) -> None:
    runs = [record(seed=0, ranks={"q": 2, "v": 4}), record(seed=1, score=None, status="diverged", error="nan")]
    found = frame(stored(tmp_path, *runs).records()).set_index("seed")
    assert found.loc[0, ["score", "metrics.accuracy", "rank", "parameters_final"]].tolist() == [0.5, 0.5, 3.0, 1000]
    assert found.loc[1, ["status", "error"]].tolist() == ["diverged", "nan"]
    assert found["score"].isna().tolist() == [False, True]
