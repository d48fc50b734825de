"""Budget views, pictures, the paper's figures, the page."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from harness import cli
from harness.record.record import HISTORY, SCHEMA, Generation, RunRecord
from harness.record.store import RecordStore
from harness.report.board.frame import to_frame
from harness.report.board.leaderboard import leaderboards, sorted_by
from harness.report.board.runs import runs_of
from harness.report.build import build_report
from harness.report.forms.data import structured
from harness.report.forms.text import markdown
from harness.report.pictures import critical, curves, layers, lines, scatter
from harness.report.pictures.figures import COLOURS
from harness.report.pictures.histories import History, mean_series, traced
from harness.report.tables import budget
from harness.report.tables.paper import against_paper, reported
from harness.report.tables.trials import learning_rates, trials_frame
from harness.spec import Place
from harness.trace import RANK, RANKS, Trace
from tests.support.report_records import NAMING, board, chosen, record, rewritten, stored, trial

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def history(seed: int, batches: int = 40) -> list[dict[str, Any]]:
    """Rows as the loop and a bilevel method leave them."""
    rows: list[dict[str, Any]] = []
    for place in range(batches):
        row: dict[str, Any] = {"update": place, "batches": place + 1, "loss": math.exp(-place / 20) + 0.01 * seed}
        if place % 10 == 9:
            row |= {"holdout_accuracy": 0.5 + place / 100, "gap": 0.1 / (place + 1), "rank": 16 - place // 10}
            row |= {"active_components": max(13, 16 - place // 10), "ranks": [4, 4], "s": [0.1, 0.2]}
        rows.append(row)
    return rows


def with_histories(folder: Path, *runs: RunRecord) -> RecordStore:
    store = stored(folder)
    for each in runs:
        store.write(each, history(each.spec.seed), store.draft(each.run_id))
    return store


class TestBudget:
    def test_pareto_front(self) -> None:
        points = [(100, 0.5), (10, 0.4), (50, 0.3), (100, 0.6), (1000, 0.6), (2000, 0.7)]
        assert budget.pareto_front(points) == [(10, 0.4), (100, 0.6), (2000, 0.7)]
        assert budget.pareto_front(points, higher_is_better=False) == [(10, 0.4), (50, 0.3)]

    def test_score_at_matched_parameters(self) -> None:
        points = [(100.0, 0.5), (10_000.0, 0.7)]
        assert budget.at_parameters(points, 1000) == (pytest.approx(0.6), True)
        assert budget.at_parameters(points, 100) == (0.5, False)
        assert budget.at_parameters(points, 99) is None
        table = budget.matched(
            board(
                record("debora", method_parameters={"tau": 4.0}, numbers=100, score=0.5),
                record("debora", method_parameters={"tau": 8.0}, numbers=10_000, score=0.7),
                record("lora", numbers=1000, score=0.65),
            )
        )
        assert [tuple(row)[1:] for row in table.itertuples(index=False)] == [
            (1000, "debora, tau varied", pytest.approx(0.6), True),
            (1000, "lora", 0.65, False),
        ]

    def test_matched_parameters_average_no_configurations(self) -> None:
        """Learning rates, versions and a row that lacks a score are no curve, though their counts are equal."""
        table = budget.matched(
            board(
                record("lora", method_parameters={"lr": 0.1}, score=0.9),
                record("lora", method_parameters={"lr": 0.2}, score=0.5),
                record("lora", method_parameters={"lr": 0.1}, method_version=2, score=0.1),
                record("debora", score=0.8),
                record("debora", method_parameters={"tau": 4.0}, score=0.7),
                record("debora", method_parameters={"tau": 4.0}, score=None, seed=1),
            )
        )
        assert sorted(table["score"]) == [0.1, 0.5, 0.8, 0.9]
        assert len(set(table["method"])) == 4
        assert not table["interpolated"].any()

    def test_sweeps_differ_in_one_number(self) -> None:
        table = budget.sweeps(
            board(
                *(record("debora", method_parameters={"tau": tau, "rank": 8}, score=tau / 10) for tau in (8.0, 4.0)),
                record("debora", method_parameters={"tau": 2.0, "rank": 4}, score=0.9),
                record("lora", method_parameters={"rank": 4}),
            )
        )
        assert table[["parameter", "value", "mean"]].to_numpy().tolist() == [["tau", 4.0, 0.4], ["tau", 8.0, 0.8]]

    def test_costs_count_failed_runs_too(self) -> None:
        failed = record(seed=1, score=None, status="diverged", batches=40)
        (row,) = budget.costs(board(record(), failed)).to_dict("records")
        assert (row["runs"], row["batches"], row["seconds"], row["peak_bytes"]) == (2, 140, 120.0, 1.24e9)

    def test_what_an_optimizer_keeps_is_a_column_where_records_have_it(self) -> None:
        """Not of the runs of older versions, for which it is not known."""
        old, new = board(record(), record("head")), board(record(optimizer_bytes=2_000_000), record("head"))
        assert budget.costs(old)["optimizer_bytes"].isna().all()
        assert "optimizer state" not in markdown([old])
        largest = board(*(record(seed=seed, optimizer_bytes=size) for seed, size in enumerate((5, 9, 7))))
        assert budget.costs(largest)["optimizer_bytes"].tolist() == [9]
        rows = {row["label"]: row["optimizer_bytes"] for row in structured([new])["settings"][0]["rows"]}
        assert rows == {"lora": 2_000_000, "head": None}
        lines = [[cell.strip() for cell in line.split("|")] for line in markdown([new]).splitlines() if "|" in line]
        place = lines[0].index("optimizer state")
        assert {line[1]: line[place] for line in lines[2:4]} == {
            "lora": "2.00MB",
            "head": "-",
        }
        assert list(to_frame([record(), record("head", optimizer_bytes=3)])["optimizer_bytes"].fillna(0)) == [0, 3]

    def test_what_a_backbone_takes_is_in_data_alone(self) -> None:
        found = board(record(backbone_bytes=269), record("head"))
        rows = {row["label"]: row["backbone_bytes"] for row in structured([found])["settings"][0]["rows"]}
        assert rows == {"lora": 269, "head": None}
        assert "backbone" not in markdown([found])
        assert list(to_frame([record(backbone_bytes=269)])["backbone_bytes"]) == [269]

    def test_memory_tokens_and_the_kept_file_are_columns_where_records_have_them(self) -> None:
        old = markdown([board(record())])
        headings = ("training memory", "reserved memory", "tokens a second", "file size")
        assert not any(heading in old for heading in headings)
        on_a_gpu = {"training_peak_bytes": 5_000_000, "training_reserved_bytes": 7_000_000}
        new = board(
            record(tokens=600_000, file_bytes=1234, **on_a_gpu), record(seed=1, tokens=1_200_000, training_peak_bytes=9)
        )
        lines = [[cell.strip() for cell in line.split("|")] for line in markdown([new]).splitlines() if "|" in line]
        found = [lines[2][lines[0].index(heading)] for heading in headings]
        assert found == ["5.00MB", "7.00MB", "15,000", "1.23kB"]

    def test_gradient_checkpointing_is_said_of_the_runs_that_have_it(self) -> None:
        again = Place(gradient_checkpointing=True)
        assert "radient checkpointing" not in markdown([board(record(), record("head"))])
        some = markdown([board(record(place=again), record("head"))])
        assert "Gradient checkpointing was on in runs of lora alone: do not compare their seconds and memory." in some
        every = markdown([board(record(place=again), record("head", place=again))])
        assert "Runs were made with gradient checkpointing" in every

    def test_generation_that_was_timed_in_other_batches_is_said(self) -> None:
        timed = [Generation(rows=rows, tokens=32, untouched=0.01, trained=0.02) for rows in (16, 16, 64)]
        of = [record(name, generation=each) for name, each in zip(("lora", "head", "full"), timed, strict=True)]
        assert "timed in batches" not in markdown([board(*of[:2])])
        assert "timed in batches of different sizes (rows x tokens: 16 x 32, 64 x 32)" in markdown([board(*of)])

    def test_costs_count_the_search_once_for_each_task(self) -> None:
        trials = [trial(learning_rate=1e-3), trial(learning_rate=1e-2, holdout=None, batches=30, peak_bytes=2 * 10**9)]
        runs = [chosen(trials, 1e-3, seed=seed) for seed in (0, 1)]
        (row,) = budget.costs(board(*trials, *runs)).to_dict("records")
        assert (row["settings"], row["runs"], row["batches"], row["seconds"]) == ("tuned 2", 2, 200, 120.0)
        assert (row["search_batches"], row["search_seconds"], row["peak_bytes"]) == (130, 120.0, 2e9)
        (setting,) = structured([board(*trials, *runs)])["settings"]
        (shown,) = setting["rows"]
        assert (shown["batches"], shown["seconds"], shown["peak_bytes"]) == (230, 180.0, 2e9)
        lacking = board(trials[0], *runs)
        (shown,) = structured([lacking])["settings"][0]["rows"]
        assert (shown["batches"], shown["search_batches"]) == (None, None), "a trial's record is gone"
        assert math.isnan(budget.costs(lacking)["search_batches"][0])

    def test_time_to_score(self, tmp_path: Path) -> None:
        one = History(history(0))
        assert budget.time_to(one, "holdout_accuracy", 0.65) == 20
        assert budget.time_to(one, "holdout_accuracy", 0.95) is None
        assert budget.time_to(one, "loss", 0.5, higher_is_better=False) == 15
        store = with_histories(tmp_path, record(), record(seed=1))
        (only,) = leaderboards(runs_of(store.records()))
        table = budget.time_to_score(only, traced(only, store))
        assert table["batches"].tolist() == [40, 40]
        assert table["target"].tolist() == [pytest.approx(0.89)] * 2

    def test_sorted_rows(self) -> None:
        found = [
            board(
                record("lora", score=0.9, numbers=10), record("head", score=0.5, numbers=1), record("full", score=None)
            )
        ]
        assert [row.label for row in sorted_by(found, "parameters")[0].rows] == ["head", "lora", "full"]
        assert [row.label for row in sorted_by(found, "digits")[0].rows] == ["lora", "head", "full"]
        assert [row.label for row in sorted_by(found, "method")[0].rows] == ["full", "head", "lora"]


TRACES = (
    RANK,
    Trace("gap", "Frank-Wolfe gap", "loss", drawing="log_line"),
    Trace("active_components", "active components", drawing="steps"),
    RANKS,
    Trace("s", "s", drawing=None),
)


class TestPictures:
    def test_mean_of_curves(self) -> None:
        batches, means, halves = mean_series([History(history(seed)) for seed in (0, 1)], "loss")
        assert (batches[0], batches[-1]) == (1, 40)
        assert means[0] == pytest.approx(1.005)
        assert halves == pytest.approx(np.full(len(batches), 0.005))
        assert len(mean_series([History(history(0))], "nothing")[0]) == 0

    def test_each_shows_what_it_should(self, tmp_path: Path) -> None:
        ranks = {f"encoder.layer.{i}.attention.{name}": 4 - i for i in (0, 1) for name in ("query", "value")}
        runs = [record(m, seed=s, ranks=ranks, numbers=n) for m, n in (("debora", 50), ("lora", 90)) for s in (0, 1)]
        store = with_histories(tmp_path, *runs)
        (only,) = leaderboards(runs_of(store.records(), NAMING))
        found = traced(only, store, traces=dict.fromkeys(("debora", "lora"), TRACES))
        learning, over_time = curves.learning_curves(only, found), curves.over_time(only, found)
        heat = layers.rank_heat_map(only, {run.run_id: run for run in runs})
        assert [panel.get_ylabel() for panel in axes(learning)] == ["training loss", "holdout accuracy"]
        assert [panel.get_ylabel() for panel in axes(over_time)] == [
            "rank, all layers", "Frank-Wolfe gap\n(loss)", "active components",
        ]  # fmt: skip
        layered = layers.over_time(only, found)
        (mesh,) = axes(layered)[0].collections
        assert mesh.get_array().shape == (2, 4), "two layers, four rows with ranks"
        assert mesh.get_coordinates()[0, :, 0].tolist() == [10, 20, 30, 40, 41]
        assert axes(layered)[2].get_ylabel() == "rank"
        image = axes(heat)[0].images[0].get_array()
        assert image is not None
        assert image.tolist() == [[4, 4], [3, 3]]
        assert [text.get_text() for text in axes(heat)[0].get_xticklabels()] == ["attention.query", "attention.value"]
        points = axes(scatter.draw(only))[0]
        assert points.get_xlabel() == "adapter parameters"
        assert layers.singular_values(only, store, lambda method, folder: {}) is None
        assert critical.draw(only) is None

    @pytest.mark.parametrize(
        "content",
        [
            b"[" * 100_000 + b"\n",
            b'{"batches": 1, "ranks": ' + b"[" * 5000 + b"]" * 5000 + b"}\n",
            b'{"batches": 1}\n{"batches": 2',
            b'{"batches": 1}\n\n{"batches": 2}\n',
            b"[1]\n",
            b"\xff\xfe\n",
            b'{"loss": 1.0}\n',
            b'{"batches": true}\n',
            b'{"batches": -1}\n',
            b'{"batches": 2}\n{"batches": 1}\n',
            b'{"batches": 1' + b"0" * 400 + b"}\n",
            b'{"batches": 1, "loss": 1' + b"0" * 400 + b"}\n",
            None,
        ],
    )
    def test_a_damaged_history_costs_its_run_only(self, tmp_path: Path, content: bytes | None) -> None:
        store = with_histories(tmp_path, record(), record(seed=1))
        damaged = record(seed=1).run_id
        if content is None:
            (store.folder(damaged) / HISTORY).write_bytes(b"not what the run wrote")
        else:
            rewritten(store, damaged, HISTORY, content)
        told: list[str] = []
        names = {path.name for path in build_report(store, tell=told.append)}
        (line,) = told
        assert damaged in line
        assert "\n" not in line
        assert {"learning_curves.png", "over_time.png", "time_to_score.csv"} <= names
        (only,) = leaderboards(runs_of(store.records()))
        assert [len(each.histories) for each in traced(only, store)] == [1]

    @pytest.mark.parametrize("value", ['"0.5"', "[]", "null", "true", "NaN", "Infinity", "1e300", '{"a": 1}'])
    def test_values_that_are_no_numbers_are_passed_over(self, tmp_path: Path, value: str) -> None:
        store = with_histories(tmp_path, record())
        rows = "".join(
            f'{{"batches": {batches}, "loss": {value}, "gap": {value}, "rank": {value}, "holdout_accuracy": {value}}}\n'
            for batches in (1, 2)
        )
        rewritten(store, record().run_id, HISTORY, (rows + '{"batches": 3, "loss": 0.5}\n').encode())
        told: list[str] = []
        names = {path.name for path in build_report(store, tell=told.append)}
        assert not told
        assert "learning_curves.png" in names
        assert not names & {"over_time.png", "time_to_score.csv"}

    def test_learning_rate_sensitivity(self) -> None:
        trials = [trial(learning_rate=rate, holdout=score) for rate, score in ((1e-2, 0.7), (1e-4, 0.6), (1e-1, None))]
        trials += [trial("debora", holdout=0.8)]
        runs = [chosen(trials[:3], 1e-2), chosen(trials[3:], 1e-3)]
        table = trials_frame([*trials, *runs], NAMING)
        assert table["label"].tolist() == ["lora"] * 3 + ["debora"]
        (panel,) = axes(lines.learning_rates(board(*trials, *runs), table))
        curve, large = (line for line in panel.lines if line.get_color() == COLOURS[1] and line.get_marker() != "x")
        assert (curve.get_xdata().tolist(), curve.get_ydata().tolist()) == ([1e-4, 1e-2], [0.6, 0.7])
        assert (large.get_xdata().tolist(), large.get_ydata().tolist()) == ([1e-2], [0.7]), "the chosen one"
        assert [line.get_xdata() for line in panel.lines if line.get_marker() == "x"] == [[1e-1]], "it gave no score"
        assert (panel.get_xscale(), panel.get_ylabel()) == ("log", "holdout accuracy")
        assert lines.learning_rates(board(record()), trials_frame([record()])) is None
        summary = learning_rates(board(*trials, *runs), table)
        assert summary.drop(columns=["task", "metric"]).to_numpy().tolist() == [
            ["debora", 1, 0, 1e-3, 0.8, 0.8, 0.8],
            ["lora", 3, 1, 1e-2, 0.7, pytest.approx(0.65), 0.6],
        ]
        assert learning_rates(board(record()), trials_frame([record()])).empty

    def test_nothing_to_draw(self, tmp_path: Path) -> None:
        store = stored(tmp_path, record(score=None, parameters=None))
        (only,) = leaderboards(runs_of(store.records()))
        assert scatter.draw(only) is None
        assert curves.learning_curves(only, traced(only, store)) is None
        assert curves.over_time(only, traced(only, store)) is None
        assert layers.over_time(only, traced(only, store)) is None
        assert layers.rank_heat_map(only, {run.run_id: run for run in store.records()}) is None

    def test_of_a_method_that_declares_nothing_nothing_is_drawn_and_of_an_unknown_one_all(self, tmp_path: Path) -> None:
        store = with_histories(tmp_path, record("lora"), record("gone", score=0.4))
        (only,) = leaderboards(runs_of(store.records()))
        found = traced(only, store, traces={"lora": ()})
        figure = curves.over_time(only, found)
        assert [panel.get_ylabel() for panel in axes(figure)] == ["active components", "gap", "rank"]
        (label,) = {text.get_text() for text in figure.legends[0].get_texts()} if figure else set()
        assert label == "gone"

    def test_methods_share_a_panel_of_what_both_declare(self, tmp_path: Path) -> None:
        store = with_histories(tmp_path, record("lora"), record("debora", score=0.4))
        (only,) = leaderboards(runs_of(store.records()))
        other = Trace("gap", "another gap")
        figure = curves.over_time(only, traced(only, store, traces={"lora": (RANK, other), "debora": (RANK,)}))
        assert [panel.get_ylabel() for panel in axes(figure)] == ["rank, all layers", "another gap"]
        assert [len({line.get_color() for line in panel.lines}) for panel in axes(figure)] == [2, 1]

    def test_lists_that_are_no_table_are_passed_over(self) -> None:
        rows: list[dict[str, Any]] = [{"batches": 1, "a": [1, 2], "b": [1], "c": [1, "x"], "d": 3}]
        rows.append({"batches": 2, "a": [3, 4], "b": [1, 2], "c": [1, 2]})
        found = History(rows, ("a", "b", "c", "d", "e"))
        batches, table = found.table("a")
        assert (batches.tolist(), table.tolist()) == ([1, 2], [[1, 2], [3, 4]])
        assert not any(len(found.table(name)[0]) for name in "bcde")

    @pytest.mark.parametrize(
        ("name", "parts"),
        [
            ("bert.encoder.layer.11.output.dense", ("bert.encoder.layer.11", "output.dense")),
            ("stages.0.layers.1.layer.2.convolution", ("stages.0.layers.1", "layer.2.convolution")),
            ("classifier.dense", ("", "classifier.dense")),
        ],
    )
    def test_names_of_layers(self, name: str, parts: tuple[str, str]) -> None:
        assert layers.split_name(name) == parts

    def test_diagram_of_mean_ranks(self) -> None:
        runs = [record(f"m{i}", f"t{j}", score=0.5 + 0.1 * i + 0.01 * j) for i in range(4) for j in range(6)]
        panel = axes(critical.draw(board(*runs)))[-1]
        assert [text.get_text() for text in panel.texts] == ["m3 (1.00)", "m2 (2.00)", "m1 (3.00)", "m0 (4.00)"]


def axes(figure: Figure | None) -> list[Any]:
    assert figure is not None
    return list(figure.axes)


class TestPaper:
    def test_figures_of_the_paper(self) -> None:
        figures = {(each.row, each.task, each.metric): each for each in reported()}
        assert figures["LoRA r=8", "glue/cola", "matthews_correlation"].score == 0.6857
        assert figures["LoRA r=8", "glue/rte", "accuracy"].rounding == pytest.approx(0.0005)
        assert figures["dEBORA tau=16", "glue/qqp", "f1"].score == 0.892
        assert figures["dEBORA tau=8", "cifar10", "accuracy"].parameters == 64_000
        assert all(each.source and each.method for each in figures.values())

    def test_beside_ours(self) -> None:
        runs = [record("lora", "glue/cola", seed=s, score=0.5 + 0.02 * s, headline="matthews_correlation",
                       method_parameters={"rank": 8}, limit=100) for s in (0, 1)]  # fmt: skip
        text = against_paper(board(*runs, record("lora", "glue/cola", method_parameters={"rank": 2}, limit=100)))
        assert "LoRA r=8" in text
        assert "-0.1757" in text  # 0.51 less 0.6857
        assert "-0.3028 to -0.0486" in text  # t at one degree 12.706 x 0.01, and 0.00005 of rounding
        assert "model,\n" in text
        assert "data (at most 100 rows)" in text
        assert text.count("LoRA r=8") == 1, "the paper has no LoRA of rank 2"
        assert "GLUE" in text
        assert "DreamBooth" not in text, "sources are those of the figures shown"

    def test_one_seed_has_no_interval(self) -> None:
        run = record("debora", "cifar10", method_parameters={"tau": 8.0})
        assert "not available" in against_paper(board(run))

    def test_nothing_to_compare(self) -> None:
        assert "has a counterpart in a paper's table" in against_paper(board(record()))
        own = record("adalora", "dreambooth:dog", score=0.2, headline="denoising_loss")
        assert "data (your own)" in against_paper(board(own))


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.sources += [value for name in ("src",) if (value := values.get(name))]
        self.links += [value for name in ("href",) if (value := values.get(name))]
        self.ids |= {value for name in ("id",) if (value := values.get(name))}


class TestPage:
    def page(self, folder: Path) -> Path:
        store = with_histories(folder, record("lora"), record("lora", seed=1), record("<b>&", score=None))
        (path,) = [path for path in build_report(store, naming=NAMING) if path.suffix == ".html"]
        return path

    def test_loads_nothing_and_links_lead_somewhere(self, tmp_path: Path) -> None:
        page = self.page(tmp_path)
        text = page.read_text(encoding="utf-8")
        found = _Links()
        found.feed(text)
        assert found.sources
        assert all(source.startswith("data:image/png;base64,") for source in found.sources)
        assert not re.search(r"@import|url\(|https?://", text)
        for link in found.links:
            assert link[1:] in found.ids if link.startswith("#") else (tmp_path / link).is_file()
        assert f"runs/{record('lora').run_id}/record.json" in found.links
        assert "&lt;b&gt;&amp;" in text

    @pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
    def test_sorts_in_a_browser(self, tmp_path: Path) -> None:
        store = stored(
            tmp_path,
            *(record(name, score=s, numbers=n) for name, s, n in (("a", 0.5, 9), ("b", 0.9, 30), ("c", 0.7, 200))),
        )
        (page,) = [path for path in build_report(store) if path.suffix == ".html"]
        clicks = "const head = document.querySelectorAll('th button'); head[1].click(); head[1].click();"
        clicks = f"<script>{clicks}</script></body>"
        page.write_text(page.read_text(encoding="utf-8").replace("</body>", clicks), encoding="utf-8")
        assert CHROMIUM is not None
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
        ]
        shown = subprocess.run([CHROMIUM, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
        rows = re.findall(r'data-sort="([abc])"', shown.stdout)[:3]  # of the first table
        assert rows == ["a", "b", "c"], "by rising parameters, as numbers"


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--sort", "paramters"], "unknown column 'paramters'. Did you mean 'parameters'?"),
            (["--against", "papper"], "--against 'papper' is not known; available: paper"),
            (["--methods", "lara"], "unknown method among the records 'lara'. Did you mean 'lora'?"),
        ],
    )
    def test_one_line_and_nothing_written(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
    ) -> None:
        stored(tmp_path, record())
        before = sorted(tmp_path.rglob("*"))
        assert cli.main(["report", *arguments, "--results", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before

    def test_mixed_versions_and_data_are_said(self) -> None:
        new = record().environment.model_copy(update={"packages": {"torch": "2.13.0"}})
        found = board(record(), record(seed=1, environment=new), record("head", data_fingerprint="bbbb0000cccc1111"))
        notes = "\n".join(found.notes)
        assert "different versions (harness 0.1.0; harness 0.1.0, torch 2.13.0)" in notes
        assert "Runs on digits are on different data (bbbb0000: head; da7a0000: lora); they are not averaged" in notes

    def test_record_of_a_later_version_is_left_out_by_name(self, tmp_path: Path) -> None:
        store = stored(tmp_path, record(), record(seed=1))
        path = store.folder(record(seed=1).run_id) / "record.json"
        path.write_text(path.read_text().replace(f'"schema_version": {SCHEMA}', f'"schema_version": {SCHEMA + 1}'))
        build_report(store)
        text = (tmp_path / "tables" / "leaderboard.md").read_text(encoding="utf-8")
        assert f"cannot be read: {record(seed=1).run_id}" in text
