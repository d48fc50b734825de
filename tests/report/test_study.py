"""The study: its archive gives the committed tables and text again, and its statistics mean what they say."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.report_records import record

ROOT = Path(__file__).parents[2]
STUDY = Path("results") / "study"
agreement = runpy.run_path(str(ROOT / "scripts" / "study" / "ranks.py"))["agreement"]


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


def test_agreement_of_equal_ranks_is_whole_and_of_dealt_ones_that_of_chance():
    ranks = {str(layer): layer % 4 for layer in range(40)}
    found = agreement([ranks, ranks, ranks])
    assert found.shared == 1
    assert found.high < 1
    other = {str(layer): (layer // 4) % 4 for layer in range(40)}  # independent of the first, nearly exactly
    found = agreement([ranks, other])
    assert found.low <= found.shared <= found.high


def test_agreement_by_hand():
    found = agreement([{"a": 3, "b": 1}, {"a": 1, "b": 1}])
    assert found.shared == 2 * (1 + 1) / (4 + 2)
    assert found.chance == pytest.approx(found.shared)  # dealt either way, 2 are shared


def test_within_shapes_a_preference_for_a_shape_is_no_agreement():
    runs = [
        {
            f"{shape}{layer}": 5 * (shape == "wide") + (layer + shift) % 2
            for shape in ("wide", "narrow")
            for layer in range(8)
        }
        for shift in (0, 1)
    ]
    found = agreement(runs, lambda layer: layer[:-1])
    assert found.shared <= found.low  # the layers with one more are never the same
    assert agreement(runs).high < found.shared


def test_agreement_needs_two_runs():
    with pytest.raises(ValueError, match="needs two runs"):
        agreement([{"a": 1}])


def test_a_task_is_shown_on_the_seeds_that_every_row_has_ended_on(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "study")
    whole = runpy.run_path(str(ROOT / "scripts" / "study" / "write.py"))["_whole"]
    cells = [(task, seed, method) for task in ("whole", "begun") for seed in range(4) for method in ("lora", "head")]
    missing = [("whole", 3, "head"), ("begun", 0, "head"), ("begun", 1, "lora")]
    records = [record(method, task, seed=seed) for task, seed, method in cells if (task, seed, method) not in missing]
    shown = {(each.spec.task, each.spec.seed, each.spec.method) for each in whole(records, 2)}
    assert shown == {("whole", seed, method) for seed in range(3) for method in ("lora", "head")}
