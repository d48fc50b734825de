"""Runs that take ranks or sizes from another run of their sweep: what they take, and what if there is none."""

import json
import re

import pytest

from harness.cli import main
from harness.errors import Diverged
from harness.record.store import RecordStore
from methods.debora.method import Debora

DEBORA = "debora[rank=4,T_max=2,n0=0,step_size=0.5]"
CONTROLS = {
    "same": f"lora[rank=4,ranks_of={DEBORA}]",
    "shuffled": f"lora[rank=4,ranks_of={DEBORA},shuffle_ranks=true]",
    "random": f"pruned_lora[rank=4,size_of={DEBORA},selection=random]",
    "uniform": f"lora[parameters_of={DEBORA}]",
}
TOML = f"""
methods = {json.dumps([*CONTROLS.values(), DEBORA])}
tasks = ["synthetic", "digits"]
seeds = 2
train.batches = 30
"""


def run(results, methods, *options, batches=12, seeds=1):
    what = ["--methods", ",".join(methods), "--tasks", "synthetic", "--batches", str(batches), "--seeds", str(seeds)]
    return main(["run", "--executor", "serial", "--results", str(results), *what, *options])


def by_method(results):
    """(method, the parameter that names its parent) -> record, of a sweep of one seed."""
    records = RecordStore(results).records()
    return {record.spec.method + "".join(record.spec.parents): record for record in records}


@pytest.fixture(scope="module")
def controls(tmp_path_factory):
    """A results folder with all four controls on two tasks and two seeds, from one TOML."""
    folder = tmp_path_factory.mktemp("controls")
    (folder / "sweep.toml").write_text(TOML)
    options = ["--config", str(folder / "sweep.toml"), "--executor", "serial"]
    assert main(["run", *options, "--results", str(folder / "results")]) == 0
    return folder


def kind_of(spec):
    if spec.method == "pruned_lora":
        return "random"
    if "parameters_of" in spec.parents:
        return "uniform"
    return "shuffled" if spec.method_parameters["shuffle_ranks"] else "same"


def test_each_control_takes_the_ranks_or_the_size_of_the_run_of_its_task_and_seed(controls):
    records = {record.run_id: record for record in RecordStore(controls / "results").records()}
    assert len(records) == 20
    seen = set()
    for record in records.values():
        if not record.spec.parents:
            continue
        ((_, parent_id),) = record.spec.parents.items()
        parent, kind = records[parent_id], kind_of(record.spec)
        assert (parent.spec.method, parent.spec.task, parent.spec.seed) == (
            "debora",
            record.spec.task,
            record.spec.seed,
        )
        if kind == "same":
            assert record.ranks == parent.ranks
        elif kind == "uniform":
            assert len(set(record.ranks.values())) == 1
        else:
            assert sum(record.ranks.values()) == sum(parent.ranks.values())
        seen.add((kind, record.spec.task, record.spec.seed))
    assert len(seen) == 16


def test_a_control_is_the_run_at_the_ranks_of_that_run(controls, tmp_path):
    store = RecordStore(controls / "results")
    same = [record for record in store.records() if record.spec.parents and kind_of(record.spec) == "same"]
    child = next(record for record in same if record.spec.task == "synthetic")
    by_run_id = f'lora[rank=4,ranks="{child.spec.parents["ranks_of"]}"]'
    assert run(store.results, [by_run_id], "--seeds", f"{child.spec.seed},", batches=30) == 0
    single = next(record for record in store.records() if record.spec.method_parameters.get("ranks"))
    assert single.metrics == child.metrics
    assert store.history(single.run_id) == store.history(child.run_id)


def test_one_row_over_seeds_and_tasks(controls, capsys):
    assert main(["report", "--results", str(controls / "results"), "--methods", "lora,pruned_lora,debora"]) == 0
    capsys.readouterr()
    table = json.loads((controls / "results" / "tables" / "leaderboard.json").read_text())
    text = json.dumps(table)
    for label in CONTROLS.values():
        assert json.dumps(label)[1:-1] in text


