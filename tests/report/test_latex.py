"""Leaderboards as LaTeX: what people edit, and whether it fits its page."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from harness import cli
from harness.report.board.columns import COLUMNS, TableColumn
from harness.report.board.leaderboard import Board, leaderboards
from harness.report.board.rows import Section
from harness.report.board.runs import runs_of
from harness.report.forms.latex import latex
from harness.report.forms.latex_cells import STYLES, number, plain
from harness.report.forms.latex_table import Part, Table, document
from tests.support.report_records import NAMING, board, boards, record, stored

LONG = {
    "rank": 4,
    "geometry": "oblique",
    "initial_learning_rate_of_the_upper_level_problem_and_more": 0.0001,
    "targets": "query" * 30,
}
STATUSES = ["unsupported", "diverged", "out_of_memory", "failed"]


def scored(rows: int = 2, tasks: Iterable[str] = ("digits",), **changes) -> Board:
    """A board with two seeds a cell."""
    return board(
        *(
            record(f"method_{row}", task, seed, 0.5 + 0.003 * row + 0.02 * seed, **changes)
            for row in range(rows)
            for task in tasks
            for seed in (0, 1)
        )
    )


def failing() -> Board:
    """A board with failures of every kind, alone and beside scores."""
    error = "".join(map(chr, range(1, 400)))
    fails = [
        record(method, f"glue/{status}", seed, score=None, status=status, error=error)
        for status in STATUSES
        for method, seeds in (("lora", (1,)), ("debora", (0, 1)))
        for seed in seeds
    ]
    mixed = [record("head", "glue/failed", seed, score=None, status=status) for seed, status in enumerate(STATUSES)]
    return board(*fails, *mixed, *(record("lora", f"glue/{status}", 0, 0.5) for status in STATUSES))


def with_ties() -> Board:
    found = scored(5, ["digits", "glue/cola"])
    return dataclasses.replace(found, ties={"digits": frozenset(f"method_{row}" for row in (1, 2, 3))})


class Grouped(Board):
    """A board whose third row stands below a title and whose last is not ranked."""

    @property
    def sections(self) -> tuple[Section, ...]:
        rows = self.rows
        return Section("", rows[:2]), Section("controls", rows[2:-1]), Section("", rows[-1:], ranked=False)


def grouped() -> Board:
    found = scored(4)
    return Grouped(**{field.name: getattr(found, field.name) for field in dataclasses.fields(found)})


def with_a_long_column() -> Board:
    own = TableColumn(
        "own_words_that_fill_more_than_a_line", lambda row: 1.0, "of one's own", lambda _: "wide words " * 9
    )
    (made,) = leaderboards(runs_of([record(), record(seed=1)], NAMING), table=(*COLUMNS, own))
    return made


def many_kinds() -> list[Board]:
    foreign = [
        "text:评论",
        "text:新闻 हिन्दी",
        "text:שלום",
        "text:😀 face",
        "text:\U0001fae0",
        "text:отзывы",
        "text:café",
    ]
    long_names = [
        record("debora", "digits", seed, method_parameters=LONG | {"tau": tau}) for seed in (0, 1) for tau in (2, 4)
    ]
    return [
        scored(),
        board(record(score=-0.5)),  # a single run
        scored(3, [f"glue/task_{place}" for place in range(20)]),
        *(scored(rows) for rows in (30, 34, 38, 42, 100)),  # one page, about one, several
        scored(100, [f"text:{'WM' * 30}_{place}" for place in range(6)]),
        board(*long_names),
        *boards(*(record("WWWW" * 30, task, seed) for task in foreign for seed in (0, 1))),
        *boards(*(record(f"评{place}[论", f"[{place}]*", score=12345.6 * place - 2) for place in range(4))),
        failing(),
        with_ties(),
        grouped(),
        with_a_long_column(),
    ]


def in_sections() -> str:
    """A table in parts, with a title that is longer than the table, and rows that begin with what LaTeX may take."""
    rows = [[plain(name), number("0.801", "0.016", "side")] for name in ("[a]", "*", "评", "lora[rank=4, alpha=8]")]
    parts = [Part(rows), Part(rows, "A title that takes more than a line of a narrow table"), Part(rows, "", True)]
    return document([Table("parts", "In parts.", ["", "score"], parts, "ll", ["*", "[1] a note"])])


def rows_of(text: str) -> list[str]:
    """The lines of source that are rows of a table."""
    return [line for line in text.splitlines() if line.endswith(r" \\") and not line.startswith(r"\caption")]


class TestSource:
    @pytest.mark.parametrize(
        ("style", "best", "second"),
        [
            ("subscript", r"\textbf{0.800}$_{\pm.000}$", r"\underline{0.750}$_{\pm.000}{}^{\approx}$"),
            ("side", r"\textbf{0.800} $\pm$ 0.000", r"\underline{0.750}$^{\approx}$ $\pm$ 0.000"),
            ("siunitx", r"\textbf{\num{0.800 +- 0.000}}", r"\underline{\num{0.750 +- 0.000}}$^{\approx}$"),
        ],
    )
    def test_a_row_is_a_line(self, style, best, second):
        scores = {"lora": 0.8, "my_method": 0.75}
        found = board(*(record(method, seed=seed, score=scores[method]) for method in scores for seed in (0, 1)))
        lines = latex([dataclasses.replace(found, ties={"digits": frozenset(["my_method"])})], style=style).splitlines()
        assert rf"lora & 1.00k & {best} & default & 60 \\" in lines
        assert rf"my\_method & 1.00k & {second} & as given & 60 \\" in lines

    @pytest.mark.parametrize("style", STYLES)
    def test_nothing_is_nested_and_every_row_has_all_columns(self, style):
        for found in many_kinds():
            text = latex([found], style=style)
            for table in re.findall(
                r"\\begin\{(?:tabular|longtable)\}.*?\\end\{(?:tabular|longtable)\}", text, re.DOTALL
            ):
                assert table.count(r"\begin{") == 1
                rows = [row for row in rows_of(table) if not row.startswith(r"\multicolumn")]
                assert len({len(re.findall(r"(?<!\\)&", row)) for row in rows}) == 1
            named = [row for row in rows_of(text) if not row.startswith(("Method", " &", r"\multicolumn"))]
            assert len(named) % len(found.rows) == 0

    def test_a_run_alone_has_no_interval(self):
        assert r"lora & 1.00k & 0.500 & default & 60 \\" in latex(boards(record()))

    @pytest.mark.parametrize(
        ("value", "interval", "text"),
        [
            ("-0.020", "0.016", r"$-$0.020$_{\pm.016}$"),
            ("+1.5", "10.25", r"$+$1.5$_{\pm10.25}$"),
            ("12.000", None, "12.000"),
        ],
    )
    def test_numbers(self, value, interval, text):
        assert number(value, interval, "subscript").latex == text

    def test_labels_break_after_commas(self):
        text = latex(boards(record("debora", method_parameters={"tau": 2.0, "rank": 4, "geometry": "oblique", "x": 1})))
        assert r"p{130pt}" in text
        assert "\ndebora[tau=2, rank=4, geometry=oblique, x=1] & " in text

    def test_long_names_of_tasks_take_rows_of_the_header(self):
        text = latex([scored(tasks=["text:a_long_name_of_a_data_set", "text:short"])])
        assert "\n &  & text:a\\_long\\_ & " in text
        assert "\nMethod & Parameters & set & text:short &" in text

    def test_wide_tables_repeat_the_method(self):
        text = latex([scored(2, [f"glue/task_{place}" for place in range(20)])])
        blocks = text.count(r"\begin{tabular}")
        assert blocks > 1
        assert text.count("\nmethod\\_1 & ") == text.count("\nMethod & ") == blocks
        assert text.count(r"\caption") == text.count(r"\label") == 1

    def test_tall_tables_go_over_pages(self):
        short, tall = latex([scored(20)]), latex([scored(100)])
        assert r"\begin{table}" in short
        assert "longtable" not in short
        assert r"\begin{table}" not in tall
        assert tall.startswith(r"% In the preamble: \usepackage{booktabs,longtable}")

    def test_parts_stand_below_rules_and_the_last_is_grey(self):
        lines = in_sections().splitlines()
        assert lines[0] == r"% In the preamble: \usepackage{booktabs,xcolor}"
        assert lines.count(r"\midrule") == 3
        assert r"{}[a] & 0.801 $\pm$ 0.016 \\" in lines
        assert r"{}[1] & 0.801 $\pm$ 0.016 \\" in lines
        assert r"\textcolor{gray}{lora[rank=4, alpha=8]} & \textcolor{gray}{0.801 $\pm$ 0.016} \\" in lines

    def test_sections_of_a_board_are_parts(self):
        text = latex([grouped()])
        body = text[text.index(r"\midrule") : text.index(r"\bottomrule")].splitlines()
        assert [line.partition(" &")[0] for line in body] == [
            *(r"\midrule", r"method\_3", r"method\_2"),
            *(r"\midrule", r"\multicolumn{5}{l}{\itshape controls} \\", r"method\_1"),
            *(r"\midrule", r"\textcolor{gray}{method\_0}"),
        ]

    def test_failures_are_words(self):
        text = latex([failing()])
        assert r"0.500 {\scriptsize 1 of 2 out of memory}" in text
        assert r"{\scriptsize 2 of 2 diverged}" in text

    def test_the_caption_is_short_and_the_rest_is_below(self):
        text = latex(boards(record()))
        caption, notes = text.split(r"\begin{tabular}")
        assert re.search(
            r"\\caption\{Model 30de100000000000; [^.]*\. [^.]*\.\}\\label\{tab:leaderboard-\w{8}\}\n", caption
        )
        assert "\nMetrics: accuracy on digits.\\par\n" in notes
        assert "no $\\pm$: one run has no interval" in notes


class TestOption:
    def test_the_style_is_that_of_the_file(self, tmp_path, capsys):
        stored(tmp_path, record(score=0.8), record(seed=1, score=0.8))
        assert cli.main(["report", "--results", str(tmp_path), "--latex-style", "side"]) == 0
        assert r"0.800 $\pm$ 0.000" in (tmp_path / "tables" / "leaderboard.tex").read_text()

    def test_an_unknown_style_is_told(self, tmp_path, capsys):
        assert cli.main(["report", "--results", str(tmp_path), "--latex-style", "sides"]) == 2
        told = "error: unknown --latex-style 'sides'. Did you mean 'side'? Available: side, siunitx, subscript.\n"
        assert capsys.readouterr().err == told


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
@pytest.mark.parametrize("style", STYLES)
def test_everything_fits_its_page(style: str, tmp_path: Path) -> None:
    if style == "siunitx" and subprocess.run(["kpsewhich", "siunitx.sty"], capture_output=True, check=False).returncode:
        pytest.skip("siunitx is not installed")
    files = [latex([found], ["odd_folder%"], style) for found in many_kinds()] + [in_sections()]
    preamble = {line for text in files for line in re.findall("^% In the preamble: (.+)", text)}
    for place, text in enumerate(files):
        (tmp_path / f"{place}.tex").write_text(text, encoding="utf-8")
    body = "\n".join(rf"\input{{{place}}}\clearpage" for place in range(len(files)))
    paper = "\n".join([r"\documentclass{article}", *sorted(preamble), r"\begin{document}", body, r"\end{document}"])
    (tmp_path / "paper.tex").write_text(paper)
    for _ in range(2):  # longtables know their columns' widths the second time
        done = subprocess.run(
            ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"],
            cwd=tmp_path,
            env=os.environ | {"max_print_line": "1000"},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=120,
        )
        assert done.returncode == 0, done.stdout[-2000:]
    log = (tmp_path / "paper.log").read_text(errors="replace")
    assert "too large for page" not in log
    assert [line for line in re.findall(r"Overfull .*", log) if float(re.findall(r"\((.+)pt too", line)[0]) > 1] == []
