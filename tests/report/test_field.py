"""The field: its archive gives the committed tables again, and its text shows them."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from harness.cli import main

ROOT = Path(__file__).parents[2]
FIELD = ROOT / "results" / "field"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("field")
    with tarfile.open(FIELD / "records.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    assert main(["report", "--results", str(folder), "--config", str(ROOT / "scripts" / "field.toml")]) == 0
    return folder


def test_tables_are_those_of_the_records(unpacked: Path) -> None:
    names = sorted(path.name for path in (FIELD / "tables").iterdir())
    assert len(names) > 4
    for name in names:
        assert (unpacked / "tables" / name).read_text() == (FIELD / "tables" / name).read_text(), name


def test_the_text_shows_the_table_and_pictures_that_are_there(unpacked: Path) -> None:
    text = (FIELD / "README.md").read_text()
    rows = [line for line in (unpacked / "tables" / "leaderboard.md").read_text().splitlines() if line[:1] == "|"]
    assert len(rows) > 20
    assert [row for row in rows if row not in text] == []
    assert all(f"pictures/{path.name}" in text for path in (FIELD / "pictures").iterdir())
