"""Sweeps with real Ray processes: equal to serial ones, whatever happens to workers, machines and drivers."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from harness.cli import main
from harness.errors import InputError
from harness.record.processes import Owner
from harness.record.store import RecordStore

ROOT = Path(__file__).parents[2]
METHODS = ["head", "lora[rank=2]", "debora[rank=4,T_max=2,n0=0,step_size=0.5]", "full[learning_rate=1e-3]"]
SERIAL = ["--executor", "serial"]
CONTROLS = """
methods = [
    "lora[ranks_of=debora]",
    "lora[ranks_of=debora,shuffle_ranks=true]",
    "pruned_lora[size_of=debora,selection=random]",
    "lora[parameters_of=debora]",
    "debora",
]
tasks = ["synthetic", "digits"]
seeds = 2
train.batches = 60
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One in which the faulty method is installed."""
    site = tmp_path_factory.mktemp("site")
    shutil.copy(ROOT / "tests" / "execute" / "faulty" / "faulty.py", site)
    package = site / "faulty-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[harness.methods]\nfaulty = faulty:Faulty\n")
    path = os.pathsep.join([str(site), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path}


def command(results, methods, *extra, batches=40, seeds=2):
    what = ["--methods", ",".join(methods), "--tasks", "synthetic", "--seeds", str(seeds), "--batches", str(batches)]
    where = ["--checkpoint-every", "5", "--results", str(results)]
    return [sys.executable, "-m", "harness", "run", *what, *where, *extra]


def started(environment, arguments):
    return subprocess.Popen(
        arguments, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def ended(process):
    try:
        output, errors = process.communicate(timeout=600)
    finally:
        process.kill()
    assert "Traceback" not in errors, errors
    return process.returncode, output, errors


def results_of(folder):
    """Everything that must not depend on how a run was carried out, by run_id."""
    store = RecordStore(folder)
    store.make_ready()  # clears what the dead have left
    assert not list(store.running.iterdir())
    return {
        record.run_id: (
            record.result(),
            store.history(record.run_id),
            {path.name: path.read_bytes() for path in store.folder(record.run_id).glob("*.safetensors")},
        )
        for record in store.records()
    }


def wait_for(condition, seconds=300):
    """What `condition` gives as soon as it gives something. The time bounds a broken test, nothing else."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


def test_faults_of_every_kind_cost_a_retry_and_change_no_record(tmp_path, environment):
    marks = tmp_path / "marks"
    marks.mkdir()
    methods = ["head", *(f"faulty[fault={fault},marks={marks}]" for fault in ("raise", "kill", "hang", "always"))]
    options = ["--run-timeout", "25", "--max-retries", "2"]
    code, output, _ = ended(started(environment, command(tmp_path / "ray", methods, *options, seeds=1)))
    assert code == 1
    assert sorted(path.name for path in marks.iterdir()) == ["hang", "kill", "raise"]
    assert re.search(r"faulty.*RuntimeError: the fault 'raise'; resumed \(1 of 2\)", output)
    assert re.search(r"faulty\[fault=kill.*the worker process died: killed.*resumed", output)
    assert re.search(r"faulty\[fault=hang.*it did not end within --run-timeout 25 s; resumed", output)
    assert re.search(r"faulty\[fault=always.*: failed: RuntimeError: the fault 'always'", output)
    options = [*SERIAL, "--max-retries", "0"]
    code, _, _ = ended(started(environment, command(tmp_path / "serial", methods, *options, seeds=1)))
    assert code == 1
    disturbed, undisturbed = (results_of(tmp_path / name) for name in ("ray", "serial"))
    failed = next(run_id for run_id, result in disturbed.items() if result[0]["status"] == "failed")
    record = RecordStore(tmp_path / "ray").read(failed)
    assert record.spec.method_parameters["fault"] == "always"
    assert "go_wrong" in record.traceback
    assert disturbed.keys() == undisturbed.keys()
    disturbed.pop(failed), undisturbed.pop(failed)
    assert disturbed == undisturbed


@pytest.fixture
def cluster(environment, monkeypatch):
    """Three machines of one CPU each, as far as Ray can tell."""
    for name, value in (environment | {"RAY_worker_niceness": "0"}).items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    made.shutdown()


def test_a_cluster_whose_machine_leaves_and_whose_driver_is_stopped_and_killed(tmp_path, environment, cluster):
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    store = RecordStore(tmp_path / "ray")
    sweep = command(store.results, METHODS, "--address", cluster.address, batches=30, seeds=3)

    def finished(at_least):
        return wait_for(lambda: len(found := store.records()) >= at_least and found)

    driver = started(environment, sweep)
    finished(1)
    cluster.remove_node(nodes[0], allow_graceful=False)
    first = finished(3)
    driver.send_signal(signal.SIGINT)
    code, _, errors = ended(driver)
    assert code == 130
    assert errors.strip().endswith("give the same command again to go on")
    driver = started(environment, sweep)
    second = finished(len(store.records()) + 2)
    driver.kill()
    driver.communicate()
    code, output, _ = ended(started(environment, sweep))
    assert code == 0
    assert re.search(r"12 runs: \d+ finished before, \d to do", output)
    for record in first + second:
        assert store.read(record.run_id) == record  # made once, seconds and all
    assert main([*command(tmp_path / "serial", METHODS, batches=30, seeds=3)[3:], *SERIAL]) == 0
    assert results_of(store.results) == results_of(tmp_path / "serial")


