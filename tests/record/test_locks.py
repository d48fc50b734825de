"""Run locks, and `status`, which reads them."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import storage
from harness.cli import main
from harness.contracts import Subject, spec_of
from harness.execute.once import run_once
from harness.record import cells, locks, processes
from harness.record.locks import Progress
from harness.record.processes import own_name
from harness.record.store import RecordStore


@pytest.fixture
def dead():
    """A process of this machine that has ended."""
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    return processes.own().model_copy(update={"process": int(done.stdout)})


def lock_of(folder, owner, run_id="a", sweep=""):
    told = Progress(run_id=run_id, batches=30, budget=40)
    content = {"owner": owner.model_dump(), "token": "theirs", "sweep": sweep, "progress": told.model_dump()}
    (folder / f"{run_id}.json").write_text(storage.sealed_text({storage.VERSION: locks.SCHEMA} | content))


def other(**changes):
    """A process that is not this one."""
    return processes.own().model_copy(update=changes)


def make_old(path, seconds=locks.STALE_SECONDS + 1):
    old = time.time() - seconds
    os.utime(path, (old, old))


def test_a_lock_is_one_processs_and_goes_with_it(tmp_path):
    with locks.locked(tmp_path, "a") as lock:
        assert lock is not None
        with locks.locked(tmp_path, "a") as second:
            assert second is None
        lock.tell(Progress(run_id="a", batches=3, budget=4, loss=0.5))
        assert locks.progress(tmp_path, "a").share == 0.75
        assert locks.everything(tmp_path).keys() == {"a"}
    assert locks.progress(tmp_path, "a") is None
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_dead_process_of_this_machine_is_taken_over_at_once(tmp_path, dead):
    lock_of(tmp_path, dead)
    assert locks.progress(tmp_path, "a") is None
    with locks.locked(tmp_path, "a") as lock:
        assert lock is not None


def test_a_process_is_known_by_its_start_and_not_by_its_number_alone(tmp_path):
    lock_of(tmp_path, other(started=processes.own().started - 1))  # the number has been given again
    with locks.locked(tmp_path, "a") as lock:
        assert lock is not None


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the state of a process is read from Linux's /proc")
def test_a_zombie_is_dead():
    command = "from harness.record import processes; print(processes.own().started)"
    child = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, text=True)
    owner = other(process=child.pid, started=int(child.stdout.readline()))
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked how
    assert owner.state == "dead"
    child.communicate()


def test_a_live_process_of_this_machine_keeps_its_lock_whatever_its_age(tmp_path):
    lock_of(tmp_path, processes.own())
    make_old(tmp_path / "a.json", 1e6)
    with locks.locked(tmp_path, "a") as lock:
        assert lock is None
    assert locks.progress(tmp_path, "a").batches == 30


@pytest.mark.parametrize("changes", [{"boot": "another", "host": "elsewhere"}, {"boot": "another"}, {"namespace": "1"}])
def test_a_lock_that_cannot_be_looked_up_is_left_alone_until_it_shows_no_life(tmp_path, dead, changes):
    lock_of(tmp_path, dead.model_copy(update=changes))
    with locks.locked(tmp_path, "a") as lock:
        assert lock is None
    make_old(tmp_path / "a.json")
    with locks.locked(tmp_path, "a") as lock:
        assert lock is not None


def test_a_lock_that_another_process_took_over_is_left_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.01)
    with locks.locked(tmp_path, "a") as lock:
        lock_of(tmp_path, other(boot="another"))
        make_old(tmp_path / "a.json")
        before = (tmp_path / "a.json").stat()
        lock.tell(Progress(run_id="a", batches=1, budget=2))
        time.sleep(0.1)  # a beat would have come by now
        after = (tmp_path / "a.json").stat()
        assert (after.st_mtime, after.st_ino) == (before.st_mtime, before.st_ino)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_driver_releases_the_locks_of_its_own_workers_alone(tmp_path):
    for sweep, left in (("mine", False), ("theirs", True)):
        lock_of(tmp_path, other(boot="another"), sweep=sweep)
        locks.release(tmp_path, "a", "mine")
        assert (tmp_path / "a.json").exists() is left


@pytest.mark.parametrize("changes", [{"boot": "another"}, {"namespace": "1"}])
def test_drafts_of_processes_that_cannot_be_looked_up_stay_for_long(tmp_path, changes):
    theirs = tmp_path / own_name("a", "draft").replace(processes.own().name, other(**changes).name)
    theirs.mkdir()
    make_old(theirs)
    locks.clear_abandoned(tmp_path)
    assert theirs.exists()
    make_old(theirs, locks.REMAINS_SECONDS + 1)
    lock_of(tmp_path, other(**changes))
    locks.clear_abandoned(tmp_path)
    assert theirs.exists(), "its run is locked"
    make_old(tmp_path / "a.json")
    locks.clear_abandoned(tmp_path)
    assert not theirs.exists()


def test_what_is_none_of_ours_is_left_where_it_is(tmp_path):
    names = [".DS_Store", "README", "notes-for-me", "x-y-z-1-2-3-4-draft.txt", "a" * 200]
    for name in names:
        (tmp_path / name).write_text("")
        make_old(tmp_path / name, 1e7)
    locks.clear_abandoned(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def huge_number(path):
    path.write_text(json.dumps({"host": processes.HOST, "process": 10**30, "progress": {"run_id": path.stem}}))


def nested(path):
    path.write_text("[" * 100_000)


def a_folder(path):
    (path / "within").mkdir(parents=True)


def another_runs(path):
    lock_of(path.parent, processes.own(), "0" * 16)
    (path.parent / f"{'0' * 16}.json").rename(path)


@pytest.mark.parametrize("garble", [huge_number, nested, a_folder, another_runs])
def test_a_garbled_lock_holds_until_it_is_old(tmp_path, garble, capsys):
    results = tmp_path / "results"
    command = ["run", "--executor", "serial", "--tasks", "synthetic", "--batches", "2", "--methods", "head"]
    assert main([*command, "--results", str(results)]) == 0
    store = RecordStore(results)
    (run_id,) = store.run_ids()
    path = store.running / f"{run_id}.json"
    garble(path)
    assert locks.progress(store.running, run_id) == Progress(run_id=run_id)
    capsys.readouterr()
    assert main(["status", "--results", str(results)]) == 0
    assert "1 running" in capsys.readouterr().out
    if garble is another_runs:  # a live process's
        path.write_text("{")
    make_old(path)
    storage.remove(store.folder(run_id))
    assert main([*command, "--results", str(results)]) == 0
    assert store.run_ids() == [run_id]
    assert not list(store.running.iterdir())


def test_a_lock_that_is_being_written_is_one(tmp_path):
    (tmp_path / "a.json").write_text("")
    assert locks.progress(tmp_path, "a") == Progress(run_id="a")
    with locks.locked(tmp_path, "a") as lock:
        assert lock is None


def test_of_two_takers_of_an_abandoned_lock_one_gets_it(tmp_path, dead, monkeypatch):
    lock_of(tmp_path, dead)
    rename = Path.rename

    with contextlib.ExitStack() as stack:

        def late(self, target):
            monkeypatch.undo()
            assert stack.enter_context(locks.locked(tmp_path, "a"))  # the other, between our look and our taking
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", late)
        with locks.locked(tmp_path, "a") as lock:
            assert lock is None
        assert locks.progress(tmp_path, "a") is not None
        assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_lock_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.01)
    with locks.locked(tmp_path, "a"):
        make_old(tmp_path / "a.json")
        old = (tmp_path / "a.json").stat().st_mtime
        for _ in range(1000):
            if (tmp_path / "a.json").stat().st_mtime > old:
                break
            time.sleep(0.01)
        assert (tmp_path / "a.json").stat().st_mtime > old


def test_a_run_that_another_process_is_at_or_has_finished_is_not_made(tmp_path, monkeypatch):
    store = RecordStore(tmp_path)
    store.make_ready()
    spec = spec_of(Subject("head", tmp_path, batches=2))
    with locks.locked(store.running, spec.run_id):
        assert run_once(spec, store) is None
    record = run_once(spec, store)
    monkeypatch.setattr("harness.execute.once.run_one", None)
    assert run_once(spec, store) == record


@pytest.mark.parametrize("made_meanwhile", [True, False])
def test_a_run_whose_draft_has_gone_is_looked_for_and_made(tmp_path, made_meanwhile):
    store, elsewhere = RecordStore(tmp_path / "results"), RecordStore(tmp_path / "elsewhere")
    store.make_ready(), elsewhere.make_ready()
    spec = spec_of(Subject("head", tmp_path, batches=20))
    theirs = run_once(spec, elsewhere)
    taken = []

    def take_away(progress):
        if not taken:
            (draft,) = store.running.glob("*-draft")
            storage.remove(draft)
            if made_meanwhile:
                elsewhere.folder(spec.run_id).rename(store.folder(spec.run_id))
        taken.append(progress.batches)

    found = run_once(spec, store, take_away)
    assert found.result() == theirs.result()
    assert store.read(spec.run_id) == found
    assert (found == theirs) is made_meanwhile
    assert not list(store.running.iterdir())


def test_status_counts_the_cells_of_the_last_sweep(tmp_path, capsys, monkeypatch):
    results = tmp_path / "results"
    command = ["run", "--executor", "serial", "--tasks", "synthetic", "--batches", "4", "--results", str(results)]
    main([*command, "--methods", "head", "--seeds", "2"])
    store = RecordStore(results)
    specs = [spec_of(Subject(name, tmp_path)) for name in ("full", "lora[rank=2]")]
    done = [record.spec for record in store.records()]
    cells.write(store, [*done, *specs])
    lock_of(store.running, processes.own(), specs[1].run_id)
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
    assert "2 waiting; none is in progress: give the command" in capsys.readouterr().out


def test_status_without_a_sweep(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert main(["status", "--results", str(folder)]) == 2
        assert capsys.readouterr().err.startswith("error: --results '")
