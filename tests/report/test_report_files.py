"""The report's forms (console, CSV, LaTeX, pictures) and its files."""

from __future__ import annotations

import csv
import errno
import io
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import scipy.stats

from harness import cli
from harness.commands.report import brief
from harness.errors import InputError
from harness.record.store import RecordStore
from harness.report.board.leaderboard import leaderboards
from harness.report.board.runs import runs_of
from harness.report.build import Unwritten, build_report
from harness.report.forms.data import tidy
from harness.report.forms.latex_signs import escape
from harness.report.forms.page import page
from harness.report.forms.text import console
from harness.report.wording import human
from tests.support.report_records import NAMING, board, boards, record, stored


class TestBrief:
    @pytest.mark.parametrize(
        ("statuses", "words", "code"),
        [
            (["done"] * 3, "3 runs are finished: 3 done; nothing was new", 0),
            (["done", "unsupported"], "2 runs are finished: 1 done, 1 unsupported; nothing was new", 0),
            (["done", "out_of_memory", "failed"], "1 done, 1 failed, 1 out of memory;", 1),
            (["diverged"] * 2000, "2,000 runs are finished: 0 done, 2,000 diverged;", 1),
        ],
    )
    def test_two_lines(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], statuses: list[str], words: str, code: int
    ) -> None:
        store = RecordStore(tmp_path / "my results")
        assert brief(store, {str(place): status for place, status in enumerate(statuses)}) == code
        first, second = capsys.readouterr().out.splitlines()
        assert words in first
        assert f"python -m harness report --results '{store.results}'" in second


class TestForms:
    @pytest.mark.parametrize(
        ("number", "text"),
        [
            (0, "0"),
            (512, "512"),
            (36_864, "36.9k"),
            (1_330_000, "1.33M"),
            (999_999, "1.00M"),
            (7e9, "7.00G"),
            (512.5, "512"),
            (None, "-"),
        ],
    )
    def test_human(self, number: float | None, text: str) -> None:
        assert human(number) == text

    def test_console_stays_in_its_width(self) -> None:
        tasks = [f"glue/task{i}" for i in range(9)]
        found = board(*(record("debora", task, method_parameters={"tau": 8.0, "rank": 4}) for task in tasks))
        text = console(found, damaged=["abc"])
        assert max(map(len, text.splitlines())) <= 110
        assert all(task in text for task in tasks)
        assert "cannot be read: abc" in text

    def test_csv_is_exact_and_traceable(self) -> None:
        runs = [record(seed=seed, score=0.1 * (seed + 1), numbers=1_234_567, others={"f1": 0.5}) for seed in (0, 1)]
        rows = list(csv.DictReader(io.StringIO(tidy(boards(*runs)).to_csv(index=False))))
        assert [row["metric"] for row in rows] == ["accuracy", "f1"]
        assert rows[0]["parameters_final"] == "1234567"
        assert rows[0]["run_ids"].split() == [run.run_id for run in runs]
        assert float(rows[0]["mean"]) == pytest.approx(0.15)
        assert float(rows[0]["interval_95"]) == pytest.approx(scipy.stats.t.ppf(0.975, 1) * 0.05)

    def test_latex_escapes(self) -> None:
        assert escape(r"50% of $a_b & c#d {x}~^\ --e") == (
            r"50\% of \$a\_b \& c\#d \{x\}\textasciitilde{}\textasciicircum{}\textbackslash{} -{}-e"
        )
        assert escape("naïve τ ± 1\n[x]\x07") == r"na\"{\i}ve $\tau$ $\pm$ 1 [x]?"
        assert escape("it's 'a' ''b'' ?`c") == "it's 'a' '{}'b'{}' ?{}`c"
        assert escape("Ångström, garçon, Łódź … ß") == r"\r{A}ngstr\"{o}m, gar\c{c}on, \L{}\'{o}d\'{z} \ldots{} \ss{}"


