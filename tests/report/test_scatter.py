"""Score against parameters: most rows are to scale, the others in strips with their values; labels have room."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from harness.record.record import RunRecord
from harness.report.board.leaderboard import Board
from harness.report.pictures import scatter
from harness.report.pictures.cost import FORGETTING
from harness.report.pictures.figures import save
from tests.support.report_records import board, forgot, record
from tests.support.sections import with_section

ADAPTERS = {"lora": 330_000, "debora": 80_000, "adalora": 350_000, "hadapter": 300_000}
SCORES = {"lora": 0.81, "debora": 0.80, "adalora": 0.79, "hadapter": 0.82, "full": 0.78, "head": 0.23}
NARROW_PANEL = 1.5  # inches


def runs(counts: dict[str, int], tasks: int = 1, seeds: int = 3) -> list[RunRecord]:
    return [
        record(method, f"task{task}", seed=seed, numbers=count, score=SCORES.get(method, 0.8) + 0.002 * seed)
        for method, count in counts.items()
        for task in range(tasks)
        for seed in range(seeds)
    ]


def many(rows: int, tasks: int, name: str = "method_{}", seeds: int = 2) -> Board:
    """Rows whose scores and counts are spread out, without luck; one at 0 and one far beyond."""
    found = []
    for row, task, seed in itertools.product(range(rows), range(tasks), range(seeds)):
        count = 0 if row == 1 else 22_600_000 if row == 2 else 20_000 + 9973 * (7 * row % 41)
        score = 0.7 + 0.003 * ((11 * row + 5 * task) % 37) + 0.001 * seed
        found.append(record(name.format(row), f"task{task}", seed=seed, numbers=count, score=score))
    return board(*found)


def drawn(of: Board) -> tuple[Figure, list[Axes]]:
    figure = scatter.draw(of)
    assert figure is not None
    return figure, [panel for panel in figure.axes if panel.get_visible()]


def marks(panel: Axes, of: Board) -> dict[str, Line2D]:
    """The rows' large marks by label."""
    labels = {row.label for row in of.rows}
    return {str(line.get_label()): line for line in panel.lines if line.get_label() in labels}


def place(mark: Line2D) -> tuple[float, float]:
    ((x, y),) = mark.get_xydata().tolist()  # type: ignore[union-attr]
    return x, y


def ticks(panel: Axes, name: str) -> dict[str, float]:
    """Places of ticks by their texts."""
    axis = panel.xaxis if name == "x" else panel.yaxis
    places = [float(tick) for tick in axis.get_majorticklocs()]
    return dict(zip(axis.get_major_formatter().format_ticks(places), places, strict=True))


def boxes(figure: Figure, panel: Axes) -> list[Bbox]:
    """Those of the points' labels."""
    renderer: Any = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    return [text.get_window_extent(renderer) for text in panel.texts if text.get_text()]


def legend(figure: Figure) -> set[str]:
    return {text.get_text() for each in figure.legends for text in each.get_texts()}


