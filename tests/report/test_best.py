"""Best is earned: marks are among rows that have every seed of a column, and the table says so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.record.record import RunRecord
from harness.report.board.leaderboard import Board, leaderboards
from harness.report.board.runs import runs_of
from harness.report.evidence.compare import ExampleReader, with_ties
from harness.report.forms.data import structured
from harness.report.forms.text import console, markdown
from harness.report.tables.paper import against_paper
from tests.support.report_records import NAMING, board, record, stored

COLA = {"task": "glue/cola", "headline": "matthews_correlation"}


def over(method: str, seeds: Sequence[int], mean: float, task: str = "digits") -> list[RunRecord]:
    """Runs that differ a little."""
    return [record(method, task, seed, mean + 0.01 * (seed % 2)) for seed in seeds]


def best_of(found: Board, place: int = 0) -> list[str]:
    return [row.label for row in found.rows if found.is_best(row, found.columns[place])]


class TestAmong:
    def test_single_run_is_not_best_beside_rows_of_several_seeds(self) -> None:
        found = board(*over("a", range(5), 0.7), *over("b", range(5), 0.6), record("c", seed=3, score=0.9))
        assert best_of(found) == ["a"]
        assert [row.label for row in found.rows] == ["a", "b", "c"]
        assert found.among == "Best among rows with seeds 0-4."

    def test_many_single_runs_do_not_make_the_set(self) -> None:
        """As controls do that are a row for each run: more rows than all others."""
        single = [record("control", seed=0, score=0.9, method_parameters={"size": size}) for size in range(20)]
        found = board(*over("a", range(3), 0.7), *over("b", range(3), 0.6), *single)
        assert best_of(found) == ["a"]
        assert found.n == 3

    def test_set_is_that_of_the_largest_group(self) -> None:
        """One row went on to more seeds: it has those of the others, and is ranked with them."""
        found = board(*over("a", range(3), 0.7), *over("b", range(3), 0.6), *over("c", range(6), 0.8))
        assert found.seeds == {"digits": (0, 1, 2)}
        assert best_of(found) == ["c"]
        assert len(found.sections) == 1

    def test_of_groups_of_one_size_the_set_is_the_larger(self) -> None:
        runs = [
            *over("a", range(4), 0.5),
            *over("b", range(4), 0.4),
            *over("c", range(2), 0.9),
            *over("d", [0, 1], 0.8),
        ]
        found = board(*runs)
        assert best_of(found) == ["a"]
        assert found.among == "Best among rows with seeds 0-3."

    def test_no_best_of_one_row(self) -> None:
        found = board(*over("a", range(3), 0.7), *over("b", range(2), 0.8))
        assert best_of(found) == []
        assert not found.best

    def test_run_without_a_score_is_a_seed_that_is_lacking(self) -> None:
        failed = record("c", seed=1, score=None, status="diverged")
        found = board(*over("a", range(2), 0.7), *over("b", range(2), 0.6), record("c", seed=0, score=0.9), failed)
        assert [(section.ranked, len(section.rows)) for section in found.sections] == [(True, 2), (False, 1)]

    def test_each_column_has_its_own_seeds(self) -> None:
        runs = [*over("a", range(3), 0.7), *over("b", range(3), 0.6)]
        runs += [*over("a", [0, 1, 4], 0.7, "rest"), *over("b", [0, 1, 4], 0.6, "rest"), record("a", "single")]
        assert board(*runs).among == (
            "Best among rows with seeds 0-2 (digits); seeds 0-1, 4 (rest). One run each (single): no best is marked."
        )

    def test_row_with_every_seed_on_one_task_stays_above_the_rule(self) -> None:
        runs = [*over("a", range(3), 0.7), *over("b", range(3), 0.6), *over("c", range(3), 0.8)]
        runs += [*over("a", range(3), 0.7, "rest"), *over("b", range(3), 0.6, "rest"), record("c", "rest", score=0.9)]
        found = board(*runs)
        assert len(found.sections) == 1
        assert (best_of(found, 0), best_of(found, 1)) == (["c"], ["a"])

    def test_second_is_among_the_same_rows(self) -> None:
        found = board(*over("a", range(2), 0.7), *over("b", range(2), 0.6), record("c", score=0.69))
        assert [row.label for row in found.rows if found.is_second(row, found.columns[0])] == ["b"]

    def test_ties_are_among_the_same_rows(self, tmp_path: Path) -> None:
        others = [record("b", seed=seed, score=0.705 - 0.01 * (seed == 0)) for seed in range(4)]
        store = stored(tmp_path, *over("a", range(4), 0.7), *others, *over("c", [1, 2], 0.7))
        (found,) = leaderboards(runs_of(store.records(), NAMING))
        found = with_ties(found, ExampleReader(store))
        assert found.ties["digits"] == {"b"}
        assert not any(note.startswith("Not tested") and "c" in note.split() for note in found.notes)


class TestTables:
    found = board(*over("a", range(5), 0.7), *over("b", range(5), 0.6), record("c", seed=3, score=0.9))

    def test_console_has_a_rule(self) -> None:
        lines = console(self.found).splitlines()
        rule = lines.index(next(line for line in lines if line.startswith("(fewer seeds)"))) - 1
        assert set(lines[rule]) == {"-", " "}
        assert lines[rule + 2].startswith("c ")
        assert "over n = 5 runs" in " ".join(lines)
        assert "Best among rows with seeds 0-4." in " ".join(" ".join(lines).split())

    def test_markdown_has_a_heading(self) -> None:
        lines = [line for line in markdown([self.found]).splitlines() if line.startswith("|")]
        assert [line.split("|")[1].strip() for line in lines[2:]] == ["a", "b", "*(fewer seeds)*", "c"]
        assert "**" not in lines[-1]

    def test_json_says_what_is_ranked(self) -> None:
        (setting,) = structured([self.found])["settings"]
        assert [row["cells"]["digits"]["is_ranked"] for row in setting["rows"]] == [True, True, False]
        assert setting["best_among"] == "Best among rows with seeds 0-4."

    def test_single_runs_are_not_marked_and_said_once(self) -> None:
        found = board(record("a", score=0.7), record("b", score=0.6, seed=1), record("c", score=None))
        for text in (" ".join(console(found).split()), markdown([found])):
            assert text.count("One run each: no best is marked.") == 1
            assert "(fewer seeds)" not in text
        assert "*" not in console(found)
        assert "**" not in markdown([found])

    def test_papers_figures_stand_beside_rows_with_every_seed(self) -> None:
        lora = {"rank": 8, "targets": ["query", "value"]}
        several = [record("lora", seed=seed, score=0.6, method_parameters=lora, **COLA) for seed in range(2)]
        single = record("lora", score=0.6, method_parameters=lora | {"alpha": 4}, **COLA)
        text = against_paper(board(*several, single))
        assert "lora[alpha=4]" not in text.partition("Left out")[0]
        assert "Left out, with fewer seeds than the others of a column: lora[alpha=4]." in " ".join(text.split())
