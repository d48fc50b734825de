"""From text to cells: parsing, grids, identity."""

import re

import pytest

from harness import registry
from harness.errors import InputError
from harness.notation import parse_choice, parse_value, split_list, split_tasks
from harness.plan.plan import plan_sweep
from harness.plan.sweep import Fingerprints, Sweep, method_cells, spec_of, task_cells
from harness.record.store import RecordStore
from harness.spec import Place, RunSpec, TrainSpec

SAME = Fingerprints("data", "model")


def specs_of(place=None, **sweep):
    made = Sweep.of({"methods": ["lora"], "tasks": ["digits"], **sweep}, "sweep")
    first = [spec_of(made, place or Place(), m, t, SAME) for t in task_cells(made) for m in method_cells(made)]
    return [spec.model_copy(update={"seed": seed}) for seed in made.seeds for spec in first]


def test_lists_and_brackets():
    assert split_list('a, b[x=1,y=["q","v"]],,c') == ["a", 'b[x=1,y=["q","v"]]', "c"]
    assert split_list('a[x="one, two]",y=1],b') == ['a[x="one, two]",y=1]', "b"]
    assert parse_choice('a[x="one, two]",y=1]') == ("a", {"x": "one, two]", "y": 1})
    assert parse_choice('lora[rank=4,alpha=0.5,target_modules=["query","value"]]') == (
        "lora",
        {"rank": 4, "alpha": 0.5, "target_modules": ["query", "value"]},
    )
    assert parse_value("true") is True
    assert parse_value("oblique") == "oblique"


@pytest.mark.parametrize("text", ["lora[rank=4", "lora[rank]", "[rank=4]", "lora[rank=4,rank=8]", "lora]"])
def test_broken_brackets_are_named(text):
    with pytest.raises(InputError, match=r"bracket|read|no value|twice"):
        [parse_choice(part) for part in split_list(text)]


def test_grid_multiplies_only_its_method():
    sweep = Sweep.of({"methods": ["lora", "head"], "grid": {"lora.rank": [2, 4], "lora.alpha": [8, 16]}}, "sweep")
    cells = method_cells(sweep)
    assert [(name, getattr(method, "rank", None), getattr(method, "alpha", None)) for name, method in cells] == [
        ("lora", 2, 8.0),
        ("lora", 2, 16.0),
        ("lora", 4, 8.0),
        ("lora", 4, 16.0),
        ("head", None, None),
    ]


def test_grid_and_brackets_reach_the_same_parameter():
    by_grid = specs_of(methods=["debora"], grid={"debora.tau": [4, 8]})
    by_brackets = specs_of(methods=["debora[tau=4]", "debora[tau=8.0]"])
    assert [spec.run_id for spec in by_grid] == [spec.run_id for spec in by_brackets]


PEFT_NAMES = [
    ("lora[r=4,lora_alpha=8,lora_dropout=0.1]", "lora[rank=4,alpha=8,dropout=0.1]"),
    ("lora[use_rslora=true,use_dora=true]", "lora[rslora=true,dora=true]"),
    ("lora[init_lora_weights=true]", "lora"),
    ("lora[init_lora_weights=pissa_niter_4]", "lora[init=pissa_niter_4]"),
    ("pruned_lora[r=4,lora_alpha=8,lora_dropout=0.1]", "pruned_lora[rank=4,alpha=8,dropout=0.1]"),
    ("adalora[init_r=6,target_r=3,lora_alpha=8]", "adalora[init_rank=6,target_rank=3,alpha=8]"),
    ("adalora[lora_dropout=0.1,orth_reg_weight=0.5]", "adalora[dropout=0.1,orthogonality=0.5]"),
]


@pytest.mark.parametrize(("by_peft", "by_ours"), PEFT_NAMES)
def test_a_parameter_by_the_name_that_peft_has_for_it_is_the_same_run(by_peft, by_ours):
    (found,), (expected,) = specs_of(methods=[by_peft]), specs_of(methods=[by_ours])
    assert found.method_parameters == expected.method_parameters
    assert found.run_id == expected.run_id


def test_names_of_peft_in_the_grid():
    by_peft = specs_of(grid={"lora.r": [2, 4]}, methods=["lora[lora_alpha=8]"])
    by_ours = specs_of(grid={"lora.rank": [2, 4]}, methods=["lora[alpha=8]"])
    assert [spec.run_id for spec in by_peft] == [spec.run_id for spec in by_ours]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methods": ["lora[rank=4,r=4]"]}, "rank and r of lora are one parameter: give one of them"),
        ({"methods": ["lora[rank=4]"], "grid": {"lora.r": [4]}}, "rank and r of lora are one parameter"),
        ({"grid": {"lora.rank": [4], "lora.r": [2]}}, "rank and r of lora are one parameter"),
        ({"methods": ["lora[lora_alhpa=4]"]}, "unknown parameter of lora 'lora_alhpa'. Did you mean 'lora_alpha'?"),
        ({"methods": ["lora[r=0]"]}, "lora.r = 0 is not allowed: it should be greater than or equal to 1"),
        ({"methods": ["lora[init_lora_weights=false]"]}, "lora.init_lora_weights: false, both factors at random,"),
        ({"methods": ["lora[init_lora_weights=pisa]"]}, "lora.init_lora_weights: unknown init 'pisa'. Did you mean"),
        ({"methods": ["head[r=4]"]}, "unknown parameter of head 'r'"),
    ],
)
def test_wrong_uses_of_names_of_peft(values, message):
    with pytest.raises(InputError, match=re.escape(message)):
        specs_of(**values)