class TestAxes:
    def test_most_rows_are_to_scale_and_the_others_in_strips_with_their_values(self) -> None:
        of = board(*runs(ADAPTERS | {"full": 22_600_000, "head": 0}))
        _, (panel,) = drawn(of)
        found = marks(panel, of)
        for method, count in ADAPTERS.items():
            assert place(found[method]) == pytest.approx((count, SCORES[method] + 0.002))
        low, high = panel.get_xlim()
        assert math.log10(high / low) < 1.5, "80k to 350k, a margin and two strips"
        places = ticks(panel, "x")
        assert place(found["head"])[0] == pytest.approx(places["0"])
        assert place(found["full"])[0] == pytest.approx(places["22.6M"])
        assert low < place(found["head"])[0] < 80_000 < 350_000 < place(found["full"])[0] < high
        assert sum(line.get_label() == "break" for line in panel.lines) == 3, "0, 22.6M, and the head's score"

    def test_a_score_far_below_most_stands_in_a_strip(self) -> None:
        of = board(*runs(ADAPTERS | {"head": 0}))
        _, (panel,) = drawn(of)
        head = marks(panel, of)["head"]
        assert place(head)[1] == pytest.approx(ticks(panel, "y")["0.232"])
        assert panel.get_ylim()[0] < place(head)[1] < 0.79
        assert panel.get_ylim()[0] > 0.7

    def test_of_lower_scores_being_better_those_far_above_do(self) -> None:
        losses = {"a": 2.0, "b": 2.1, "c": 2.2, "d": 2.05, "e": 9.0, "f": 0.1}
        of = board(
            *(record(name, score=loss, headline="loss", higher_is_better=False) for name, loss in losses.items())
        )
        _, (panel,) = drawn(of)
        found = marks(panel, of)
        assert place(found["f"])[1] == 0.1, "the best is to scale, wherever it is"
        assert place(found["e"])[1] == pytest.approx(ticks(panel, "y")["9.000"])
        assert panel.get_ylim()[1] < 4

    def test_rows_of_one_region_have_no_strip(self) -> None:
        of = board(*runs({"a": 10_000, "b": 50_000, "c": 300_000}))
        _, (panel,) = drawn(of)
        assert not [line for line in panel.lines if line.get_label() == "break"]
        assert panel.get_xscale() == "log"

    def test_several_beyond_have_their_values_in_their_labels(self) -> None:
        of = board(*runs(ADAPTERS | {"full": 22_600_000, "large": 110_000_000}))
        _, (panel,) = drawn(of)
        found = {text.get_text() for text in panel.texts}
        assert {"full (22.6M)", "large (110M)"} <= found
        assert "22.6M\nto 110M" in ticks(panel, "x")
        assert place(marks(panel, of)["full"])[0] < place(marks(panel, of)["large"])[0]

    @pytest.mark.parametrize(
        "counts", [{"head": 0}, {"head": 0, "other": 0}, {"lora": 1000}, {"lora": 1, "full": 10**9}]
    )
    def test_few_rows(self, counts: dict[str, int]) -> None:
        of = board(*runs(counts))
        _, (panel,) = drawn(of)
        assert set(marks(panel, of)) == set(counts)
        low, high = panel.get_xlim()
        assert all(low < place(mark)[0] < high for mark in marks(panel, of).values())
        assert ticks(panel, "x")


class TestLabels:
    def test_what_is_labelled_directly_is_in_no_legend(self) -> None:
        figure, (panel,) = drawn(board(*runs(ADAPTERS | {"full": 22_600_000})))
        assert {text.get_text() for text in panel.texts} == {*ADAPTERS, "full"}
        assert not figure.legends

    @pytest.mark.parametrize(("rows", "tasks"), [(1, 1), (2, 2), (12, 1), (12, 5), (60, 1), (60, 3), (10, 20)])
    @pytest.mark.parametrize("name", ["method_{}", "метод_{}[a_long_name=of_a_setting,and_one_more=true]"])
    def test_none_lies_on_another_or_on_a_point_or_outside(self, rows: int, tasks: int, name: str) -> None:
        of = many(rows, tasks, name)
        figure, panels = drawn(of)
        assert len(panels) == tasks
        for panel in panels:
            found, area = boxes(figure, panel), panel.get_window_extent()
            assert not any(a.overlaps(b) for a, b in itertools.combinations(found, 2))
            points = panel.transData.transform([place(mark) for mark in marks(panel, of).values()])
            assert not any(box.contains(*point) for box in found for point in points)
            assert all(area.x0 <= box.x0 and box.x1 <= area.x1 for box in found)
            assert all(area.y0 <= box.y0 and box.y1 <= area.y1 for box in found)
            assert area.width / figure.dpi > NARROW_PANEL

    def test_every_row_is_labelled_or_in_the_legend(self) -> None:
        of = many(16, 2)
        figure, panels = drawn(of)
        for panel in panels:
            assert {text.get_text() for text in panel.texts} | legend(figure) >= {row.label for row in of.rows}

    def test_of_many_the_legend_names_methods(self) -> None:
        of = board(
            *(
                record("lora", method_parameters={"alpha": alpha}, numbers=5000, score=0.8 + 1e-4 * alpha)
                for alpha in range(20)
            )
        )
        figure, _ = drawn(of)
        assert legend(figure) == {"lora"}

    @pytest.mark.parametrize("tasks", [1, 3, 20])
    def test_captions_panels_and_legends_keep_apart(self, tasks: int, tmp_path: Path) -> None:
        figure, panels = drawn(many(14, tasks))
        with warnings.catch_warnings(action="error"):
            save(figure, tmp_path / "picture.png", tmp_path / "picture.pdf")
        renderer: Any = figure.canvas.get_renderer()  # type: ignore[attr-defined]
        areas = [panel.get_tightbbox(renderer) for panel in panels]
        areas += [each.get_window_extent(renderer) for each in figure.legends]
        areas += [figure._suptitle.get_window_extent(renderer)]  # type: ignore[attr-defined]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(areas, 2))
        assert all(area.x0 >= 0 and area.y0 >= 0 and area.x1 <= figure.bbox.x1 for area in areas)