class TestBuild:
    def test_writes_everything(self, tmp_path: Path) -> None:
        store = stored(tmp_path, record(), record(seed=1), record("head", numbers=0))
        paths = build_report(store, naming=NAMING)
        names = [f"tables/leaderboard.{form}" for form in ("md", "tex", "csv", "json")]
        names += ["tables/costs.csv"]
        names += ["pictures/score_vs_parameters.png", "pictures/score_vs_parameters.pdf", "report.html"]
        assert paths == [tmp_path / name for name in names]
        assert all(path.stat().st_size > 20 for path in paths)
        assert sorted(path for path in tmp_path.glob("[tp]*/*") if path not in paths) == []

    def test_same_records_give_the_same_bytes(self, tmp_path: Path) -> None:
        store = stored(tmp_path, record(), record("head", numbers=0), record("lora", "other", numbers=0))
        first = [path.read_bytes() for path in build_report(store)]
        assert [path.read_bytes() for path in build_report(store)] == first

    def test_a_picture_for_each_setting(self, tmp_path: Path) -> None:
        store = stored(tmp_path, record())
        build_report(store)
        stored(tmp_path, record(limit=50))
        pictures = [path.name for path in build_report(store) if path.suffix == ".png"]
        keys = sorted(found.key for found in leaderboards(runs_of(store.records())))
        assert sorted(pictures) == [f"score_vs_parameters_{key}.png" for key in keys]
        assert sorted(path.name for path in (tmp_path / "pictures").glob("*.png")) == sorted(pictures)
        assert (tmp_path / "tables" / "leaderboard.md").read_text(encoding="utf-8").count("## Setting") == 2

    def test_tables_that_have_no_rows_any_more_are_removed(self, tmp_path: Path) -> None:
        other = record("lora", method_parameters={"rank": 4}, numbers=500)
        store = stored(tmp_path, record("lora", method_parameters={"rank": 8}), other, record("head", numbers=500))
        names = {"sweeps.csv", "matched.csv"}
        assert names < {path.name for path in build_report(store)}
        shutil.rmtree(store.folder(other.run_id))
        assert not names & {path.name for path in build_report(store)}
        assert not names & {path.name for path in (tmp_path / "tables").iterdir()}

    def test_a_pdf_of_an_earlier_report_does_not_stay(self, tmp_path: Path) -> None:
        store = stored(tmp_path, record())
        assert len([path for path in build_report(store) if path.suffix == ".pdf"]) == 1
        assert not [path for path in build_report(store, forms=("png",)) if path.suffix == ".pdf"]
        assert [path.suffix for path in (tmp_path / "pictures").iterdir()] == [".png"]

    def test_runs_that_cannot_be_drawn(self, tmp_path: Path) -> None:
        paths = build_report(stored(tmp_path, record(score=None, status="unsupported", parameters=None)))
        assert not any(path.parent.name == "pictures" for path in paths)

    def test_many_configurations_share_their_methods_colour(self, tmp_path: Path) -> None:
        runs = [record("debora", method_parameters={"tau": tau, "rank": 8}, numbers=tau) for tau in range(1, 40)]
        paths = build_report(stored(tmp_path, *runs), naming=NAMING)
        assert len([path for path in paths if path.parent.name == "pictures"]) == 2

    def test_no_records(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"no records in .*runs: run `python -m harness run \.\.\.` first"):
            build_report(RecordStore(tmp_path))

    def test_damaged_runs_are_named(self, tmp_path: Path) -> None:
        store = stored(tmp_path, record())
        store.folder("0123456789abcdef").mkdir()
        build_report(store)
        assert "cannot be read: 0123456789abcdef." in (tmp_path / "tables" / "leaderboard.md").read_text(
            encoding="utf-8"
        )
        shutil.rmtree(store.folder(record().run_id))
        with pytest.raises(InputError, match="unreadable: 0123456789abcdef"):
            build_report(store)

    @pytest.mark.parametrize("error", [OSError("disk full"), ValueError("a bad\nrecord"), RecursionError()])
    def test_a_picture_that_fails_is_a_line_and_its_old_one_stays(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        store = stored(tmp_path, record())
        paths = build_report(store)
        pictures = [path for path in paths if path.parent.name == "pictures"]
        before = [path.read_bytes() for path in pictures]

        def fail(figure: object, png: Path, *others: Path) -> None:
            png.write_bytes(b"half a pict")
            raise error

        monkeypatch.setattr("harness.report.pictures.figures.save", fail)
        told: list[str] = []
        assert build_report(store, tell=told.append) == [path for path in paths if path not in pictures]
        (line,) = told
        assert line.startswith("picture 'score_vs_parameters' cannot be made (")
        assert "\n" not in line
        assert [path.read_bytes() for path in pictures] == before
        assert sorted((tmp_path / "pictures").iterdir()) == sorted(pictures)
        assert not list(store.running.iterdir())

    @pytest.mark.parametrize("name", ["tables", "pictures"])
    def test_a_file_where_a_folder_should_be_costs_that_folder_only(self, tmp_path: Path, name: str) -> None:
        store = stored(tmp_path, record())
        (tmp_path / name).write_text("a file")
        with pytest.raises(Unwritten, match=f"/{name}' cannot be written .*; make it a folder") as caught:
            build_report(store)
        parts = {"tables", "pictures", tmp_path.name} - {name}
        assert {path.parent.name for path in caught.value.paths} == parts
        assert all(path.stat().st_size > 20 for path in caught.value.paths)
        assert (tmp_path / name).read_text() == "a file"

    def test_several_at_once_do_not_fail_each_other(self, tmp_path: Path) -> None:
        """Each is in a process of its own, and all begin when the last is ready; then the numbers of tables and of
        pictures fall, so that each removes what others may be at."""
        runs = [record("lora", method_parameters={"rank": rank}, numbers=100 * rank) for rank in (4, 8)]
        store = stored(tmp_path, *runs, record("head", numbers=800))
        build_report(store)
        code = (
            "import sys; from pathlib import Path; from harness.record.store import RecordStore; "
            "from harness.report.build import build_report; from harness.report import pictures; "
            "print(flush=True); sys.stdin.readline(); "
            f"[build_report(RecordStore(Path({str(tmp_path)!r})), forms=forms) for forms in (('png', 'pdf'), ('png',))]"
        )
        others = [
            subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(4)
        ]
        for other in others:
            assert other.stdout is not None
            other.stdout.readline()
        shutil.rmtree(store.folder(runs[0].run_id))
        for other in others:
            assert other.stdin is not None
            other.stdin.write("\n")
            other.stdin.flush()
        for other in others:
            other.communicate(timeout=120)
        assert [other.returncode for other in others] == [0] * 4
        there = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "runs" not in path.parts}
        paths = build_report(store, forms=("png",))
        assert {path: path.read_bytes() for path in paths} == there

    def test_another_may_remove_what_this_one_is_at(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its pictures before they are in the page, and an old one before it is removed here."""
        store = stored(tmp_path, record())
        build_report(store)
        unlink = Path.unlink

        def removed_before(*arguments: Any) -> str:
            for path in (tmp_path / "pictures").glob("*.png"):
                unlink(path)
            return page(*arguments)

        def late(path: Path, missing_ok: bool = False) -> None:
            unlink(path)
            if not missing_ok:
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))

        monkeypatch.setattr("harness.report.build.page", removed_before)
        monkeypatch.setattr(Path, "unlink", late)
        paths = build_report(store, forms=("png",))
        assert "data:image/png" in (tmp_path / "report.html").read_text(encoding="utf-8")
        assert [path.name for path in paths if path.parent.name == "pictures"] == ["score_vs_parameters.png"]
        assert list((tmp_path / "pictures").iterdir()) == [tmp_path / "pictures" / "score_vs_parameters.png"]

    def test_what_a_killed_report_has_left_goes(self, tmp_path: Path) -> None:
        store = stored(tmp_path, record())
        code = (
            f"from pathlib import Path; from harness.record.store import RecordStore; "
            f"(RecordStore(Path({str(tmp_path)!r})).draft('report') / 'tables').mkdir()"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
        assert len(list(store.running.iterdir())) == 1
        build_report(store)
        assert not list(store.running.iterdir())

    def test_the_command_shows_what_it_could_not_write(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stored(tmp_path, record())
        (tmp_path / "tables").write_text("a file")
        assert cli.main(["report", "--results", str(tmp_path)]) == 2
        out, err = capsys.readouterr()
        assert "0.500" in out
        assert "report.html" in out
        (line,) = err.splitlines()
        assert line.startswith(f"error: '{tmp_path}/tables' cannot be written")

    def test_imports_no_torch(self) -> None:
        modules = (
            "harness.report.build, harness.report.pictures.every, harness.report.tables.paper, harness.record.mlflow"
        )
        code = f"import sys, {modules}; assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
