"""Below every table it says where its methods come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness import cli, installed
from harness.provenance import NOT_STATED
from harness.report.board.leaderboard import Board
from harness.report.board.runs import runs_of
from harness.report.build import boards_of
from harness.report.evidence.compare import ExampleReader
from harness.report.forms import plain
from harness.report.forms.data import structured, tidy
from harness.report.forms.latex import latex
from harness.report.forms.page import page
from harness.report.forms.text import console, markdown
from harness.report.tables.differences import differences, differences_table
from harness.report.tables.rank_agreement import agreement_table, agreements
from harness.spec import Selection
from tests.support.report_records import NAMING, record, stored

TOLD = {"lora": "PEFT's", "adalora": "PEFT's", "debora": "from the paper; no official code"}
LINES = ("Provenance of lora, adalora: PEFT's.", "Provenance of debora: from the paper; no official code.")
RANKS = [{"a": 1, "b": 3}, {"a": 2, "b": 2}]


def made(folder: Path, **told: object) -> Board:
    """Three methods that are told of, best first, and one that is not."""
    scores = {"lora": 0.9, "adalora": 0.8, "debora": 0.7, "unknown": 0.6}
    records = [
        record(method, seed=seed, score=score + seed / 100, ranks=RANKS[seed])
        for method, score in scores.items()
        for seed in (0, 1)
    ]
    store = stored(folder, *records)
    (board,) = boards_of(store, runs_of(records, NAMING), provenance=TOLD, **told)
    return board


def test_a_line_for_each_provenance_with_its_methods_in_the_order_of_the_rows(tmp_path: Path) -> None:
    notes = made(tmp_path).notes
    assert tuple(note for note in notes if "Provenance" in note) == LINES, "and none of what nobody told"


def test_of_the_rows_that_are_shown_alone(tmp_path: Path) -> None:
    board = made(tmp_path, selection=Selection(rows=("adalora",)))
    assert [note for note in board.notes if "Provenance" in note] == ["Provenance of adalora: PEFT's."]


def test_every_form_of_the_leaderboard_has_them(tmp_path: Path) -> None:
    board = made(tmp_path)
    for text in (console(board), markdown([board]), latex([board])):
        assert all(line in text for line in LINES)
    assert all(line.replace("'", "&#39;") in page([board], [], {}, {}) for line in LINES)
    rows = tidy([board]).set_index("method")["provenance"]
    assert dict(rows[~rows.index.duplicated()]) == TOLD | {"unknown": None}
    (setting,) = json.loads(json.dumps(structured([board])))["settings"]
    assert {row["label"]: row["provenance"] for row in setting["rows"]} == TOLD | {"unknown": None}


def test_the_tables_beside_it_have_them(tmp_path: Path) -> None:
    board = made(tmp_path)
    (less,) = differences([board], "lora", ExampleReader(stored(tmp_path))).values()
    for table in (differences_table(less), agreement_table(board, agreements(board, alike=lambda layer: 0))):
        assert table.notes[-2:] == LINES
        assert all(line in plain.console(table) for line in LINES)


def test_what_is_not_told_is_not_said(tmp_path: Path) -> None:
    records = [record("lora", seed=seed) for seed in (0, 1)]
    (board,) = boards_of(stored(tmp_path, *records), runs_of(records, NAMING))
    assert not any("Provenance" in note for note in board.notes)
    assert tidy([board])["provenance"].isna().all()


def test_the_command_asks_the_installed_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored(tmp_path, record("bitfit"), record("gone", score=0.4))
    assert cli.main(["report", "--results", str(tmp_path)]) == 0
    for text in (capsys.readouterr().out, (tmp_path / "tables" / "leaderboard.md").read_text()):
        assert "Provenance of bitfit: from the paper." in text
        assert "Provenance of gone: not stated." in text


def test_an_iterator_of_methods_is_as_good_as_a_list() -> None:
    assert installed.provenance_of(iter(["gone", "head"])) == {"gone": NOT_STATED, "head": "common practice"}
