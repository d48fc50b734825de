"""Results kept beside the code: their archives give the committed tables again, and their texts show them."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import NamedTuple

import pytest

from harness.cli import main

ROOT = Path(__file__).parents[2]
RESULTS = ("field", "language_models")  # folders of results/ and, with .toml, the sweeps in scripts/


class Kept(NamedTuple):
    folder: Path  # as committed
    unpacked: Path  # as `report` writes it of the archive's records


@pytest.fixture(scope="module", params=RESULTS)
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    folder, unpacked = ROOT / "results" / request.param, tmp_path_factory.mktemp(request.param)
    with tarfile.open(folder / "records.tar.xz") as archive:
        archive.extractall(unpacked, filter="data")
    config = ROOT / "scripts" / f"{request.param}.toml"
    assert main(["report", "--results", str(unpacked), "--config", str(config)]) == 0
    return Kept(folder, unpacked)


def test_tables_are_those_of_the_records(kept: Kept) -> None:
    names = sorted(path.name for path in (kept.folder / "tables").iterdir())
    assert len(names) > 4
    for name in names:
        assert (kept.unpacked / "tables" / name).read_text() == (kept.folder / "tables" / name).read_text(), name


def test_the_text_shows_the_table_and_pictures_that_are_there(kept: Kept) -> None:
    text = (kept.folder / "README.md").read_text()
    rows = [line for line in (kept.unpacked / "tables" / "leaderboard.md").read_text().splitlines() if line[:1] == "|"]
    assert len(rows) > 20
    assert [row for row in rows if row not in text] == []
    assert all(f"pictures/{path.name}" in text for path in (kept.folder / "pictures").iterdir())
