"""Equal tuning: the same number of trials for every method, scored on the holdout, costs told."""

import math
import re

import pandas as pd
import pytest

from harness import registry
from harness.cli import main
from harness.contracts import Subject, spec_of
from harness.contracts.subject import method_of
from harness.parameters import Range
from harness.plan import tuning
from harness.plan.sweep import TRIAL_SEED
from harness.record.store import RecordStore
from tests.end_to_end.test_contracts import PARAMETERS


def tuned(results, *extra, trials=6, seeds=2):
    what = ["--methods", "head,full[learning_rate=1e-4]" if "given" in extra else "head,lora[rank=2]"]
    where = ["--executor", "serial", "--results", str(results)]
    rest = [option for option in extra if option != "given"]
    numbers = ["--batches", "12", "--seeds", str(seeds), "--tune", str(trials)]
    return main(["run", *what, "--tasks", "synthetic", *numbers, *where, *rest])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    assert tuned(folder) == 0
    return folder


def of_role(results, role):
    records = RecordStore(results).records()
    return [record for record in records if record.spec.search and record.spec.search.role == role]


def test_every_method_gets_as_many_trials_which_never_see_the_evaluation(results):
    trials = of_role(results, "trial")
    assert len(trials) == 12
    assert {record.spec.method for record in trials} == {"head", "lora"}
    for record in trials:
        assert record.spec.seed == TRIAL_SEED
        assert record.score is None
        assert record.metrics == {}
        assert set(record.holdout) == {"accuracy"}
        assert not (RecordStore(results).folder(record.run_id) / "predictions.safetensors").exists()


def test_the_best_setting_on_the_holdout_runs_on_the_seeds_of_the_report(results):
    for method in ("head", "lora"):
        trials = {record.run_id: record for record in of_role(results, "trial") if record.spec.method == method}
        runs = [record for record in of_role(results, "chosen") if record.spec.method == method]
        assert [record.spec.seed for record in sorted(runs, key=lambda record: record.spec.seed)] == [0, 1]
        for record in runs:
            assert set(record.spec.search.trials) == trials.keys()
            order = [trials[run_id] for run_id in record.spec.search.trials]
            assert order[0].spec.method_parameters["learning_rate"] == registry.make_method(method, {}).learning_rate
            best = max(order, key=lambda trial: trial.holdout["accuracy"])  # the first of equals
            assert record.spec.method_parameters == best.spec.method_parameters
            assert record.score is not None


def test_again_nothing_runs_and_more_seeds_or_trials_run_only_the_new_ones(results, capsys):
    tuned(results)
    assert [line for line in capsys.readouterr().out.splitlines() if "to do" in line] == [
        "12 runs: 12 finished before, 0 to do",
        "4 runs: 4 finished before, 0 to do",
    ]
    tuned(results, seeds=3)
    assert "6 runs: 4 finished before, 2 to do" in capsys.readouterr().out
    tuned(results, trials=7)
    assert "14 runs: 12 finished before, 2 to do" in capsys.readouterr().out


def test_a_dry_run_counts_the_trials_and_runs_that_are_left(results, capsys):
    assert tuned(results, "--dry-run") == 0
    assert "12 trials (6 for each method and task), then 4 runs (seeds 0, 1), 16 of them finished" in (
        capsys.readouterr().out
    )
    assert tuned(results, "--dry-run", trials=9, seeds=4) == 0  # trials 7 to 9 may be there, of the test above
    output = capsys.readouterr().out
    found = re.search(r"18 trials .9 for each method and task., then 8 runs .seeds 0, 1, 2, 3., (\d+) of them", output)
    assert int(found[1]) in (12, 14)
    assert "time: training takes about" in output


def test_tables_say_how_a_row_was_tuned_and_count_the_search(results, tmp_path, capsys):
    tuned(tmp_path, trials=2, seeds=1)
    output = capsys.readouterr().out
    assert output.count(" tuned 2 ") == 2
    table = pd.read_csv(tmp_path / "tables" / "leaderboard.csv")
    assert set(table["batches"]) == {3 * 12}
    what = ["--methods", "head,full[weight_decay=0.1]", "--tasks", "synthetic", "--batches", "12"]
    main(["run", *what, "--executor", "serial", "--results", str(tmp_path)])
    labels = pd.read_csv(tmp_path / "tables" / "leaderboard.csv").set_index("label")
    assert labels.loc["head (default)", "batches"] == 12
    assert labels.loc["head (tuned 2)", ["batches", "search_batches", "settings"]].tolist() == [36, 24, "tuned 2"]
    assert labels.loc["full[weight_decay=0.1]", "settings"] == "as given"
    costs = pd.read_csv(tmp_path / "tables" / "costs.csv").set_index("method")
    assert costs.loc["head (tuned 2)", ["batches", "search_batches"]].tolist() == [12, 24]
    trials = pd.read_csv(tmp_path / "tables" / "trials.csv")
    assert len(trials) == 4
    assert set(trials["parameter"]) == {"learning_rate"}
    assert trials["holdout"].between(0, 1).all()


def search_of(name, folder, number):
    return tuning.MethodSearch(method_of(name), spec_of(Subject(name, folder)), number)


def test_a_trial_without_a_score_is_no_choice(tmp_path):
    search, store = search_of("head", tmp_path, 3), RecordStore(tmp_path)
    store.make_ready()
    assert search.chosen(store).method_parameters == search.trials[0].method_parameters
    assert search.chosen(store).search.trials == tuple(spec.run_id for spec in search.trials)


def test_trials_are_the_same_every_time_and_a_larger_search_begins_with_the_smaller(tmp_path):
    assert search_of("debora", tmp_path, 5).trials == search_of("debora", tmp_path, 5).trials
    assert search_of("debora", tmp_path, 8).trials[:5] == search_of("debora", tmp_path, 5).trials


def test_a_few_trials_cover_the_whole_range(tmp_path):
    search = search_of("lora", tmp_path, 5)
    low, high = (math.log(end) for end in (search.space["learning_rate"].low, search.space["learning_rate"].high))
    tried = [math.log(spec.method_parameters["learning_rate"]) for spec in search.trials[1:]]
    assert sorted(int(4 * (value - low) / (high - low)) for value in tried) == [0, 1, 2, 3]  # one in each quarter


@pytest.mark.parametrize("name", sorted(registry.registered(registry.METHODS)))
def test_every_search_space_holds_the_defaults(name):
    method = method_of(PARAMETERS.get(name, name))
    given = method.model_dump(mode="json")
    assert "learning_rate" in method.search_space
    for parameter, values in method.search_space.items():
        default = type(method).model_fields[parameter].default
        if isinstance(values, Range):
            assert values.low <= default <= values.high
        else:
            assert default in values
        for value in (values.low, values.high) if isinstance(values, Range) else values:
            registry.make_method(name, given | {parameter: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["given"], "full.learning_rate is fixed, and --tune searches over it: drop one of them"),
        (["--seeds", "1000000,"], "--seeds 1000000 is the seed of the trials"),
        (["--tune", "0"], "--tune = 0 is not allowed: it should be greater than or equal to 1"),
        (["--tune", "some"], "--tune = 'some' is not allowed"),
    ],
)
def test_bad_input(tmp_path, capsys, options, message):
    assert tuned(tmp_path / "results", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "results").exists()
