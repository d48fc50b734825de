"""The page's scatter of any two columns: its numbers are the tables', and the page loads nothing from outside."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from harness.parameters import ParameterCount
from harness.record.record import RunRecord, Seconds
from harness.report.board.leaderboard import Board, sorted_by
from harness.report.forms.data import tidy
from harness.report.forms.page import page
from harness.report.tables.budget import pareto_front
from tests.support.report_records import board, forgot, record

CHROMIUM = shutil.which("chromium")
IN_CSV = {"parameters": "parameters_final", "seconds": "seconds_training", "memory": "peak_bytes"}


def run(method: str, task: str, seed: int, score: float, numbers: int, **changes: Any) -> RunRecord:
    counts = ParameterCount(
        adapter_initial=numbers,
        adapter_peak=numbers,
        adapter_final=numbers,
        head=1,
        total=10**6,
        stored_bytes=4 * numbers,
    )
    seconds = Seconds(training=1e4 / numbers + seed, total=1e5)
    return record(method, task, seed, score, parameters=counts, seconds=seconds, peak_bytes=10**9 + numbers, **changes)


def several() -> Board:
    """Four methods on two tasks, "loss" lower is better; one has a seed alone, and one is off either task's front."""
    methods = {"lora": (100, 0.8), "debora": (40, 0.6), "head": (10, 0.7), "alone": (1000, 0.9)}
    return board(
        *(
            run(name, task, seed, score + 0.01 * seed, size, headline=task, higher_is_better=task != "loss")
            for name, (size, score) in methods.items()
            for task in ("accuracy", "loss")
            for seed in ((0, 1) if name != "alone" else (0,))
        )
    )


