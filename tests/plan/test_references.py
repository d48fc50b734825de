"""Cells that take ranks or sizes from another configuration of their sweep: labels, order, identity, searches."""

import re

import pytest

from harness.errors import InputError
from harness.plan.plan import plan_sweep
from harness.plan.sweep import Sweep, method_cells
from harness.record.store import RecordStore
from harness.spec import Place
from tests.support.report_records import stored

DEBORA = "debora[geometry=oblique]"
CONTROLS = [
    "lora[ranks_of=debora]",
    "lora[ranks_of=debora,shuffle_ranks=true]",
    "pruned_lora[size_of=debora,selection=random]",
    "lora[parameters_of=debora]",
]


def plan_of(store, *methods, **sweep):
    values = {"tasks": ["synthetic"], "train": {"batches": 12}, "methods": methods, **sweep}
    return plan_sweep(Sweep.of(values, "sweep"), Place(), store, try_models=False)


def ended(store, specs, ranks=None):
    """Records of these runs in the store, with a score that is better for a larger learning rate."""
    from harness.record.record import RunRecord
    from tests.support.report_records import record

    like = record()
    rates = {spec.run_id: spec.method_parameters["learning_rate"] for spec in specs}
    records = [
        RunRecord.model_validate(
            like.model_dump(mode="json")
            | {"run_id": spec.run_id, "spec": spec.model_dump(mode="json"), "ranks": ranks or {}}
            | {"holdout": {like.headline: rates[spec.run_id]}}
        )
        for spec in specs
    ]
    stored(store.results, *records)


def test_labels_have_one_spelling():
    spellings = ['ranks_of="debora[geometry=oblique]"', "ranks_of=debora[learning_rate=3e-3,geometry=oblique]"]
    found = [method_cells(Sweep.of({"methods": [DEBORA, f"lora[{text}]"]}, "sweep")) for text in spellings]
    assert found[0] == found[1]
    assert found[0][1][1].parents == {"ranks_of": DEBORA}


def test_a_grid_may_vary_the_label():
    sweep = Sweep.of({"methods": ["debora", DEBORA, "lora"], "grid": {"lora.ranks_of": ["debora", DEBORA]}}, "sweep")
    assert [method.parents for _, method in method_cells(sweep)[2:]] == [{"ranks_of": "debora"}, {"ranks_of": DEBORA}]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["debora", "lora[ranks_of=deborra]"], "lora.ranks_of 'deborra'. Did you mean 'debora'? Available: debora."),
        (["debora[tau=4]", "lora[ranks_of=debora]"], "'debora'. Did you mean 'debora[tau=4]'?"),
        (["debora", "pruned_lora[size_of=debora[tau=5]]"], "label of the sweep in pruned_lora.size_of 'debora[tau=5]'"),
        (["debora", "lora[ranks_of=debora[taau=5]]"], "unknown label of the sweep in lora.ranks_of"),
        (["debora", f"lora[ranks_of={'lora[ranks_of=' * 40}debora{']' * 40}]"], "unknown label of the sweep"),
        (["lora[ranks_of=lora]"], "lora.ranks_of = lora is not allowed: lora[ranks_of=lora] would wait for itself"),
        (["lora[ranks_of=pruned_lora]", "pruned_lora[size_of=lora]"], "would wait for itself, in a circle"),
        (["debora", "lora[ranks_of=debora,parameters=9]"], "parameters = 9 sets the rank, and so does ranks_of"),
        (["debora", "lora[parameters_of=debora,rank=4]"], "parameters_of = debora sets the rank, and so does rank"),
        (["debora", 'lora[ranks_of=debora,ranks="a"]'], "ranks_of = debora sets the ranks, and so does ranks"),
        (["debora", "pruned_lora[size_of=debora,keep=0.5]"], "size_of = debora and keep are both set"),
    ],
)
def test_wrong_labels_are_found_before_anything_is_loaded(methods, message):
    with pytest.raises(InputError, match=re.escape(message)):
        method_cells(Sweep.of({"methods": methods}, "sweep"))


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["head", "lora[ranks_of=head]"], "lora[ranks_of=head]: what it waits for has no ranks"),
        (
            ["hadapter", "pruned_lora[size_of=hadapter]"],
            "pruned_lora[size_of=hadapter]: what it waits for has no ranks",
        ),
        (["head", "lora[parameters_of=head]"], "lora[parameters_of=head]: what it waits for has no adapter"),
    ],
)
def test_a_parent_that_has_not_what_is_asked_for(tmp_path, methods, message):
    with pytest.raises(InputError, match=re.escape(message)):
        plan_of(RecordStore(tmp_path), *methods)