@pytest.mark.slow
def test_controls_of_one_toml_with_workers_killed_and_two_drivers(tmp_path, environment):
    """A worker at a run that others wait for, and one at a run that has waited; a serial driver does its share."""
    (tmp_path / "sweep.toml").write_text(CONTROLS)
    store = RecordStore(tmp_path / "ray")

    def sweep(results, *options):
        where = ["--config", str(tmp_path / "sweep.toml"), "--results", str(results), "--checkpoint-every", "5"]
        return [sys.executable, "-m", "harness", "run", *where, *options]

    driver = started(environment, sweep(store.results))
    os.kill(wait_for(lambda: holders(store))[0], signal.SIGKILL)
    wait_for(lambda: [record for record in store.records() if record.spec.parents])
    os.kill(wait_for(lambda: holders(store))[0], signal.SIGKILL)
    second = started(environment, sweep(store.results, *SERIAL))
    outputs = []
    for process in (driver, second):
        code, output, _ = ended(process)
        assert code == 0, output
        outputs.append(output)
    assert outputs[0].count("the worker process died") == 2
    assert main([*sweep(tmp_path / "serial")[3:], *SERIAL]) == 0
    assert len(store.records()) == 20
    assert results_of(store.results) == results_of(tmp_path / "serial")


def holders(store):
    """Processes that have a run in progress."""
    found = []
    for path in store.running.glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            found.append(Owner.model_validate(json.loads(path.read_text())["owner"]))
    return [owner.process for owner in found if owner.state == "alive"]


def test_a_results_folder_that_vanishes_ends_the_sweep_in_one_line(tmp_path, environment):
    store = RecordStore(tmp_path / "ray")
    temporary = Path(tempfile.mkdtemp(prefix="h", dir="/tmp"))  # a short path, for Ray's sockets
    driver = started(environment | {"TMPDIR": str(temporary)}, command(store.results, ["full"], batches=100_000))
    wait_for(lambda: holders(store))
    store.results.rename(tmp_path / "elsewhere")
    code, _, errors = ended(driver)
    assert code == 2
    (line,) = errors.splitlines()
    assert line.startswith(f"error: --results '{store.results}' ")  # a worker may meet it before the driver looks
    assert "has gone" in line or "cannot be written (No such file or directory)" in line
    assert not store.results.exists()
    assert not list(temporary.glob("harness-ray-*"))
    shutil.rmtree(temporary)


def test_a_suspended_driver_keeps_its_run_and_both_end_well(tmp_path, environment):
    store = RecordStore(tmp_path / "shared")
    sweep = command(store.results, METHODS[:2], *SERIAL, batches=100, seeds=2)
    first = started(environment, sweep)
    wait_for(lambda: holders(store))
    first.send_signal(signal.SIGSTOP)
    (claim,) = store.running.glob("*.json")
    os.utime(claim, (0, 0))
    second = started(environment, sweep)
    wait_for(lambda: len(store.records()) == 3)
    assert second.poll() is None, "it waits for the fourth"
    first.send_signal(signal.SIGCONT)
    for driver in (first, second):
        code, output, _ = ended(driver)
        assert code == 0, output
    assert "waiting for 1 runs in progress elsewhere: process" in output
    assert main([*command(tmp_path / "alone", METHODS[:2], batches=100)[3:], *SERIAL]) == 0
    assert results_of(store.results) == results_of(tmp_path / "alone")


@pytest.mark.slow
def test_twenty_kills_at_random_moments_with_two_drivers_one_of_them_suspended(tmp_path, environment):
    """Of workers, and of a driver, which is started again; the other driver sleeps through most of it."""
    chance = random.Random(0)
    store = RecordStore(tmp_path / "ray")
    sweep = command(store.results, METHODS, "--max-retries", "30", batches=300, seeds=3)
    sleeper = started(environment, [*sweep, *SERIAL])
    wait_for(lambda: holders(store))
    sleeper.send_signal(signal.SIGSTOP)
    driver, seen = started(environment, sweep), {}

    def workers():
        return [process for process in holders(store) if process != sleeper.pid]

    for kill in range(1, 21):
        time.sleep(chance.uniform(0.5, 4))
        os.kill(chance.choice(wait_for(workers)), signal.SIGKILL)
        seen |= {record.run_id: record for record in store.records()}
        if kill == 10:
            driver.kill()
            driver.communicate()
            driver = started(environment, sweep)
    sleeper.send_signal(signal.SIGCONT)
    for process in (driver, sleeper):
        code, output, _ = ended(process)
        assert code == 0, output
    assert len(seen) < 12, "the kills came after the sweep"
    for record in seen.values():
        assert store.read(record.run_id) == record  # made once, seconds and all
    assert main([*command(tmp_path / "serial", METHODS, batches=300, seeds=3)[3:], *SERIAL]) == 0
    assert results_of(store.results) == results_of(tmp_path / "serial")


def test_what_a_cluster_does_not_have_is_one_line(tmp_path, capsys):
    for options, message in (
        (["--address", "127.0.0.1:1"], "--address '127.0.0.1:1': nothing answers there"),
        (["--address", "somewhere"], "--address 'somewhere' is not allowed: give auto, or HOST:PORT"),
        (["--gpus-per-run", "1"], "--gpus-per-run 1 is more than there is: this machine has"),
        (["--threads", "4096"], "--threads 4096 is more than there is: this machine has"),
    ):
        assert main(command(tmp_path / "results", ["head"], *options)[3:]) == 2
        errors = capsys.readouterr().err
        assert errors.startswith(f"error: {message}")
        assert errors.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_ray_has_the_last_word_before_anything_is_written(tmp_path, monkeypatch, capsys):
    from harness.execute import session

    def refuse(*arguments):
        raise InputError("--threads 2 is more than there is")

    monkeypatch.setattr(session, "session", refuse)
    assert main(command(tmp_path / "results", ["head"])[3:]) == 2
    assert "--threads 2" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
