"""The study: its archive gives the committed tables and text again."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUDY = Path("results") / "study"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A copy of the project's study, written again from the archive alone."""
    folder = tmp_path_factory.mktemp("study")
    (folder / STUDY).mkdir(parents=True)
    for name in ("README.md", STUDY / "records.tar.xz"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "scripts" / "study", folder / "scripts" / "study")
    command = [sys.executable, str(folder / "scripts" / "study" / "write.py")]
    subprocess.run(command, check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": ""})
    return folder


def test_tables_and_texts_are_those_of_the_records(written):
    names = [*sorted((ROOT / STUDY / "tables").iterdir()), ROOT / STUDY / "README.md", ROOT / "README.md"]
    assert len(names) > 8
    for path in names:
        assert (written / path.relative_to(ROOT)).read_text() == path.read_text(), path


def test_pictures_of_the_texts_are_there(written):
    pictures = {path.name for path in (written / STUDY / "pictures").iterdir()}
    assert pictures == {path.name for path in (ROOT / STUDY / "pictures").iterdir()}
    text = (ROOT / STUDY / "README.md").read_text()
    assert all(f"pictures/{name}" in text for name in pictures)
