"""Where the score is a loss, lower is better: in tables, in the search for hyperparameters, in the contracts."""

import pytest

from harness.contracts import Subject, spec_of
from harness.contracts.subject import method_of
from harness.contracts.tasks import loss_and_predictions_fit_the_metrics
from harness.plan import tuning
from harness.record.record import RunRecord
from harness.record.store import RecordStore
from harness.run.run import run_one
from tasks.synthetic import Synthetic
from tests.support.report_records import ENVIRONMENT, board, record


def test_tables():
    losses = [
        record(method, "pictures", seed, score, higher_is_better=False)
        for method, score in (("a", 0.3), ("b", 0.2))
        for seed in (0, 1)
    ]
    made = board(*losses)
    assert [row.label for row in made.rows] == ["b", "a"]
    assert made.is_best(made.rows[0], made.columns[0])
    assert not made.is_best(made.rows[1], made.columns[0])
    mixed = board(*losses, record("a", "digits", 0, 0.5), record("b", "digits", 0, 0.5))
    assert all(row.average is None for row in mixed.rows)


@pytest.mark.parametrize(("higher_is_better", "best"), [(True, 2), (False, 1)])
def test_the_search_chooses_by_the_sense_of_the_score(tmp_path, higher_is_better, best):
    search = tuning.MethodSearch(method_of("head"), spec_of(Subject("head", tmp_path)), 3)
    store = RecordStore(tmp_path)
    store.make_ready()
    for spec, value in zip(search.trials, (0.5, 0.2, 0.9), strict=True):
        made = RunRecord(
            run_id=spec.run_id,
            spec=spec,
            status="done",
            headline="value",
            higher_is_better=higher_is_better,
            holdout={"value": value},
            environment=ENVIRONMENT,
            started="2025-01-01T00:00:00+00:00",
        )
        store.write(made, [], store.draft(spec.run_id))
    assert search.chosen(store).method_parameters == search.trials[best].method_parameters


def test_a_record_says_what_its_task_says(tmp_path, monkeypatch):
    store = RecordStore(tmp_path)
    store.make_ready()
    monkeypatch.setattr(Synthetic, "higher_is_better", False)
    assert run_one(spec_of(Subject("head", tmp_path, batches=2)), store).higher_is_better is False


def test_the_contract_notices_a_task_that_says_the_wrong_thing(tmp_path, monkeypatch):
    monkeypatch.setattr(Synthetic, "higher_is_better", False)
    with pytest.raises(AssertionError):
        loss_and_predictions_fit_the_metrics(Subject("synthetic", tmp_path))
