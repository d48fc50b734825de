"""What a report shows: rows, columns and groups by their names, on the command line and in a sweep's [report] table."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest

from harness import cli
from harness.commands.report import show_sweep
from harness.errors import InputError
from harness.plan import sweep_file
from harness.record.record import RunRecord
from harness.report.board.columns import TableColumn
from harness.report.board.leaderboard import Board, leaderboards, sorted_by
from harness.report.board.runs import every_split, runs_of
from harness.report.board.selection import selected
from harness.report.build import boards_of
from harness.report.forms.summary import what_it_shows
from harness.report.forms.text import console, markdown
from harness.spec import Selection
from tests.support.report_records import NAMING, record, stored

SCORES = {"lora": 0.7, "debora": 0.8, "head": 0.5}
LORA = {"rank": 8, "targets": ["query", "value"]}
OWN: dict[str, dict[str, Any]] = {"lora": LORA, "debora": {"recipe": "ours"}}


def control(of: str, seed: int, score: float) -> RunRecord:
    return record("lora", seed=seed, score=score, method_parameters=LORA | {"ranks_of": of})


def runs() -> list[RunRecord]:
    """Three methods with two seeds each, debora best on digits, and two controls, of which one has one seed."""
    found = [
        record(method, task, seed=seed, score=score + 0.01 * seed, method_parameters=OWN.get(method, {}))
        for method, score in SCORES.items()
        for seed in (0, 1)
        for task in ("digits", "rest")
    ]
    return [*found, control("debora", 0, 0.6), control("debora", 1, 0.6), control("head", 0, 0.9)]


def shown(*records: RunRecord, every: bool = False, **choice: Any) -> Board:
    made = runs_of(records or runs(), NAMING)
    (only,) = selected(leaderboards(every_split(made) if every else made), Selection(**choice))
    return only


def labels(found: Board) -> list[str]:
    return [row.label for row in found.rows]


def across(found: Board) -> list[str]:
    columns = found.across("console")
    return [column.name if isinstance(column, TableColumn) else column.title for column in columns]


class TestRows:
    @pytest.mark.parametrize(
        ("patterns", "expected"),
        [
            (["head", "debora"], ["head", "debora"]),
            (["lora"], ["lora"]),
            (["*ora"], ["debora", "lora"]),
            (["lora*"], ["lora", "lora[ranks_of=debora]", "lora[ranks_of=head]"]),
            (["lora[*]", "lora"], ["lora[ranks_of=debora]", "lora", "lora[ranks_of=head]"]),
            (["?ead"], ["head"]),
        ],
    )
    def test_in_the_order_of_the_patterns_those_of_fewer_seeds_last(
        self, patterns: list[str], expected: list[str]
    ) -> None:
        assert labels(shown(rows=patterns)) == expected

    def test_what_tells_labels_apart_may_be_left_out(self) -> None:
        several = [record("head", seed=seed, method_version=version) for seed in (0, 1) for version in (1, 2)]
        assert labels(shown(*several, rows=["head"])) == ["head (v1)", "head (v2)"]
        assert labels(shown(*several, rows=["head (v2)"])) == ["head (v2)"]

    def test_marks_stay_those_of_all_rows(self) -> None:
        found = shown(rows=["lora", "head"])
        assert not any(found.is_best(row, column) for row in found.rows for column in found.columns)
        assert [row.label for row in found.rows if found.is_second(row, found.columns[0])] == ["lora"]
        assert found.among == "Best among rows with seeds 0-1. Marks are those of all 5 rows; 2 are shown."
        assert found.among in " ".join(console(found).split())

    def test_page_says_that_the_best_is_not_shown(self) -> None:
        assert what_it_shows(shown(rows=["lora", "head"]))[-1] == "rest: the best (0.805) is a row that is not shown."

    def test_notes_are_of_the_rows_that_are_shown(self, tmp_path: Path) -> None:
        store = stored(tmp_path, *runs(), record("full", score=None, status="diverged", error="loss is inf"))
        made = runs_of(store.records(), NAMING)
        (whole,), (part,) = boards_of(store, made), boards_of(store, made, selection=Selection(rows=("debora", "lora")))
        assert any("loss is inf" in note for note in whole.notes)
        assert not any("loss is inf" in note for note in part.notes)

    def test_sorting_wins_over_the_order_of_the_patterns(self) -> None:
        (found,) = sorted_by([shown(rows=["head", "debora", "lora*"])], "digits")
        assert labels(found)[:2] == ["debora", "lora"]
        assert labels(found)[-1] == "lora[ranks_of=head]"

    def test_board_without_any_of_the_rows_is_left_out(self) -> None:
        other = [record("full", seed=seed, threads=2) for seed in (0, 1)]
        boards = leaderboards(runs_of([*runs(), *other], NAMING))
        assert len(selected(boards, Selection())) == 2
        assert [labels(found) for found in selected(boards, Selection(rows=("full",)))] == [["full"]]


class TestColumns:
    def test_in_their_order(self) -> None:
        assert across(shown(columns=["rest", "memory", "digits", "parameters"])) == [
            "rest", "memory", "digits", "parameters",
        ]  # fmt: skip

    def test_patterns(self) -> None:
        assert across(shown(columns=["parameters", "di*"])) == ["parameters", "digits"]

    def test_averages_stay_those_of_all_tasks(self) -> None:
        whole, part = shown(), shown(columns=["digits", "average"])
        assert [row.average for row in part.rows] == [row.average for row in whole.rows]
        assert part.notes == ("average: over all tasks of the setting, those not shown too: rest",)

    def test_further_split_on_request(self) -> None:
        splits = {"train": 9, "validation": 5, "validation_b": 5}
        several = [
            record(method, "pair", seed, 0.5, others={"validation_b_accuracy": 0.8}, rows=splits)
            for method in ("lora", "head")
            for seed in (0, 1)
        ]
        for name in ("pair:b", "pair:validation_b", "pair, validation_b"):
            found = shown(*several, every=True, columns=["pair", name])
            assert across(found) == ["pair", "pair, validation_b"]
            assert found.rows[0].cells["pair, validation_b"].score.mean == 0.8
        assert across(shown(*several, every=True, columns=["pair*"])) == ["pair"]


class TestGroups:
    def test_stand_under_their_headings(self) -> None:
        found = shown(group={"controls": "ranks_of", "ours": "debora"})
        sections = [(each.title, each.ranked, [row.label for row in each.rows]) for each in found.sections]
        assert sections == [
            ("", True, ["lora", "head"]),
            ("controls", True, ["lora[ranks_of=debora]"]),
            ("", False, ["lora[ranks_of=head]"]),
            ("ours", True, ["debora"]),
        ]
        assert labels(found) == [label for _, _, of_section in sections for label in of_section]
        lines = console(found).splitlines()
        assert [line.strip() for line in lines if line.strip() in ("controls", "(fewer seeds)", "ours")] == [
            "controls", "(fewer seeds)", "ours",
        ]  # fmt: skip
        assert "| *controls*" in markdown([found])

    def test_marks_are_over_all_groups(self) -> None:
        found = shown(group={"ours": "debora"})
        assert [row.label for row in found.rows if found.is_best(row, found.columns[0])] == ["debora"]

    def test_row_belongs_to_the_first_group(self) -> None:
        found = shown(group={"first": "head|lora", "second": "lora*"})
        assert [each.title for each in found.sections if each.title] == ["first", "second"]
        assert [row.label for row in found.sections[1].rows] == ["lora", "head"]


class TestMistakes:
    @pytest.mark.parametrize(
        ("choice", "told"),
        [
            ({"rows": ["debroa"]}, "unknown row to show 'debroa'. Did you mean 'debora'?"),
            ({"rows": ["debora", "full*"]}, "unknown row to show 'full*'"),
            ({"columns": ["digit"]}, "unknown column to show 'digit'. Did you mean 'digits'?"),
            ({"columns": ["digits", "memry"]}, "Did you mean 'memory'?"),
            ({"group": {"a": "rank_of"}}, "unknown row or parameter to group by 'rank_of'. Did you mean 'ranks_of'?"),
            ({"columns": ["parameters"]}, "nothing is left to show"),
        ],
    )
    def test_name_that_matches_nothing(self, choice: dict[str, Any], told: str) -> None:
        with pytest.raises(InputError, match=re.escape(told)):
            shown(**choice)

    def test_of_runs_still_to_come_is_a_line(self) -> None:
        boards, lines = leaderboards(runs_of(runs(), NAMING)), list[str]()
        choice = Selection(rows=("lora", "full"), group={"pruned": "size_of"})
        (found,) = selected(boards, choice, lines.append)
        assert labels(found) == ["lora"]
        assert len(lines) == 2
        assert lines[0].startswith("shown without it: unknown row to show 'full'")


SWEEP = """
methods = ["head", "lora[rank=4]"]
tasks = ["rotten_tomatoes"]

