"""What a person sees of a sweep."""

import io

import pytest
from rich.console import Console

from harness.contracts import Subject, spec_of
from harness.execute import view
from harness.notation import duration
from harness.record.locks import Progress
from harness.record.store import RecordStore
from harness.run.failure import failed_record


@pytest.fixture
def specs(tmp_path):
    return [spec_of(Subject(name, tmp_path)) for name in ("head", "lora[rank=2]", "full")]


def seen(specs, terminal, monkeypatch):
    """Everything that is printed of three runs: one ends, one is resumed, one goes on."""
    monkeypatch.setattr(view, "PLAIN_EVERY_SECONDS", 0.0)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=160)
    with view.view(specs, console) as shown:
        for spec in specs:
            shown.step(Progress(run_id=spec.run_id, batches=6, budget=24, loss=0.5, holdout=0.75, rank=9))
        shown.retried(specs[0], "the worker died", 1, 2)
        shown.ended(failed_record(specs[1], "ValueError: so it is", "Traceback"))
        summary = shown.summary()
    return console.file.getvalue(), summary


@pytest.mark.parametrize("terminal", [False, True])
def test_runs_side_by_side(specs, terminal, monkeypatch):
    output, summary = seen(specs, terminal, monkeypatch)
    assert "full · synthetic · seed 0" in output
    assert "loss 0.500, holdout 0.750, rank 9" in output
    assert f"head · synthetic · seed 0 [{specs[0].run_id}]: the worker died; resumed (1 of 2)" in output
    assert f"1/3 lora[rank=2] · synthetic · seed 0 [{specs[1].run_id}]: failed: ValueError: so it is" in output
    assert summary.startswith("1 of 3 ended, 1 running, ")
    assert summary.endswith(" to go")
    assert ("\x1b" in output) == terminal


def test_a_record_made_for_a_dead_process_is_kept_as_any_other(specs, tmp_path):
    store = RecordStore(tmp_path)
    store.make_ready()
    record = failed_record(specs[0], "the worker died", "its last words")
    written = store.write(record, [], store.draft(record.run_id))
    assert written.model_copy(update={"files": {}}) == record
    assert store.read(record.run_id) == written


def test_durations():
    texts = [duration(seconds) for seconds in (3, 119, 120, 3599, 7200, 86400 * 3)]
    assert texts == ["3 s", "119 s", "2.0 min", "60.0 min", "2.0 h", "3.0 days"]