def test_given_again_nothing_runs_and_a_new_seed_runs_parent_and_children(controls, capsys):
    options = ["--config", str(controls / "sweep.toml"), "--executor", "serial", "--results", str(controls / "results")]
    main(["run", *options])
    assert re.findall(r"\d+ to do", capsys.readouterr().out) == ["0 to do", "0 to do"]
    main(["run", *options, "--seeds", "3", "--dry-run"])
    output = capsys.readouterr().out
    assert f"waits for {DEBORA}; counted at the sizes that this one starts with" in output
    assert "30 runs (seeds 0, 1, 2), 20 of them finished" in output
    assert "time: training takes about" in output


@pytest.mark.parametrize(
    ("error", "parents", "childs"),
    [(RuntimeError("no luck"), "failed", "failed"), (Diverged("the loss is nan"), "diverged", "unsupported")],
)
def test_a_child_of_a_run_without_a_result_is_a_cell_with_the_reason(
    tmp_path, monkeypatch, capsys, error, parents, childs
):
    methods = ["debora", "lora[ranks_of=debora]", "pruned_lora[size_of=lora[ranks_of=debora]]"]
    with monkeypatch.context() as broken:
        broken.setattr(Debora, "start", on_data(Debora.start, error))
        assert run(tmp_path, methods, "--max-retries", "1") == 1
    output = capsys.readouterr().out
    assert output.count("resumed (1 of 1)") == (parents == "failed")  # the parent alone is worth another attempt
    found = by_method(tmp_path)
    assert found["debora"].status == parents
    for name, waited in (("loraranks_of", "debora"), ("pruned_lorasize_of", "lora[ranks_of=debora]")):
        assert found[name].status == childs
        assert found[name].error.startswith(f"it waited for {waited}, whose run ")
        assert found[name].traceback is None
    again = run(tmp_path, methods, "--retry-failed")
    statuses = {record.status for record in by_method(tmp_path).values()}
    assert (again, statuses) == ((0, {"done"}) if parents == "failed" else (1, {"diverged", "unsupported"}))


def on_data(start, error):
    """A method's start that fails wherever there are weights, and not for a plan."""

    def fails(self, backbone, *others):
        if next(backbone.module.parameters()).is_meta:
            return start(self, backbone, *others)
        raise error

    return fails


def test_a_size_that_a_child_cannot_have_is_a_cell_with_the_reason(tmp_path):
    assert run(tmp_path, ["lora[rank=3]", "pruned_lora[rank=2,size_of=lora[rank=3]]"]) == 0
    child = by_method(tmp_path)["pruned_lorasize_of"]
    assert (child.status, child.error) == ("unsupported", "lora[rank=3] has 36 components, and rank 2 can have 1 to 24")


def test_status_says_what_waits_and_for_what(tmp_path, monkeypatch, capsys):
    methods = ["debora", "lora[ranks_of=debora]", "pruned_lora[size_of=debora]"]
    with monkeypatch.context() as broken:
        broken.setattr(Debora, "start", on_data(Debora.start, KeyboardInterrupt()))
        assert run(tmp_path, methods, seeds=2) == 130
    capsys.readouterr()
    main(["status", "--results", str(tmp_path)])
    output = capsys.readouterr().out
    assert "waits for debora: lora[ranks_of=debora] · synthetic, 2 runs" in output
    assert "waits for debora: pruned_lora[size_of=debora] · synthetic, 2 runs" in output
    assert "6 cells: 0 ended, 0 running, 6 waiting" in output
    assert run(tmp_path, methods, seeds=2) == 0
    capsys.readouterr()
    main(["status", "--results", str(tmp_path)])
    assert "waits for" not in capsys.readouterr().out


def test_status_during_the_search_of_a_parent(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as broken:
        broken.setattr(Debora, "start", on_data(Debora.start, KeyboardInterrupt()))
        assert run(tmp_path, ["debora", "lora[ranks_of=debora]"], "--tune", "2") == 130
    capsys.readouterr()
    main(["status", "--results", str(tmp_path)])
    output = capsys.readouterr().out
    assert "waits for debora: lora[ranks_of=debora] · synthetic, 1 run" in output
    assert "3 cells: 0 ended, 0 running, 3 waiting" in output
