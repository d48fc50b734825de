"""Pictures are declared once, here or in a package: what is drawn, what costs nothing but itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from harness import registry
from harness.commands.packages import added_pictures, known_of
from harness.report.build import build_report
from harness.report.known import Known
from harness.report.pictures.every import PICTURES
from harness.report.pictures.figures import panels_for
from harness.report.pictures.picture import Picture, PictureData
from tests.support.report_records import record, stored


def points(data: PictureData) -> Figure:
    figure, (panel,) = panels_for(1, data.board.caption)
    panel.plot([len(data.records)], [len(data.frame)], "o")
    return figure


def leave(data: PictureData) -> None:
    raise SystemExit("go now")


def test_one_more_is_drawn_in_both_forms_and_shown_and_goes_with_its_last_records(tmp_path: Path) -> None:
    store, mine = stored(tmp_path, record()), Picture("mine", "My <points>", points)
    names = [path.name for path in build_report(store, known=Known(pictures=(mine,)))]
    assert {"mine.png", "mine.pdf"} < set(names)
    assert "My &lt;points&gt;" in (tmp_path / "report.html").read_text(encoding="utf-8")
    nothing = Picture("mine", "My points", lambda data: None)
    build_report(store, known=Known(pictures=(nothing,)))
    assert not list((tmp_path / "pictures").glob("mine*"))


def test_one_that_ends_the_process_costs_itself_alone(tmp_path: Path) -> None:
    told: list[str] = []
    paths = build_report(
        stored(tmp_path, record()), tell=told.append, known=Known(pictures=(Picture("mine", "", leave),))
    )
    assert told == ["picture 'mine' cannot be made (go now); the rest of the report is"]
    assert "score_vs_parameters.png" in {path.name for path in paths}


@pytest.mark.parametrize("name", ["", "../mine", "a b", "Mine", "mine.png", "1st"])
def test_a_name_that_is_no_files(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name the files of a picture"):
        Picture(name, "Mine", points)


def test_names_and_titles_are_each_ones_own() -> None:
    assert len({picture.name for picture in PICTURES}) == len({picture.title for picture in PICTURES}) == len(PICTURES)


def test_what_packages_add_that_is_no_picture_or_has_a_name_that_is_taken_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, same = Picture("mine", "Mine", points), Picture("mine", "Mine, too", points)
    taken = Picture(PICTURES[0].name, "Mine", points)
    found: dict[str, object] = {"first": mine, "second": same, "taken": taken, "number": 5}
    monkeypatch.setattr(registry, "extensions", lambda group: (found, ["picture 'gone' cannot be imported"]))
    pictures, told = added_pictures()
    assert pictures == [mine]
    assert [line.split("'")[1] for line in told] == ["gone", "second", "taken", "number"]
    assert known_of([record()]).pictures == (mine,)
    assert capsys.readouterr().err.splitlines() == told
