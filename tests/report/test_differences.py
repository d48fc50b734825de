"""`report --baseline`: each row less one row, the same in every form, and "better" only after correction."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest

from harness import cli
from harness.errors import InputError
from harness.record.record import RunRecord
from harness.record.store import RecordStore
from harness.report.board.leaderboard import Board, leaderboards, sorted_by
from harness.report.board.runs import runs_of
from harness.report.evidence.compare import ExampleReader
from harness.report.forms import plain
from harness.report.statistics import crossed
from harness.report.tables.differences import (
    Differences,
    differences,
    differences_frame,
    differences_json,
    differences_table,
)
from harness.spec import TrainSpec
from tests.support.report_records import NAMING, predicted, record, stored

EXAMPLES = 300
TASKS = ("cola", "mrpc")
SHARES = {"lora": 0.7, "debora": 0.69, "head": 0.5, "full": 0.72}
SIZES = {"lora": 1000, "debora": 250, "head": 0, "full": 20_000}


def right(method: str, task: str, seed: int) -> np.ndarray:
    """(EXAMPLES,) which answers are right."""
    place = list(SHARES).index(method)
    random = np.random.default_rng([TASKS.index(task), seed, place]).random(EXAMPLES)
    hard = np.random.default_rng(TASKS.index(task)).random(EXAMPLES)
    return 0.6 * hard + 0.4 * random < SHARES[method]


def kept(folder: Path, cells: Iterable[tuple[str, str, int]]) -> RecordStore:
    """Runs of these methods, tasks and seeds, with their predictions."""
    store = stored(folder)
    references = np.random.default_rng(3).integers(0, 2, EXAMPLES)
    for method, task, seed in cells:
        is_right = right(method, task, seed)
        rows = {"train": 9, "holdout": 1, "validation": EXAMPLES}
        made = record(method, task, seed, float(is_right.mean()), rows=rows, numbers=SIZES[method])
        draft = store.draft(made.run_id)
        predicted(draft, np.where(is_right, references, 1 - references), references)
        store.write(made, [], draft)
    return store


def grid(methods: Sequence[str] = tuple(SHARES), seeds: int = 3) -> list[tuple[str, str, int]]:
    return [(method, task, seed) for method in methods for task in TASKS for seed in range(seeds)]


def found_in(store: RecordStore, baseline: str = "lora") -> Differences:
    boards = leaderboards(runs_of(store.records(), NAMING))
    (found,) = differences(boards, baseline, ExampleReader(store)).values()
    return found


def texts(found: Differences, board: Board | None = None) -> dict[str, list[str]]:
    """By label, the other cells of the table."""
    return {row[0].text: [str(entry) for entry in row[1:]] for row in differences_table(found, board).rows}


def of_records(folder: Path, *records: RunRecord) -> Differences:
    return found_in(stored(folder, *records))


class TestNumbers:
    def test_a_board_of_the_baseline_alone_has_no_table(self, tmp_path: Path) -> None:
        store = kept(tmp_path, [(method, "cola", seed) for method in ("lora", "head") for seed in (0, 1)])
        records = list(store.records())
        boards = leaderboards(runs_of([*records, record("lora", "cola", 0, train=TrainSpec(batches=50))], NAMING))
        assert [len(board.rows) for board in boards] == [2, 1]
        found = differences(boards, "lora", ExampleReader(store))
        assert [list(each.rows) for each in found.values()] == [["head"]]

    def test_are_those_of_a_slow_reference(self, tmp_path: Path) -> None:
        frame = differences_frame(found_in(kept(tmp_path, grid())))
        by_task: dict[str, dict[str, float]] = {}
        for task in TASKS:
            for method in ("debora", "head", "full"):
                apart = np.array([[0.0] * EXAMPLES for _ in range(3)])
                for seed in range(3):
                    apart[seed] = right(method, task, seed) * 1.0 - right("lora", task, seed) * 1.0
                expected = crossed(apart)
                assert expected is not None
                ((_, line),) = frame[(frame["method"] == method) & (frame["task"] == task)].iterrows()
                assert line["difference"] == pytest.approx(apart.mean())
                assert (line["low"], line["high"]) == pytest.approx(expected.interval)
                assert line["p"] == pytest.approx(expected.p_value)
                assert (line["seeds"], line["examples"]) == (3, EXAMPLES)
                by_task.setdefault(task, {})[method] = expected.p_value
        for task, values in by_task.items():  # Holm by hand: smallest times three, next times two, never falling
            highest = 0.0
            for place, (method, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
                highest = max(highest, min(1.0, p * (3 - place)))
                line = frame[(frame["method"] == method) & (frame["task"] == task)].iloc[0]
                assert line["holm_p"] == pytest.approx(highest)
                sign = "better" if line["difference"] > 0 else "worse"
                assert line["verdict"] == (sign if highest < 0.05 else "not significantly different")

    def test_over_tasks_the_mean_with_holm_over_the_rows(self, tmp_path: Path) -> None:
        frame = differences_frame(found_in(kept(tmp_path, grid())))
        overall = frame[frame["task"] == "over tasks"].set_index("method")
        for method, line in overall.iterrows():
            of_tasks = frame[(frame["method"] == method) & (frame["task"] != "over tasks")]
            assert line["difference"] == pytest.approx(of_tasks["difference"].astype(float).mean())
        assert overall.loc["head", "verdict"] == "worse"
        assert overall.loc["debora", "verdict"] == "not significantly different"
        assert sorted(overall["holm_p"] >= overall["p"]) == [True] * 3

    def test_share_of_the_baselines_parameters(self, tmp_path: Path) -> None:
        store = kept(tmp_path, grid())
        shares = {label: each.share for label, each in found_in(store).rows.items()}
        assert shares == {"debora": 0.25, "head": 0.0, "full": 20.0}
        assert {each.share for each in found_in(store, "head").rows.values()} == {None}  # of nothing

    def test_a_share_is_over_the_tasks_that_both_have(self, tmp_path: Path) -> None:
        sizes = {("lora", "a"): 100, ("lora", "b"): 900, ("head", "a"): 50}
        runs = [record(method, task, numbers=size) for (method, task), size in sizes.items()]
        assert found_in(stored(tmp_path, *runs)).rows["head"].share == 0.5

    def test_lower_is_better(self, tmp_path: Path) -> None:
        runs = [
            record(m, seed=s, score=score + 0.001 * s * s * (m == "head"), headline="loss", higher_is_better=False)
            for m, score in (("lora", 0.4), ("head", 0.2))
            for s in range(4)
        ]
        found = of_records(tmp_path, *runs)
        assert texts(found)["head"][1].endswith("better")
        assert ("digits", "loss, lower is better, n = 4") in differences_table(found).headings

    def test_better_only_after_correction(self, tmp_path: Path) -> None:
        """One of many rows with p just below 0.05 alone is not better."""
        noise = [0.0, 0.011, -0.012, 0.002, 0.02]
        lora = [record("lora", seed=seed) for seed in range(5)]
        good = [record("head", seed=seed, score=0.516 + noise[seed]) for seed in range(5)]
        others = [
            record("debora", method_parameters={"tau": 1.0 + tau, "rank": 8}, seed=seed, score=0.5 + noise[seed - tau])
            for tau in range(4)
            for seed in range(5)
        ]
        alone, among = (of_records(tmp_path / str(len(some)), *lora, *good, *some) for some in ([], others))
        assert texts(alone)["head"][1].endswith("better")
        assert not texts(among)["head"][1].endswith("better")
        assert among.rows["head"].on["digits"].difference == alone.rows["head"].on["digits"].difference


class TestCellsWithoutATest:
    def test_say_why(self, tmp_path: Path) -> None:
        runs = [
            *(record("lora", task, seed, 0.5 + 0.01 * seed) for task in ("a", "b") for seed in range(3)),
            *(record("head", "a", seed) for seed in (7, 8)),  # other seeds
            record("full", "a", 1, 0.61),  # one of them
            *(record("bitfit", "a", seed, 0.6 + 0.01 * seed) for seed in range(3)),  # the same difference at each
            *(record("debora", task, seed, 0.5 + 0.03 * seed) for task in ("a", "b") for seed in (1, 2)),
            *(record("adalora", "a", seed, None) for seed in range(3)),  # failed
        ]
        found = of_records(tmp_path, *runs)
        shown = texts(found)
        assert shown["head"] == ["1", "no common seeds", "-", "not available"]
        assert shown["full"] == ["1", "+0.100 (one seed)", "-", "not available"]
        assert shown["bitfit"] == ["1", "+0.100 (no spread)", "-", "not available"]
        assert shown["adalora"][1] == "no common seeds"
        assert shown["debora"][1].startswith("+0.030 ± ")
        verdicts = differences_frame(found).set_index(["method", "task"])["verdict"]
        assert verdicts["head", "a"] == "no common seeds"
        assert verdicts["full", "a"] == verdicts["bitfit", "a"] == "not tested"
        assert ("head", "b") not in verdicts.index

    def test_a_task_without_the_baseline(self, tmp_path: Path) -> None:
        runs = [record("lora", "a", seed, 0.5 + 0.1 * seed) for seed in range(2)]
        runs += [record("head", task, seed) for task in ("a", "b") for seed in range(2)]
        assert texts(of_records(tmp_path, *runs))["head"][2] == "no common seeds"

    def test_a_number_of_seeds_that_is_not_the_usual_one_is_given(self, tmp_path: Path) -> None:
        cells = [cell for cell in grid() if cell[0] != "full" or cell[2] < 2]
        shown = texts(found_in(kept(tmp_path, cells)))
        assert all("(n=2)" in text for text in shown["full"][1:3])
        assert not any("n=" in text for label in ("head", "debora") for text in shown[label])

    def test_seeds_alone_are_named(self, tmp_path: Path) -> None:
        runs = [record(m, seed=s, score=0.5 + 0.1 * s * (m == "head")) for m in ("lora", "head") for s in range(3)]
        notes = " ".join(differences_table(of_records(tmp_path, *runs)).notes)
        assert "Over seeds alone on digits, for want of usable predictions: head." in notes

    def test_one_task_has_no_column_over_tasks(self, tmp_path: Path) -> None:
        found = found_in(kept(tmp_path, [cell for cell in grid() if cell[1] == "cola"]))
        assert [name for name, _ in differences_table(found).headings] == ["method", "parameters", "cola"]

    def test_tasks_of_both_senses_have_none(self, tmp_path: Path) -> None:
        runs = [
            record(m, task, s, 0.5 + 0.1 * s * (m == "head"), headline=headline, higher_is_better=headline != "loss")
            for m in ("lora", "head")
            for task, headline in (("a", "accuracy"), ("b", "loss"))
            for s in range(3)
        ]
        assert not of_records(tmp_path, *runs).has_overall


class TestForms:
    def test_all_say_the_same(self, tmp_path: Path) -> None:
        found = found_in(kept(tmp_path, grid()))
        table = differences_table(found)
        shown = texts(found)
        console, markdown = plain.console(table), plain.markdown("Differences", [table])
        tex = plain.latex([table], "differences")
        for label, cells in shown.items():
            (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {label} ")]
            assert [cell.strip() for cell in line.strip("|").split("|")][1:] == cells
            for text in cells:
                assert text in console
            number = cells[1].split()[0]
            assert f"${number}$" in tex
        values = differences_json([found])["settings"][0]
        assert values["baseline"] == "lora"
        for row in values["rows"]:
            assert f"{row['cells']['cola']['difference']:+.3f}" == shown[row["label"]][1].split()[0]

    def test_the_console_stays_within_its_width(self, tmp_path: Path) -> None:
        runs = [record(m, f"glue/task-{t}", s) for m in ("lora", "head") for t in range(12) for s in range(2)]
        for width in (80, 110):
            text = plain.console(differences_table(of_records(tmp_path, *runs)), width)
            assert max(map(len, text.splitlines())) <= width
            assert text.count("no spread") >= 12

    def test_rows_are_in_the_order_of_the_printed_board(self, tmp_path: Path) -> None:
        store = kept(tmp_path, grid())
        boards = leaderboards(runs_of(store.records(), NAMING))
        found = found_in(store)
        (by_size,) = sorted_by(boards, "parameters")
        assert list(texts(found, by_size)) == ["head", "debora", "full"]

    @pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
    @pytest.mark.parametrize("rows", [3, 90])
    def test_latex_can_be_set(self, tmp_path: Path, rows: int) -> None:
        runs = [record("lora", task, s, 0.5 + 0.01 * s) for task in ("a_b", "c&d", "评论", "e", "f") for s in range(2)]
        runs += [
            record("debora", run.spec.task, run.spec.seed, method_parameters={"tau": float(tau), "rank": 8})
            for run in runs
            for tau in range(rows)
        ]
        table = differences_table(of_records(tmp_path / "store", *runs))
        (tmp_path / "table.tex").write_text(plain.latex([table], "differences"))
        packages = r"\usepackage{array,booktabs,longtable}"
        text = rf"\documentclass{{article}}{packages}\begin{{document}}\input{{table.tex}}\end{{document}}"
        (tmp_path / "main.tex").write_text(text)
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"]
        made = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True)
        log = (tmp_path / "main.log").read_text(errors="replace")
        assert made.returncode == 0, log
        assert "Overfull" not in log
        assert "too large" not in log


class TestCommand:
    NAMES = ("differences.md", "differences.tex", "differences.json", "differences.csv")

    def test_writes_and_prints_every_form_and_takes_them_away_again(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        store = kept(tmp_path, grid())
        assert cli.main(["report", "--results", str(tmp_path), "--baseline", "lora"]) == 0
        assert "Differences to lora. Model" in capsys.readouterr().out
        assert "Differences to lora" in (tmp_path / "report.html").read_text()
        for name in self.NAMES:
            assert (tmp_path / "tables" / name).is_file()
        with (tmp_path / "tables" / "differences.csv").open() as file:
            lines = list(csv.DictReader(file))
        expected = differences_frame(found_in(store))
        assert [float(line["difference"]) for line in lines] == pytest.approx(list(expected["difference"]))
        assert json.loads((tmp_path / "tables" / "differences.json").read_text())["settings"][0]["rows"]
        assert cli.main(["report", "--results", str(tmp_path)]) == 0
        assert not [name for name in self.NAMES if (tmp_path / "tables" / name).exists()]
        assert "Differences to" not in (tmp_path / "report.html").read_text()

    def test_the_report_table_of_a_sweep_names_it(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        stored(tmp_path, record("lora"), record("head"))
        sweep = tmp_path / "sweep.toml"
        for baseline in ("lora", "full"):
            sweep.write_text(f'methods = ["lora"]\ntasks = ["digits"]\n[report]\nbaseline = "{baseline}"\n')
            assert cli.main(["report", "--results", str(tmp_path), "--config", str(sweep)]) == 0
        out, err = capsys.readouterr()
        assert out.count("Differences to lora.") == 1
        assert "shown without it: unknown row for the baseline 'full'" in err  # its runs may be still to come

    def test_what_is_shown_changes_no_figure(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        kept(tmp_path, grid())

        def table(*shown: str) -> list[dict[str, str]]:
            assert cli.main(["report", "--results", str(tmp_path), "--baseline", "lora", *shown]) == 0
            with (tmp_path / "tables" / "differences.csv").open() as file:
                return list(csv.DictReader(file))

        every, narrow = table(), table("--rows", "full,head", "--columns", "mrpc")
        chosen = [line for line in every if line["method"] in ("full", "head") and line["task"] != "cola"]
        assert sorted(narrow, key=str) == sorted(chosen, key=str)
        (setting,) = json.loads((tmp_path / "tables" / "differences.json").read_text())["settings"]
        assert [list(row["cells"]) for row in setting["rows"]] == [["mrpc"], ["mrpc"]]
        assert "with the rows that are not shown" in " ".join(capsys.readouterr().out.split())

    def test_only_settings_with_the_baseline_have_the_table(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stored(tmp_path, *(record(m, threads=t) for m, t in (("lora", 1), ("head", 1), ("head", 2))))
        assert cli.main(["report", "--results", str(tmp_path), "--baseline", "lora"]) == 0
        assert capsys.readouterr().out.count("Differences to lora") == 1

    def test_an_unknown_baseline_is_told_before_anything_is_written(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stored(tmp_path, record("lora"), record("head"))
        assert cli.main(["report", "--results", str(tmp_path), "--baseline", "lara"]) == 2
        message = capsys.readouterr().err
        assert message.startswith(
            "error: unknown row for the baseline 'lara'. Did you mean 'lora'? Available: head, lora"
        )
        assert message.count("\n") == 1
        assert not (tmp_path / "tables").exists()

    def test_a_method_with_several_rows_is_no_baseline(self, tmp_path: Path) -> None:
        runs = [record("debora", method_parameters={"tau": tau, "rank": 8}) for tau in (4.0, 8.0)]
        with pytest.raises(InputError, match=r"several are of this method.*debora\[tau=4\], debora\[tau=8\]"):
            found_in(stored(tmp_path, *runs), "debora")
        assert list(found_in(stored(tmp_path), "debora[tau=4]").rows) == ["debora[tau=8]"]
