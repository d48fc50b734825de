"""The study: its archive gives the committed tables and text again."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.report_records import record

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


def test_a_task_is_shown_on_the_seeds_that_every_row_has_ended_on(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "study")
    whole = runpy.run_path(str(ROOT / "scripts" / "study" / "write.py"))["_whole"]
    cells = [(task, seed, method) for task in ("whole", "begun") for seed in range(4) for method in ("lora", "head")]
    missing = [("whole", 3, "head"), ("begun", 0, "head"), ("begun", 1, "lora")]
    records = [record(method, task, seed=seed) for task, seed, method in cells if (task, seed, method) not in missing]
    shown = {(each.spec.task, each.spec.seed, each.spec.method) for each in whole(records, 2)}
    assert shown == {("whole", seed, method) for seed in range(3) for method in ("lora", "head")}