@pytest.mark.parametrize("name", ["lora", "adalora", "pruned_lora"])
def test_every_name_of_peft_is_one_and_no_parameter_of_ours(name):
    from peft import AdaLoraConfig, LoraConfig

    cls = registry.method_class(name)
    assert cls.peft_names().keys() <= (AdaLoraConfig if name == "adalora" else LoraConfig).__dataclass_fields__.keys()
    assert not cls.peft_names().keys() & cls.model_fields.keys()


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"debora.tau": [4]}, "unknown method in the grid 'debora'"),
        ({"lora.rnak": [4]}, "unknown parameter of lora 'rnak'. Did you mean 'rank'?"),
        ({"lora": [4]}, "method.parameter"),
        ({"lora.rank": []}, "no values"),
    ],
)
def test_wrong_grids(grid, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        specs_of(grid=grid)


def test_a_parameter_cannot_be_fixed_and_varied():
    with pytest.raises(InputError, match="'rank' of lora is fixed in brackets and varied by the grid"):
        specs_of(methods=["lora[rank=4]"], grid={"lora.rank": [2, 4]})


def test_a_cell_given_twice_is_one_cell():
    assert len(specs_of(methods=["lora", "lora[rank=8]", "lora"])) == 1


def test_a_family_stands_for_its_members():
    names = [name for name, _ in task_cells(Sweep.of({"tasks": ["glue", "glue/cola"]}, "sweep"))]
    assert sorted(names) == sorted(f"glue/{m}" for m in ("cola", "sst2", "mrpc", "stsb", "mnli", "qnli", "qqp", "rte"))


def test_identity_covers_what_changes_results_and_nothing_else():
    base = specs_of()[0]
    elsewhere = specs_of(place=Place(data_root="/x", device="cpu", checkpoint_every=5, save_adapter=True))[0]
    assert elsewhere.run_id == base.run_id
    assert specs_of(methods=["lora[rank=8]"])[0].run_id == base.run_id  # a default written out
    for change in (
        {"methods": ["lora[rank=4]"]},
        {"seeds": [1]},
        {"threads": 2},
        {"limit": 50},
        {"evaluation_limit": 50},
        {"train": {"batches": 7}},
        {"train": {"precision": "bf16"}},
    ):
        assert specs_of(**change)[0].run_id != base.run_id, change
    for name in ("data_fingerprint", "model_fingerprint", "task", "method"):
        assert base.model_copy(update={name: "other"}).run_id != base.run_id
    for name in ("method_version", "task_version"):
        assert base.model_copy(update={name: 99}).run_id != base.run_id


def test_run_id_is_stable_across_releases():
    """A changed hash would make everyone's finished runs start again: change it only with schema_version."""
    spec = RunSpec(
        method="m", method_version=1, method_parameters={"a": 1.0}, task="t", task_version=1, task_parameters={},
        data_fingerprint="d", model_fingerprint="m", seed=0, train=TrainSpec(batches=10),
    )  # fmt: skip
    assert spec.run_id == RunSpec.model_validate_json(spec.model_dump_json()).run_id == "7d42b14e065d54d6"


@pytest.mark.parametrize("seeds", [[], [-1], [1, 1]])
def test_wrong_seeds(seeds):
    with pytest.raises(InputError, match="seeds"):
        specs_of(seeds=seeds)


def test_one_budget_only():
    with pytest.raises(InputError, match=r"batches = 5 and epochs = 1\.0 are both set"):
        TrainSpec.of({"batches": 5, "epochs": 1.0}, "train")
    assert TrainSpec(epochs=2, batch_size=32).budget(100) == 7
    assert TrainSpec(batches=9).budget(100) == 9
    assert TrainSpec().epochs == 3.0


def test_a_model_for_tasks_that_take_none():
    with pytest.raises(InputError, match="--model 'x' has no use here: digits brings its own model"):
        specs_of(model="x")


def test_large_plans_have_distinct_cells():
    """100,000 cells, each with its own identity."""
    specs = specs_of(grid={"lora.alpha": list(range(1, 101))}, seeds=list(range(1000)))
    assert len(specs) == 100_000
    assert len({spec.run_id for spec in specs[::997]}) == len(specs[::997])


def plan_of(store, *, try_models=False, **sweep):
    values = {"tasks": ["synthetic"], "train": {"batches": 4}, **sweep}
    return plan_sweep(Sweep.of(values, "sweep"), Place(), store, try_models=try_models)


def test_a_plan_is_the_same_whether_or_not_models_are_tried_and_writes_nothing(tmp_path):
    store = RecordStore(tmp_path / "results")
    methods = ["head", "lora[rank=2]", "lora[parameters=900]", "hadapter"]
    dry, tried = (plan_of(store, methods=methods, seeds=[3, 1], try_models=value) for value in (False, True))
    assert dry.runs(store) == tried.runs(store)
    assert [(spec.seed, spec.method) for spec in dry.runs(store)] == [(s, m) for s in (3, 1) for m in ORDER]
    # A LoRA of 900 parameters is that of rank 2: cells that became one run are one.
    assert [cell.label for cell in dry.cells] == ["head", "lora[rank=2]", "hadapter"]
    assert not (tmp_path / "results").exists()


ORDER = ("head", "lora", "hadapter")


def test_the_stages_of_a_plan_are_trials_and_then_the_runs_of_the_report(tmp_path):
    store = RecordStore(tmp_path)
    (alone,) = plan_of(store, methods=["head", "lora"]).stages(store)
    assert [spec.method for spec in alone] == ["head", "lora"]
    trials, runs = plan_of(store, methods=["head", "lora"], seeds=[0, 1], tune=2).stages(store)
    assert [(spec.method, spec.is_trial) for spec in trials] == [("head", True), ("lora", True)] * 2
    assert [(spec.method, spec.seed, spec.is_trial) for spec in runs] == [
        (method, seed, False) for seed in (0, 1) for method in ("head", "lora")
    ]
    assert {run_id for spec in runs for run_id in spec.search.trials} == {spec.run_id for spec in trials}


def test_a_method_that_does_not_fit_is_a_cell_with_a_reason_and_without_a_search(tmp_path):
    store = RecordStore(tmp_path)
    fits, misfit = plan_of(store, methods=["head", "hadapter"], tasks=["digits"], tune=2).cells
    assert (fits.reason, fits.search is None) == (None, False)
    assert misfit.reason is not None
    assert misfit.search is None
    assert [spec.method for spec in plan_of(store, methods=["hadapter"], tasks=["digits"], tune=2).trials(store)] == []


def test_a_label_leaves_out_what_follows_from_the_rest():
    def labelled(**parameters):
        return registry.label_of("debora", registry.make_method("debora", parameters).model_dump(mode="json"))

    assert labelled() == "debora"
    assert labelled(geometry="oblique") == "debora[geometry=oblique]"  # the learning rate follows
    assert labelled(geometry="oblique", tau=4) == "debora[geometry=oblique,tau=4]"
    assert labelled(learning_rate=3e-3) == "debora[learning_rate=0.003]"  # what oblique takes is not what matrix takes
    assert registry.label_of("peft", {"type": "ia3"}) == "peft[type=ia3]"


OWN_PATHS = ["a,b.csv", "data [final].csv", "odd].csv", "[x", 'say "hi".csv', "a,text:b.csv", "plain.csv", "x[label=y]"]


@pytest.mark.parametrize("name", OWN_PATHS)
@pytest.mark.parametrize("parameters", ["", "[label=stars,max_length=8]"])
def test_the_path_of_own_data_may_hold_commas_and_brackets(tmp_path, monkeypatch, name, parameters):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("text,label\n")
    given = {"label": "stars", "max_length": 8} if parameters else {}
    for path in (name, str(tmp_path / name)):
        text = f"glue/cola,text:{path}{parameters},generation:{path},digits"
        names = split_tasks(text)
        assert names == ["glue/cola", f"text:{path}{parameters}", f"generation:{path}", "digits"]
        assert parse_choice(names[1]) == (f"text:{path}", given)
        assert parse_choice(names[2]) == (f"generation:{path}", {})


@pytest.mark.parametrize("name", [name for name in OWN_PATHS if '"' not in name])
def test_a_path_in_quotes_is_taken_as_it_is(name):
    text = f'glue/cola,text:"{name}"[label=stars],digits'
    names = split_tasks(text)
    assert names == ["glue/cola", f'text:"{name}"[label=stars]', "digits"]
    assert parse_choice(names[1]) == (f"text:{name}", {"label": "stars"})


def test_the_longest_path_that_is_there_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "a,b.csv"):
        (tmp_path / name).write_text("")
    assert split_tasks("text:a,b.csv") == ["text:a,b.csv"]
    assert split_tasks("text:a,c.csv") == ["text:a", "c.csv"]
    assert split_tasks("text:nowhere,b.csv") == ["text:nowhere", "b.csv"]
