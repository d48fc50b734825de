"""The page's structure: what stays in view, what scrolls in its own box, what folds, what it says in words."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from harness.report.board.leaderboard import Board
from harness.report.board.runs import runs_of
from harness.report.build import boards_of, build_report
from harness.report.forms.page import page
from harness.report.forms.summary import what_it_shows
from tests.support.report_records import NAMING, board, record, stored
from tests.support.sections import with_section

CHROMIUM = shutil.which("chromium")
VOID = {"meta", "img", "br", "link", "input"}
ASKED = """<script>
const boxes = [...document.querySelectorAll(".scroll")].filter(box => box.querySelector("a"));
for (const box of boxes) { box.scrollLeft = 400; box.scrollTop = 300; }
const box = boxes[0], edge = box.getBoundingClientRect(), of = name => box.querySelector(name).getBoundingClientRect();
document.title = JSON.stringify([document.documentElement.scrollWidth <= innerWidth, box.scrollWidth > box.clientWidth,
  box.scrollLeft > 0, Math.abs(of("tbody td").left - edge.left) < 2, box.scrollTop > 0,
  Math.abs(of("thead th").top - edge.top) < 2, innerWidth]);
</script></body>"""


class Tree(HTMLParser):
    """Every element with the elements that it stands in, as "tag.class"."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.within: list[str] = []
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.texts: list[tuple[str, tuple[str, ...]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        name = ".".join([tag, *(dict(attrs).get("class") or "").split()])
        self.elements.append((name, tuple(self.within)))
        if tag not in VOID:
            self.within.append(name)

    def handle_endtag(self, tag: str) -> None:
        assert self.within.pop().split(".")[0] == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((data.strip(), tuple(self.within)))


def html(of: Board) -> str:
    return page([of], [], {}, {})


def three() -> Board:
    return board(*(record(name, seed=s, score=0.5 + 0.1 * n) for n, name in enumerate("abc") for s in (0, 1)))


def test_every_table_stands_in_a_box_that_scrolls(tmp_path: Path) -> None:
    (path,) = [path for path in build_report(stored(tmp_path, record(), record("head"))) if path.suffix == ".html"]
    text = path.read_text(encoding="utf-8")
    found = [within for name, within in Tree(text).elements if name == "table"]
    assert len(found) > 1
    assert all(within[-1] == "div.scroll" for within in found)
    assert re.search(r"\.scroll \{[^}]*overflow: auto", text)
    assert re.search(r"thead th \{ position: sticky; top: 0", text)
    assert re.search(r"th:first-child, td:first-child \{ position: sticky; left: 0", text)


def test_a_section_with_a_title_folds_and_one_that_is_not_ranked_is_told_apart() -> None:
    tree = Tree(html(with_section(three(), "controls <of a>", "a", ranked=False)))
    heads = [within for text, within in tree.texts if text == "controls <of a> (1)"]
    assert [within[-2:] for within in heads] == [("details", "summary")]
    assert "tbody.heading" in heads[0]
    rows = {text: within for text, within in tree.texts if within[-1] == "div.label"}
    assert "tbody.rows" in rows["b"]
    assert "tbody.rows.unranked" in rows["a"]
    assert list(rows) == ["c", "b", "a"]


def test_without_titles_there_is_no_heading() -> None:
    names = [name for name, _ in Tree(html(three())).elements]
    assert "tbody.heading" not in names
    assert names.count("tbody.rows") == 1


def test_links_of_rows_in_sections_lead_to_their_own_runs() -> None:
    of = with_section(three(), "controls", "b")
    text = html(of)
    for label in "abc":
        (row,) = re.findall(rf'<div class="label">{label}</div></td>.*?</tr>', text, re.DOTALL)
        (anchor,) = re.findall(r'href="#([^"]+)"', row)
        (title,) = re.findall(rf'<li id="{anchor}">([^:]+):', text)
        assert title == f"{label} on digits"


def test_a_picture_opens_without_a_script(tmp_path: Path) -> None:
    of, path = three(), tmp_path / "a.png"
    path.write_bytes(b"png")
    tree = Tree(page([of], [], {}, {of.key: [("Mine", path)]}))
    ((_, within),) = [element for element in tree.elements if element[0] == "img"]
    assert within[-3:] == ("figure", "details", "summary")


class TestWhatItShows:
    def test_extent_seeds_and_bests_are_those_of_the_records(self, tmp_path: Path) -> None:
        records = [
            record("lora", task, seed=seed, method_parameters={"rank": rank}, score=0.5 + 0.1 * rank + 0.01 * seed)
            for task in ("digits", "other")
            for rank in (1, 2)
            for seed in (0, 1, 2)
        ]
        of = board(*records, record("head", "digits", score=None))
        assert what_it_shows(of)[:3] == [
            "3 configurations of 2 methods on 2 tasks: 13 runs, 1 of them without a score.",
            "3 seeds behind each score.",
            "digits: best lora[rank=2] (0.710); not significantly different from it: 0 of 1 other.",
        ]
        assert "What this shows" in html(of)
        assert all(sentence in html(of) for sentence in what_it_shows(of))

    def test_of_single_runs_none_is_best(self) -> None:
        of = board(record("lora", score=0.7), record("head", score=0.6))
        assert what_it_shows(of)[1:] == [
            "1 seed behind each score.",
            "digits: no row is called best.",
        ]

    def test_ties_are_those_of_the_table(self, tmp_path: Path) -> None:
        scores = {"a": (0.8, 0.7, 0.75), "b": (0.7, 0.8, 0.74), "c": (0.1, 0.11, 0.1)}
        records = [record(name, seed=s, score=x) for name, of_name in scores.items() for s, x in enumerate(of_name)]
        (of,) = boards_of(stored(tmp_path, *records), runs_of(records))
        (last,) = what_it_shows(of)[2:]
        assert last == "digits: best a (0.750); not significantly different from it: 1 of 2 others."

    def test_below_the_rule_there_is_no_best(self) -> None:
        of = with_section(three(), "single", "a", "b", ranked=False)
        assert what_it_shows(of)[1] == "2 seeds behind each score; 2 seeds behind each score below the rule."

    def test_nothing_scored(self) -> None:
        assert what_it_shows(board(record(score=None)))[1] == "No score."


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1300, 800])
def test_head_and_first_column_stay_and_the_page_never_scrolls_sideways(tmp_path: Path, width: int) -> None:
    tasks = [f"a_task_with_a_long_name_{number}" for number in range(12)]
    names = [f"a_method_with_a_name_that_is_rather_long_{number}" for number in range(40)]
    store = stored(tmp_path, *(record(name, task) for name in names for task in tasks))
    (path,) = [path for path in build_report(store, naming=NAMING, forms=("png",)) if path.suffix == ".html"]
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", ASKED), encoding="utf-8")
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    shown = subprocess.run([CHROMIUM, *options, profile, path.as_uri()], capture_output=True, text=True, timeout=120)
    (found,) = re.findall(r"<title>\[(.*?)\]</title>", shown.stdout)
    assert found.split(",")[:-1] == ["true"] * 6
