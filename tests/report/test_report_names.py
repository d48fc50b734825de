"""Names of any script and length in LaTeX and in pictures."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager, rc_context
from matplotlib.figure import Figure
from matplotlib.text import Text

from harness.report.build import build_report
from harness.report.forms.latex import latex
from harness.report.names import StandIns, lines_of
from harness.report.pictures import fonts
from harness.report.pictures.figures import STYLE, line_handles, panels_for, save, styles
from tests.support.report_records import boards, record, stored

FOREIGN = [
    "text:评论",
    "text:新闻",
    "text:हिन्दी",
    "text:שלום",
    "text:😀 face",
    "text:\U0001fae0",
    "text:отзывы",
    "text:новости",
]
LONG = "text:a_very_long_name_of_a_data_set_that_nobody_should_give_but_people_do_2024_final"


@pytest.fixture
def no_other_fonts(monkeypatch) -> None:
    monkeypatch.setattr(fonts, "_others", list)


@pytest.fixture
def a_font_for_reviews(tmp_path, monkeypatch) -> Iterator[str]:
    """An installed font that has two Chinese signs and nothing else."""
    pen = TTGlyphPen(None)
    for place, point in enumerate([(100, 0), (100, 700), (700, 700), (700, 0)]):
        pen.lineTo(point) if place else pen.moveTo(point)
    pen.closePath()
    names = [".notdef", "one", "two"]
    builder = FontBuilder(1000)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord("评"): "one", ord("论"): "two"})
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (800, 100)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Two Signs", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    path = str(tmp_path / "two_signs.ttf")
    builder.save(path)
    fonts_before = list(font_manager.fontManager.ttflist)
    font_manager.fontManager.addfont(path)
    monkeypatch.setattr(fonts, "_others", lambda: [("Two Signs", path)])
    yield "Two Signs"
    font_manager.fontManager.ttflist[:] = fonts_before


def drawn(titles: list[str], tmp_path: Path) -> Figure:
    """A picture with these titles and a legend of them, in both forms; a warning of matplotlib's is an error."""
    with rc_context(STYLE):
        figure, axes = panels_for(len(titles), "A caption.", line_handles(styles(titles), titles))
        for panel, title in zip(axes, titles, strict=True):
            panel.set_title(title)
    with warnings.catch_warnings(action="error"):
        save(figure, tmp_path / "picture.png", tmp_path / "picture.pdf")
    return figure


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text) if isinstance(text, Text))


def test_runs_get_numbers_with_a_key():
    found = StandIns("[^\x00-\x7f]")
    assert found.put("text:评论 新闻, 😀!") == "text:[1], [2]!"
    assert found.put("评论 新闻 and 评论") == "[1] and [3]"
    assert found.key == ["[1]: U+8BC4 U+8BBA / U+65B0 U+95FB", "[2]: U+1F600 (grinning face)", "[3]: U+8BC4 U+8BBA"]


def test_names_are_broken_where_they_can_be():
    assert lines_of("text:reviews", 30) == ["text:reviews"]
    assert lines_of("a_long_name of-a set", 8) == ["a_long_", "name of-", "a set"]
    assert lines_of("abcdefghij", 4) == ["abcd", "efgh", "ij"]
    assert lines_of("", 4) == [""]
    assert "".join(lines_of(LONG, 30)) == LONG


class TestLatex:
    def test_columns_in_other_scripts_are_told_apart(self):
        text = latex(boards(*(record(task=task, score=0.5) for task in FOREIGN)))
        comments, rest = [], []
        for line in text.splitlines():
            (comments if line.startswith("%") else rest).append(line)
        body = "\n".join(rest)
        assert body.isascii()
        assert "?" not in body
        heads = re.findall(r"text:(\[\d\](?: face)?)", body)
        assert len(set(heads)) == len(FOREIGN)
        key = dict(re.findall(r"% \[(\d+)\] is (.+)", "\n".join(comments)))
        assert set(key.values()) == {name.removeprefix("text:").removesuffix(" face") for name in FOREIGN}
        for number, run in key.items():
            points = " ".join(f"U+{ord(sign):04X}" for sign in run)
            assert f"[{number}]: {points}" in body

    def test_no_stand_ins_where_none_is_needed(self):
        text = latex(boards(record(task="text:café"), record(task="text:cafe")))
        assert text.isascii()
        assert r"text:cafe & text:caf\'{e}" in text
        assert "U+" not in text

    def test_long_names_fit_the_line(self):
        text = latex(boards(record(task=LONG, score=0.5), record(task="text:short", score=0.5)))
        assert "\n &  & text:a\\_very\\_ & " in text
        assert r"\allowbreak{}" in text


class TestPictures:
    def test_what_no_font_has_is_numbered_with_a_key(self, no_other_fonts, tmp_path):
        figure = drawn([*FOREIGN[:2], "text:отзывы", "text:\x07bell\u2028"], tmp_path)
        caption = figure.get_suptitle()
        for number, points in enumerate(["U+8BC4 U+8BBA", "U+65B0 U+95FB", "U+0007", "U+2028"], start=1):
            assert f"[{number}]: {points}" in caption.replace("\n", " ")
        shown = texts(figure)
        assert shown.count("text:[1]") == shown.count("text:[2]") == 2  # title and legend
        assert "text:отзывы" in shown
        assert not set("评论新闻") & set(shown)

    def test_a_font_that_has_the_signs_is_used(self, a_font_for_reviews, tmp_path):
        figure = drawn(["text:评论", "text:新闻", "text:plain"], tmp_path)
        review, news, plain = (panel.title for panel in figure.axes)
        assert (review.get_text(), news.get_text()) == ("text:评论", "text:[1]")
        assert review.get_fontfamily() == ["DejaVu Sans", a_font_for_reviews]
        assert plain.get_fontfamily() == ["DejaVu Sans"]

    def test_without_shaping_what_needs_it_is_numbered(self, no_other_fonts, monkeypatch, tmp_path):
        monkeypatch.setattr(fonts, "SHAPES", False)
        assert "text:[1]" in texts(drawn(["text:שלום", "text:plain"], tmp_path))

    def test_long_titles_stay_in_their_panels(self, tmp_path):
        figure = drawn([LONG, "text:b", "text:c"], tmp_path)
        lines = figure.axes[0].get_title().splitlines()
        assert "".join(lines) == LONG
        assert max(map(len, lines)) <= 34

    def test_a_report_of_such_names_warns_of_nothing(self, no_other_fonts, tmp_path, capfd):
        runs = [
            record(method, task, seed=seed, score=0.5)
            for method in ("lora", "head")
            for task in FOREIGN
            for seed in (0, 1)
        ]
        with warnings.catch_warnings(action="error"):
            paths = build_report(stored(tmp_path, *runs), forms=("png",))
        assert any(path.suffix == ".png" for path in paths)
        assert capfd.readouterr().err == ""