def test_children_run_after_their_parents_at_the_same_seed_and_hash_the_parents_run_and_no_ranks(tmp_path):
    planned = plan_of(RecordStore(tmp_path), *CONTROLS, "debora", "head", seeds=[0, 1])
    first, last = planned.stages(RecordStore(tmp_path))
    assert [(spec.method, spec.seed) for spec in first] == [(m, s) for s in (0, 1) for m in ("debora", "head")]
    parents = {spec.seed: spec.run_id for spec in first if spec.method == "debora"}
    children = [spec for spec in last if spec.parents]
    assert len(children) == 8
    for spec in children:
        ((parameter, parent),) = spec.parents.items()
        assert parent == parents[spec.seed]
        assert spec.method_parameters[parameter] == "debora"
        assert not spec.method_parameters.get("rank_pattern")
        assert spec.run_id != spec.model_copy(update={"parents": {parameter: "0" * 16}}).run_id
    assert {spec.run_id for spec in first} < {spec.run_id for spec in last}
    assert [cell.label for cell in planned.cells] == ["debora", *CONTROLS, "head"]


def test_a_chain_takes_a_stage_for_each_link(tmp_path):
    chain = ["pruned_lora[size_of=lora[ranks_of=debora]]", "lora[ranks_of=debora]", "debora"]
    planned = plan_of(RecordStore(tmp_path), *chain)
    assert [len(specs) for specs in planned.stages(RecordStore(tmp_path))] == [1, 1, 3]
    assert [cell.notes[0].partition(";")[0] for cell in planned.cells[1:]] == [
        "waits for debora",
        "waits for lora[ranks_of=debora]",
    ]


def test_a_child_of_what_cannot_work_cannot_work(tmp_path):
    _, child = plan_of(
        RecordStore(tmp_path), "hadapter", "lora[parameters_of=hadapter]", tasks=["digits"], tune=2
    ).cells
    assert child.reason.startswith("it waits for hadapter, which cannot work here: ")
    assert child.search is None


def test_a_size_that_may_still_shrink_is_left_to_the_run(tmp_path):
    _, child = plan_of(RecordStore(tmp_path), "debora", "pruned_lora[rank=2,size_of=debora]").cells
    assert child.reason is None
    assert (
        child.notes[1]
        == "at the sizes that this one starts with: debora has 96 components, and rank 2 can have 1 to 24"
    )


def test_after_the_parents_search_the_child_is_searched_with_the_chosen_run_of_the_first_seed(tmp_path):
    store = RecordStore(tmp_path)
    store.make_ready()
    planned = plan_of(store, "lora", "lora[ranks_of=lora]", seeds=[5, 6], tune=3)
    stages = planned.stages(store)
    trials = next(stages)
    assert all(spec.is_trial and not spec.parents for spec in trials)
    waiting = planned.waiting(trials, store)
    assert [(cell.run_id, cell.method, cell.seed, cell.waits_for) for cell in waiting] == [
        ("", "lora[ranks_of=lora]", seed, "lora") for seed in (5, 6)
    ]
    ended(store, trials)
    runs = next(stages)
    best = max(spec.method_parameters["learning_rate"] for spec in trials)
    assert {spec.method_parameters["learning_rate"] for spec in runs} == {best}
    ended(store, runs)
    of_child = next(stages)
    assert [spec.is_trial for spec in of_child] == [True] * 3
    assert {spec.parents["ranks_of"] for spec in of_child} == {runs[0].run_id}
    assert [cell.run_id for cell in planned.waiting(of_child, store)] == ["", ""]
    ended(store, of_child)
    last = [spec for spec in next(stages) if spec.parents]
    assert [spec.parents["ranks_of"] for spec in last] == [spec.run_id for spec in runs]
    assert {run_id for spec in last for run_id in spec.search.trials} == {spec.run_id for spec in of_child}
    assert list(stages) == []


def test_a_child_whose_learning_rate_is_given_runs_as_given_after_its_parents_search(tmp_path):
    store = RecordStore(tmp_path)
    store.make_ready()
    planned = plan_of(store, "lora", "lora[ranks_of=lora,learning_rate=0.003]", seeds=[5, 6], tune=3)
    stages = planned.stages(store)
    ended(store, trials := next(stages))
    ended(store, runs := next(stages))
    of_child = [spec for spec in next(stages) if spec.parents]
    assert list(stages) == []
    assert len(trials) == 3
    assert [spec.parents["ranks_of"] for spec in of_child] == [spec.run_id for spec in runs]
    assert {(spec.search, spec.method_parameters["learning_rate"]) for spec in of_child} == {(None, 0.003)}