class Loads(HTMLParser):
    """What a page names that a browser would fetch, and its scripts by their type."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.named: list[str] = []
        self.policy = ""
        self.scripts: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "meta" and values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]
        self.named += [values[name] for name in ("src", "srcset", "data", "poster") if name in values]
        self.named += [values["href"]] if tag == "link" else []
        if tag == "script":
            self.scripts.append((values.get("type", ""), ""))

    def handle_data(self, data: str) -> None:
        if self.scripts and self.lasttag == "script":
            kind, text = self.scripts[-1]
            self.scripts[-1] = kind, text + data


def views_of(text: str) -> list[dict[str, Any]]:
    (found,) = [script for kind, script in Loads(text).scripts if kind == "application/json"]
    views: list[dict[str, Any]] = json.loads(found)
    return views


def column(view: dict[str, Any], name: str) -> dict[str, Any]:
    """By label."""
    place = [axis["name"] for axis in view["axes"]].index(name)
    return {row["label"]: row["values"][place] for row in view["rows"]}


def test_a_tasks_numbers_are_those_of_the_csv() -> None:
    of = several()
    table = tidy([of])
    for view in views_of(page([of], [], {}, {}))[:2]:
        lines = table[(table["column"] == view["title"]) & table["is_headline"]].set_index("label")
        score, *beside = [axis["name"] for axis in view["axes"]]
        assert column(view, score) == lines["mean"].to_dict()
        assert {"parameters", "seconds", "memory", "stored bytes", "batches"} <= set(beside)
        assert not {"average", "settings", "rank", "search batches", "optimizer state"} & set(
            beside
        )  # not in the records
        for name in beside:
            assert column(view, name) == lines[IN_CSV.get(name, name.replace(" ", "_"))].to_dict(), name
        halves = {row["label"]: row["half_width"] for row in view["rows"]}
        assert halves == lines["interval_95"].where(lines["interval_95"].notna(), None).to_dict()
        for row in view["rows"]:
            assert [line.split(" · ")[1] for line in row["runs"]] == lines["run_ids"][row["label"]].split()
            assert row["ranked"] == (row["label"] != "alone")
            assert row["texts"][0].endswith("(n=1)" if row["label"] == "alone" else "(n=2)")


def test_over_all_tasks_they_are_those_of_the_table() -> None:
    of = board(*(run("lora", task, 0, score, size) for task, score, size in (("a", 0.5, 10), ("b", 0.7, 30))))
    *tasks, whole = views_of(page([of], [], {}, {}))
    assert [view["title"] for view in tasks] == ["a", "b"]
    assert whole["title"] == "all tasks"
    assert whole["axes"][0] == {"name": "average", "lower_is_better": False}
    assert column(whole, "average") == {"lora": pytest.approx(0.6)}
    assert column(whole, "parameters") == {"lora": 20}
    assert whole["rows"][0]["half_width"] is None
    assert [line.split(",")[0] for line in whole["rows"][0]["runs"]] == ["a", "b"]


def test_which_end_of_an_axis_is_better_is_the_columns() -> None:
    accuracy, loss, _ = views_of(page([several()], [], {}, {}))
    assert accuracy["axes"][0] == {"name": "accuracy", "lower_is_better": False}
    assert loss["axes"][0] == {"name": "loss, lower is better", "lower_is_better": True}
    assert {axis["lower_is_better"] for axis in loss["axes"][1:]} == {True}


def test_rises_on_other_windows_are_no_axis() -> None:
    one, two = (record(name, seed=0, forgetting=forgot(0.1)) for name in ("lora", "head"))
    other = record("head", seed=0, forgetting=forgot(0.1, "other"))
    unmeasured = record("head", seed=1)
    names = [
        [axis["name"] for axis in views_of(page([board(one, each)], [], {}, {}))[0]["axes"]] for each in (two, other)
    ]
    assert ["forgetting" in each for each in names] == [True, False]
    (view,) = views_of(page([board(one, two, unmeasured)], [], {}, {}))
    assert column(view, "forgetting") == {"lora": pytest.approx(0.1), "head": None}


@pytest.mark.parametrize("higher", [True, False])
def test_an_average_has_the_sense_of_its_scores(higher: bool) -> None:
    scores = {("lora", "a"): 0.2, ("lora", "b"): 0.3, ("head", "a"): 0.6, ("head", "b"): 0.8}
    curves = {"rank_curve": {1: 0.1, 2: 0.2}, "higher_is_better": higher}
    of = board(*(run(name, task, 0, score, 10, **curves) for (name, task), score in scores.items()))
    *_, whole = views_of(page([of], [], {}, {}))
    senses = {axis["name"]: axis["lower_is_better"] for axis in whole["axes"]}
    assert {senses[name] for name in ("average", "rank aurac linear", "rank aurac log2")} == {not higher}
    (ordered,) = sorted_by([of], "average")
    assert [row.label for row in ordered.rows] == (["head", "lora"] if higher else ["lora", "head"])


def test_the_page_loads_nothing_and_holds_the_library_once() -> None:
    text = page([several(), several()], [], {}, {})
    found = Loads(text)
    assert [name for name in found.named if not name.startswith("data:")] == []
    assert found.policy.startswith("default-src 'none'; ")
    assert not re.search(r"https?:|//[a-z]|\*", found.policy)
    assert not re.search(r"https?://|\bimport\b|fetch\(|XMLHttpRequest", text)
    (packed,) = [script for kind, script in found.scripts if kind == "application/gzip"]
    assert b"plotly.js v" in gzip.decompress(base64.b64decode(packed))[:2000]
    assert text == page([several(), several()], [], {}, {})


def test_without_a_score_there_is_neither_scatter_nor_library() -> None:
    text = page([board(record(score=None))], [], {}, {})
    assert 'class="scatter"' not in text
    assert "application/gzip" not in text


def test_a_label_cannot_end_the_script() -> None:
    label = "</script><b>&"
    of = board(record("lora", method_parameters={"x": label}, score=0.5), record("head", score=0.4))
    text = page([of], [], {}, {})
    assert any(label in row["label"] for row in views_of(text)[0]["rows"])
    assert label not in text


ASKED = """<script>
const plotted = document.querySelector(".plot"), until = async found => {
  while (!found()) await new Promise(done => setTimeout(done, 20)); };
const choose = (name, text) => { const select = document.querySelector(`select[name=${name}]`);
  select.value = [...select.options].find(option => option.textContent === text).value;
  select.dispatchEvent(new Event("change")); };