class TestMarks:
    def test_rows_of_a_section_with_a_title_are_hollow(self) -> None:
        of = with_section(board(*runs(ADAPTERS)), "controls", "lora", "adalora")
        figure, (panel,) = drawn(of)
        found = marks(panel, of)
        assert {label for label, mark in found.items() if mark.get_markerfacecolor() == "white"} == {"lora", "adalora"}
        assert found["lora"].get_markeredgecolor() not in ("white", found["adalora"].get_markeredgecolor())
        assert "Hollow: controls." in figure.get_suptitle().replace("\n", " ")
        assert "Hollow" not in drawn(board(*runs(ADAPTERS)))[0].get_suptitle()

    def test_rows_that_do_not_compete_are_hollow_and_on_no_front(self) -> None:
        of = with_section(
            board(*runs({"a": 1000, "b": 2000, "c": 3000, "hadapter": 500})), "", "hadapter", ranked=False
        )
        figure, (panel,) = drawn(of)
        assert marks(panel, of)["hadapter"].get_markerfacecolor() == "white"
        assert "Hollow: rows with fewer seeds." in figure.get_suptitle().replace("\n", " ")
        assert not [line for line in panel.lines if line.get_label() == "Pareto front"], "a, b and c are alike"

    def test_intervals_and_seeds_are_behind_the_points(self) -> None:
        of = board(*runs(ADAPTERS))
        _, (panel,) = drawn(of)
        points = [mark.get_zorder() for mark in marks(panel, of).values()]
        assert max(each.get_zorder() for each in panel.collections) < min(points)

    def test_a_row_without_a_parameter_count_or_score_is_left_out(self) -> None:
        of = board(*runs(ADAPTERS), record("lost", score=None), record("uncounted", parameters=None))
        _, (panel,) = drawn(of)
        assert set(marks(panel, of)) == set(ADAPTERS)


class TestForgetting:
    """The same picture with another cost: what a language model has forgotten."""

    RISES = {"lora": 0.15, "adalora": 0.02, "debora": -0.01, "hadapter": 0.12}

    def of(self, task: str = "text", windows: str = "one") -> list[RunRecord]:
        return [
            record(name, task, seed=seed, score=SCORES[name], forgetting=forgot(rise + 0.001 * (seed - 1), windows))
            for name, rise in self.RISES.items()
            for seed in range(3)
        ]

    def test_a_row_stands_at_its_mean_rise(self) -> None:
        found = board(*self.of())
        figure = scatter.draw(found, FORGETTING)
        assert figure is not None
        (panel,) = figure.axes
        assert panel.get_xlabel() == FORGETTING.words
        assert panel.get_xscale() == "linear"
        at = {label: place(mark) for label, mark in marks(panel, found).items()}
        assert at == {name: pytest.approx((rise, SCORES[name])) for name, rise in self.RISES.items()}
        low, high = panel.get_xlim()
        assert low < -0.01 < 0 < 0.15 < high

    def test_less_is_better(self) -> None:
        found = board(*self.of())
        figure = scatter.draw(found, FORGETTING)
        assert figure is not None
        (front,) = [line for line in figure.axes[0].lines if line.get_label() == "Pareto front"]
        xs = sorted({x for x, _ in front.get_xydata().tolist()})  # type: ignore[union-attr]
        assert xs == pytest.approx([-0.01, 0.12])

    def test_other_windows_are_no_match(self) -> None:
        mixed = [*self.of("one"), *self.of("two"), record("head", "two", score=0.4, forgetting=forgot(0.1, "other"))]
        figure = scatter.draw(board(*mixed), FORGETTING)
        assert figure is not None
        assert [panel.get_title() for panel in figure.axes if panel.get_visible()] == ["one"]

    def test_nothing_without_a_sample(self) -> None:
        assert scatter.draw(board(record("lora"), record("head")), FORGETTING) is None