[report]
rows = ["lora[rank=*]"]
columns = ["rotten_tomatoes", "parameters"]
group = { small = "rank" }
"""


class TestSweepFile:
    def written(self, folder: Path, old: str = "", new: str = "") -> Path:
        path = folder / "sweep.toml"
        path.write_text(SWEEP.replace(old, new) if old else SWEEP)
        return path

    def test_read_and_validated(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = self.written(tmp_path)
        assert sweep_file.read(path)["report"]["group"] == {"small": "rank"}
        assert cli.main(["validate", str(path)]) == 0
        assert "in order" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("old", "new", "line", "told"),
        [
            ("rows =", "row =", 6, "unknown parameter of report 'row'. Did you mean 'rows'?"),
            ('["lora[rank=*]"]', '"lora"', 6, "it should be a list"),
            ("lora[rank=*]", "lora[rnk=*]", 6, "unknown row to show 'lora[rnk=*]'"),
            ('s", "parameters"', 's", "parameter"', 7, "Did you mean 'parameters'?"),
            ('["rotten_tomatoes", "p', '["rotten_tomatos", "p', 7, "Did you mean 'rotten_tomatoes'?"),
            ('"rank" }', '"rnak" }', 8, "unknown row or parameter to group by 'rnak'. Did you mean 'rank'?"),
        ],
    )
    def test_mistake_is_told_with_its_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, line: int, told: str
    ) -> None:
        assert cli.main(["validate", str(self.written(tmp_path, old, new))]) == 2
        error = capsys.readouterr().err
        assert f"sweep.toml, line {line}: " in error
        assert told in error

    def test_report_makes_the_same_table_again(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Its page and its tables hold what is asked for, and options win over the file."""
        several = [
            record(method, "rotten_tomatoes", seed=seed, method_parameters=parameters)
            for method, parameters in {"head": {}, "lora": {"rank": 4}}.items()
            for seed in (0, 1)
        ]
        stored(tmp_path, *several)
        command = ["report", "--results", str(tmp_path), "--config", str(self.written(tmp_path))]
        made = []
        for options in ([], [], ["--rows", "head"]):
            assert cli.main([*command, *options]) == 0
            capsys.readouterr()
            made.append((tmp_path / "tables" / "leaderboard.csv").read_text())
        assert made[0] == made[1]
        found = [{line["label"] for line in csv.DictReader(text.splitlines())} for text in made]
        assert [len(each) for each in found] == [1, 1, 1]
        assert found[2] == {"head"}
        assert next(iter(found[0])).startswith("lora[")

    def test_run_shows_the_same(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Also where a row that is asked for has no run yet."""
        store = stored(tmp_path, *runs())
        ids = [each.run_id for each in store.records()]
        assert show_sweep(store, ids, "off", Selection(rows=("head", "full"), columns=("rest", "rank"))) == 0
        printed = capsys.readouterr()
        table = printed.out.partition("method")[2].partition("records")[0]
        assert "head" in table
        assert "debora" not in table
        assert "shown without it: unknown row to show 'full'" in printed.err


class TestNarrowTerminal:
    def test_no_line_is_longer(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stored(tmp_path, *runs())
        monkeypatch.setenv("COLUMNS", "80")
        assert cli.main(["report", "--results", str(tmp_path)]) == 0
        table = capsys.readouterr().out.partition("\nrecords ")[0]
        assert 60 < max(map(len, table.splitlines())) <= 80


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "told"),
        [
            (["--rows", ""], "--rows '' is not allowed"),
            (["--rows", "debroa"], "Did you mean 'debora'?"),
            (["--columns", "digit"], "Did you mean 'digits'?"),
            (["--group", "controls"], "--group 'controls' cannot be read"),
            (["--group", "=a"], "--group '=a' cannot be read"),
            (["--group", "a=|"], "--group 'a=|' cannot be read"),
            (["--group", "a=rank_off"], "unknown row or parameter to group by 'rank_off'"),
            (["--config", "none.toml"], "none.toml"),
        ],
    )
    def test_wrong_ones_are_one_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
    ) -> None:
        stored(tmp_path, *runs())
        assert cli.main(["report", "--results", str(tmp_path), *options]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert len(error.splitlines()) == 1

    def test_group_given_twice_has_both(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        stored(tmp_path, *runs())
        groups = ["--group", "plain=head", "--group", "plain=debora"]
        assert cli.main(["report", "--results", str(tmp_path), "--rows", "lora[*],head,debora", *groups]) == 0
        table = capsys.readouterr().out.partition("\nplain")[2]
        assert [line.split()[0] for line in table.splitlines()[1:3]] == ["head", "debora"]