const told = () => ({ x: plotted.layout.xaxis.title.text, y: plotted.layout.yaxis.title.text,
  log: plotted.layout.xaxis.type, drawn: plotted.querySelectorAll(".scatterlayer .point").length,
  front: plotted.data[0].x.map((x, place) => [x, plotted.data[0].y[place]]),
  hovers: plotted.data.slice(1).flatMap(trace => trace.hovertext),
  symbols: plotted.data.slice(1).map(trace => [trace.name, ...trace.marker.symbol]) });
(async () => {
  await until(() => plotted.querySelector(".point"));
  const first = told();
  choose("view", "loss"); choose("x", "seconds");
  await until(() => plotted.layout.xaxis.title.text === "seconds");
  document.title = JSON.stringify([first, told()]);
})();
</script></body>"""


def shown(path: Path, of: Board, script: str) -> Any:
    """What the script says of the page, as JSON in its title, in Chromium."""
    assert CHROMIUM is not None
    path.write_text(page([of], [], {}, {}).replace("</body>", script), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=60000", "--dump-dom"]
    profile = f"--user-data-dir={path.parent / 'profile'}"
    found = subprocess.run([CHROMIUM, *options, profile, path.as_uri()], capture_output=True, text=True, timeout=120)
    (title,) = re.findall(r"<title>(\[.*?\])</title>", found.stdout, re.DOTALL)
    return json.loads(title.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_value_below_0_is_on_its_axis(tmp_path: Path) -> None:
    rises = {"lora": 0.9, "debora": 0.001, "head": -0.2}
    of = board(*(record(name, score=0.5 + rise / 10, forgetting=forgot(rise)) for name, rise in rises.items()))
    asked = ASKED.replace('choose("view", "loss"); choose("x", "seconds");', 'choose("x", "forgetting");')
    _, then = shown(tmp_path / "report.html", of, asked.replace('=== "seconds"', '=== "forgetting"'))
    assert (then["x"], then["log"], then["drawn"]) == ("forgetting", "linear", 3)
    assert [x for x, _ in then["front"]] == pytest.approx([-0.2, 0.001, 0.9])


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_it_draws_from_a_file_and_its_axes_change(tmp_path: Path) -> None:
    of = several()
    first, then = shown(tmp_path / "report.html", of, ASKED)
    assert (first["x"], first["y"], first["log"], first["drawn"]) == ("parameters", "accuracy", "log", 4)
    assert (then["x"], then["y"]) == ("seconds", "loss, lower is better")
    accuracy, loss, _ = views_of(page([of], [], {}, {}))
    for found, view, x, higher in ((first, accuracy, "parameters", True), (then, loss, "seconds", False)):
        ranked = [row["label"] for row in view["rows"] if row["ranked"]]
        across, up = column(view, x), column(view, view["axes"][0]["name"])
        assert found["front"] == [list(each) for each in pareto_front([(across[k], up[k]) for k in ranked], higher)]
    assert ["alone", "circle-open"] in [
        [name, re.sub("square|diamond|triangle-up", "circle", symbol)] for name, symbol in first["symbols"]
    ]
    (hover,) = [text for text in first["hovers"] if text.startswith("<b>lora</b>")]
    lora = next(row for row in accuracy["rows"] if row["label"] == "lora")
    assert hover.split("<br>")[1:] == ["parameters: 100", f"accuracy: {lora['texts'][0]}", *lora["runs"]]


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_interval_is_told_on_any_two_axes(tmp_path: Path) -> None:
    of = several()
    asked = ASKED.replace('choose("view", "loss"); choose("x", "seconds");', 'choose("y", "seconds");')
    _, then = shown(
        tmp_path / "report.html", of, asked.replace('xaxis.title.text === "seconds"', 'yaxis.title.text === "seconds"')
    )
    (hover,) = [text for text in then["hovers"] if text.startswith("<b>lora</b>")]
    accuracy, *_ = views_of(page([of], [], {}, {}))
    lora = next(row for row in accuracy["rows"] if row["label"] == "lora")
    assert "\u00b1" in lora["texts"][0]
    assert hover.split("<br>")[3] == f"accuracy: {lora['texts'][0]}"
