"""Claims on runs, and `status`, which reads them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import running, sweeps
from harness.cli import main
from harness.contracts import Subject, spec_of
from harness.record import RecordStore
from harness.run import run_once
from harness.running import Progress


@pytest.fixture
def dead():
    """The number of a process that has ended."""
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    return int(done.stdout)


def claim_of(folder, host, process, run_id="a"):
    content = {"host": host, "process": process, "progress": {"run_id": run_id, "batches": 30, "budget": 40}}
    (folder / f"{run_id}.json").write_text(json.dumps(content))


def test_a_claim_is_one_processs_and_goes_with_it(tmp_path):
    with running.claimed(tmp_path, "a") as claim:
        assert claim is not None
        with running.claimed(tmp_path, "a") as second:
            assert second is None
        claim.tell(Progress(run_id="a", batches=3, budget=4, loss=0.5))
        assert running.progress(tmp_path, "a").share == 0.75
        assert running.everything(tmp_path).keys() == {"a"}
    assert running.progress(tmp_path, "a") is None
    assert not list(tmp_path.iterdir())


def test_the_claim_of_a_dead_process_of_this_machine_is_taken_over_at_once(tmp_path, dead):
    claim_of(tmp_path, running.HOST, dead)
    assert running.progress(tmp_path, "a") is None
    with running.claimed(tmp_path, "a") as claim:
        assert claim is not None


def test_a_claim_from_another_machine_is_left_alone_until_it_shows_no_life(tmp_path, dead):
    claim_of(tmp_path, "elsewhere", dead)
    with running.claimed(tmp_path, "a") as claim:
        assert claim is None
    old = time.time() - running.STALE_SECONDS - 1
    os.utime(tmp_path / "a.json", (old, old))
    with running.claimed(tmp_path, "a") as claim:
        assert claim is not None


def test_a_claim_that_is_being_written_is_one(tmp_path):
    (tmp_path / "a.json").write_text("")
    assert running.progress(tmp_path, "a") == Progress(run_id="a")
    with running.claimed(tmp_path, "a") as claim:
        assert claim is None


def test_of_two_takers_of_an_abandoned_claim_one_gets_it(tmp_path, dead, monkeypatch):
    path = tmp_path / "a.json"
    claim_of(tmp_path, running.HOST, dead)
    rename = Path.rename

    def late(self, target):
        monkeypatch.undo()
        assert running._take(path)  # the other, between our look and our taking
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    assert not running._take(path)
    assert running.progress(tmp_path, "a") is not None


def test_a_claim_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "BEAT_SECONDS", 0.01)
    with running.claimed(tmp_path, "a"):
        old = time.time() - running.STALE_SECONDS - 1
        os.utime(tmp_path / "a.json", (old, old))
        for _ in range(1000):
            if (tmp_path / "a.json").stat().st_mtime > old:
                break
            time.sleep(0.01)
        assert running.progress(tmp_path, "a") is not None


def test_a_run_that_another_process_is_at_or_has_finished_is_not_made(tmp_path, monkeypatch):
    store = RecordStore(tmp_path)
    store.make_ready()
    spec = spec_of(Subject("head", tmp_path, batches=2))
    with running.claimed(store.running, spec.run_id):
        assert run_once(spec, store) is None
    record = run_once(spec, store)
    monkeypatch.setattr("harness.run.run_one", None)
    assert run_once(spec, store) == record


def test_status_counts_the_cells_of_the_last_sweep(tmp_path, capsys, monkeypatch):
    results = tmp_path / "results"
    command = ["run", "--executor", "serial", "--tasks", "synthetic", "--batches", "4", "--results", str(results)]
    main([*command, "--methods", "head", "--seeds", "2"])
    store = RecordStore(results)
    specs = [spec_of(Subject(name, tmp_path)) for name in ("full", "lora[rank=2]")]
    done = [record.spec for record in store.records()]
    sweeps.write(store, [*done, *specs])
    claim_of(store.running, running.HOST, os.getpid(), specs[1].run_id)
    capsys.readouterr()
    assert main(["status", "--results", str(results)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["head"] == ["synthetic", "2", "-", "-"]
    assert rows["full"] == ["synthetic", "-", "-", "1"]
    assert rows["lora[rank=2]"] == ["synthetic", "-", "1", "-"]
    assert "running: lora[rank=2] · synthetic · seed 0: batch 30 of 40" in lines[-2]
    assert lines[-1].startswith("4 cells: 2 ended, 1 running, 1 waiting, about ")
    (store.running / f"{specs[1].run_id}.json").unlink()
    main(["status", "--results", str(results)])
    assert "2 waiting; no process is at them: give the command" in capsys.readouterr().out


def test_status_without_a_sweep(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert main(["status", "--results", str(folder)]) == 2
        assert capsys.readouterr().err.startswith("error: --results '")
