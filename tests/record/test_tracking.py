"""MLflow as a view of the records, read back through its own client."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import pytest

from harness import cli, storage
from harness.commands.tracking import log
from harness.errors import InputError
from harness.record import mlflow_database
from harness.record.mlflow import CONTENT, PARENT, RUN_ID, Unreachable, curves, default_uri, log_records, thinned
from harness.record.store import RecordStore
from tests.support.report_records import record, stored


def store_with_history(folder: Path) -> RecordStore:
    store = stored(folder)
    run = record(ranks={"q": 3, "v": 5}, others={"f1": 0.25}, holdout={"accuracy": 0.6}, rank_curve={1: 0.3, 4: 0.5})
    rows = [{"update": i, "batches": i + 1, "loss": 1 / (i + 1), "s": [0.1]} for i in range(500)]
    store.write(run, rows, store.draft(run.run_id))
    failed = record(seed=1, score=None, status="failed", error="boom")
    store.write(failed, [], store.draft(failed.run_id))
    return store


def logged(client: mlflow.MlflowClient) -> tuple[list[Any], list[Any]]:
    """(parents, children)."""
    (experiment,) = [each for each in client.search_experiments() if each.name != "Default"]
    runs = list(client.search_runs([experiment.experiment_id]))
    children = [run for run in runs if RUN_ID in run.data.tags]
    return [run for run in runs if run not in children], sorted(children, key=lambda run: run.data.params["seed"])


class TestMlflow:
    def test_read_back_logged_once_and_made_again(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """One test for all of it, since a new database takes seconds."""
        store = store_with_history(tmp_path)
        key = record().spec.setting_key
        pictures = [tmp_path / f"{name}.png" for name in ("front", f"front_{key}", "front_0123abcd")]
        for picture in pictures:
            picture.write_bytes(b"a picture")
        assert log_records(store, store.records(), pictures=pictures) == 2
        client = mlflow.MlflowClient(tracking_uri=default_uri(tmp_path))
        (parent,), (done, failed) = logged(client)
        assert (tmp_path / "mlflow.db").is_file()
        assert done.data.tags[PARENT] == failed.data.tags[PARENT] == parent.info.run_id
        assert done.data.tags[RUN_ID] == record().run_id
        assert (done.info.status, failed.info.status) == ("FINISHED", "FAILED")
        expected = {"score": 0.5, "evaluation.f1": 0.25, "holdout.accuracy": 0.6, "rank.q": 3, "rank_total": 8}
        expected |= {"parameters.adapter_final": 1000, "seconds.total": 70, "batches": 100}
        assert expected.items() <= done.data.metrics.items()
        assert done.data.params["method"] == "lora"
        assert done.data.params["train.batches"] == "100"
        assert done.data.params["environment.device"] == "cpu"
        kept = [each.path for each in client.list_artifacts(parent.info.run_id, "pictures")]
        assert kept == ["pictures/front.png", f"pictures/front_{key}.png"], "not those of another setting"
        points = client.get_metric_history(done.info.run_id, "loss")
        assert len(points) == 100
        assert (min(p.step for p in points), max(p.step for p in points)) == (1, 500)
        at_rank = client.get_metric_history(done.info.run_id, "score_at_rank")
        assert [(point.step, point.value) for point in at_rank] == [(1, 0.3), (4, 0.5)]
        assert [each.path for each in client.list_artifacts(done.info.run_id)] == ["record.json"]

        assert log_records(store, store.records()) == 0, "nothing is logged twice"
        again = failed_run_made_again(store)
        assert log_records(store, store.records()) == 1
        (_,), (_, new) = logged(client)
        assert new.info.run_id != failed.info.run_id
        assert new.data.metrics["score"] == again

        client.delete_tag(new.info.run_id, CONTENT)  # as if the driver had been killed while it logged
        assert log_records(store, store.records()) == 1
        assert len(logged(client)[1]) == 2

        assert (
            cli.main(["report", "--to-mlflow", "--tracking-uri", default_uri(tmp_path), "--results", str(tmp_path)])
            == 0
        )
        output = capsys.readouterr()
        assert "0 of 2 runs new" in output.out
        assert output.err == "", "neither MLflow nor Alembic says anything"

    def test_server_that_is_down(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            uri = f"http://127.0.0.1:{free.getsockname()[1]}"
        store = store_with_history(tmp_path)
        with pytest.raises(Unreachable) as caught:
            log_records(store, store.records(), uri)
        assert "\n" not in str(caught.value)
        assert cli.main(["report", "--to-mlflow", "--tracking-uri", uri, "--results", str(tmp_path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        sweep = ["run", "--methods", "head", "--tasks", "synthetic", "--batches", "2", "--executor", "serial"]
        assert cli.main([*sweep, "--results", str(tmp_path / "new"), "--tracking-uri", uri]) == 0
        output = capsys.readouterr()
        assert "MLflow cannot be used at http" in output.err
        assert "report --to-mlflow" in output.err

    def test_every_failure_is_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        store = store_with_history(tmp_path / "results")
        garbage, folder = tmp_path / "given.db", tmp_path / "folder.db"
        garbage.write_bytes(b"no database" * 500)
        folder.mkdir()
        addresses = ["carrier-pigeon://loft", "http://[", f"sqlite:///{folder}", f"sqlite:///{garbage}"]
        for uri in [*addresses, "postgresql+a_driver://not/installed"]:
            log(store, store.records(), uri)
            output = capsys.readouterr()
            assert output.err.startswith("MLflow cannot be used at ")
            assert output.err.count("\n") == 1
            assert output.out == ""
            with pytest.raises(InputError):
                log(store, store.records(), uri, must=True)
        assert garbage.read_bytes() == b"no database" * 500, "a database that the user gave is left alone"

    def test_lock_that_cannot_be_had(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        store = stored(tmp_path, record())
        monkeypatch.setattr(mlflow_database, "PATIENCE", 0.1)
        monkeypatch.setattr(mlflow_database, "LONGEST_WAIT", 0.1)
        with mlflow_database.alone(tmp_path):
            log(store, store.records(), None)
        first, second = capsys.readouterr().err.splitlines()
        assert "waiting" in first
        assert "another process has been logging it" in second
        (tmp_path / mlflow_database.LOCK).unlink()
        (tmp_path / mlflow_database.LOCK).mkdir()
        log(store, store.records(), None)
        assert capsys.readouterr().err.count("\n") == 1
        assert not (tmp_path / "mlflow.db").exists()

    def test_foreign_records(self, tmp_path: Path) -> None:
        """What is readable of them is logged; what is not keeps no other record out."""
        for name in ("record.json", "adapter/secret", "runs/adapter/secret"):
            (tmp_path / "results" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "results" / name).write_text("of nobody's business")
        store = stored(tmp_path / "results", record(), record(seed=1), record(seed=2), record(seed=3))
        folders = [store.folder(each.run_id) for each in store.records()]
        seeds = {each.spec.seed: store.folder(each.run_id) for each in store.records()}
        (seeds[1] / "history.jsonl").write_text('{"batches": 1, "s": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
        rows = [{"batches": 1, "loss": 0.5, "big": 10**400, "odd{name}": 1.0}, {"batches": 10**30, "loss": 0.25}]
        (seeds[2] / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for folder in (seeds[1], seeds[2]):  # as if the runs had written these
            run = store.load(folder.name)
            (folder / "record.json").unlink()
            files = storage.file_sums(folder)
            (folder / "record.json").write_text(run.model_copy(update={"files": files}).to_json())
        (seeds[3] / "adapter").symlink_to(store.results / "adapter")
        (seeds[3] / "artifacts").mkdir()
        (seeds[3] / "artifacts" / "link").symlink_to(store.results / "record.json")
        outside = [record(seed=4, run_id=".."), record(seed=5, run_id="../.."), record(seed=6, run_id=".")]
        refused = record(seed=7, run_id="refused", ranks={"a" * 300: 1})
        late = record(seed=8, run_id="late", task_parameters={"text": "x" * 10_000})
        late = late.model_copy(update={"started": "yesterday"})
        with pytest.raises(Unreachable, match=r"1 of the records could not be logged.*'refused'") as caught:
            log_records(store, [*store.records(), *outside, refused, late])
        assert "\n" not in str(caught.value)
        client = mlflow.MlflowClient(tracking_uri=default_uri(store.results))
        runs = {int(run.data.params["seed"]): run for run in logged(client)[1]}
        assert set(runs) == {0, 1, 2, 3, 4, 5, 6, 8}
        assert runs[2].data.metrics["loss"] == 0.5
        assert runs[2].data.metrics["odd_name_"] == 1
        assert "big" not in runs[2].data.metrics
        assert runs[8].info.start_time == 1
        files = {seed: [each.path for each in client.list_artifacts(run.info.run_id)] for seed, run in runs.items()}
        assert files == {seed: ["record.json"] if seed < 4 else [] for seed in runs}
        kept = [path for path in (store.results / "mlflow").rglob("*") if path.is_file()]
        assert all(path.read_text() != "of nobody's business" for path in kept)
        assert len(kept) == len(folders)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with three records, all of them logged; for copying."""
    store = stored(tmp_path_factory.mktemp("sound"), *(record(seed=seed) for seed in range(3)))
    assert log_records(store, store.records()) == 3
    return store.results


class TestOwnDatabase:
    def test_two_processes_at_once(self, tmp_path: Path) -> None:
        """From the very first moment, when there is no database yet."""
        store = stored(tmp_path, *(record(seed=seed) for seed in range(4)))
        program = (
            "import sys, pathlib\n"
            "from harness.commands.tracking import log\n"
            "from harness.record.store import RecordStore\n"
            "store = RecordStore(pathlib.Path(sys.argv[1]))\n"
            "print('ready', flush=True)\n"
            "sys.stdin.readline()\n"
            "log(store, store.records(), None, must=True)\n"
        )
        both = [
            subprocess.Popen(
                [sys.executable, "-c", program, str(tmp_path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        for process in both:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        outputs = []
        for process in both:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        for process in both:
            outputs.append(process.communicate())
            assert process.returncode == 0, outputs[-1]
        assert sorted(out.rpartition(": ")[2] for out, _ in outputs) == ["0 of 4 runs new\n", "4 of 4 runs new\n"]
        assert all("waiting" in line for _, err in outputs for line in err.splitlines())
        client = mlflow.MlflowClient(tracking_uri=default_uri(tmp_path))
        assert [run.data.params["seed"] for run in logged(client)[1]] == ["0", "1", "2", "3"]
        assert log_records(store, store.records()) == 0

    @pytest.mark.parametrize("fault", ["garbage", "cut", "empty", "folder", "revision", "table", "killed"])
    def test_broken_one_is_made_again(
        self, fault: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        results = tmp_path / "results"
        shutil.copytree(sound, results)
        faults[fault](results / "mlflow.db")
        store = RecordStore(results)
        records = store.records()
        assert log_records(store, records[:1]) == 1
        line = capsys.readouterr().err
        assert fault == "killed" or "made again from the records" in line
        assert line.count("\n") == (fault != "killed")
        assert (results / "mlflow.db.broken").exists()
        assert not [path for path in results.iterdir() if path.name.endswith(("-journal", "-wal", "-shm"))]
        client = mlflow.MlflowClient(tracking_uri=default_uri(results))
        assert [run.data.params["seed"] for run in logged(client)[1]] == ["0", "1", "2"], "all that the store has"
        assert log_records(store, records) == 0
        assert capsys.readouterr().err == ""

    def test_busy_one_is_not_broken(
        self, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        results = tmp_path / "results"
        shutil.copytree(sound, results)
        monkeypatch.setattr(mlflow_database, "BUSY", 0.1)
        store = RecordStore(results)
        with closing(sqlite3.connect(results / "mlflow.db")) as other:
            other.execute("BEGIN EXCLUSIVE")
            log(store, store.records(), None)
        error = capsys.readouterr().err
        assert "locked" in error
        assert error.count("\n") == 1
        assert not (results / "mlflow.db.broken").exists()
        assert log_records(store, store.records()) == 0

    def test_folder_whose_name_means_something_in_an_address(
        self, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its database and its files lie in it, and nothing lies elsewhere; also after it was copied there."""
        results = tmp_path / "a?b%41c#d e;f&g\u00fc"
        store = stored(results, record())
        monkeypatch.chdir(tmp_path)
        with storage.replaced(results / "mlflow.db") as draft:
            draft.touch()
        (results / "mlflow.db").unlink()
        draft.write_bytes(b"left by a process that was killed")
        assert log_records(store, store.records()) == 1
        assert list(tmp_path.iterdir()) == [results]
        assert not draft.exists()
        uri = default_uri(results)
        assert uri.isascii()
        assert not {" ", "?", "#", ";", "&"} & set(uri)
        client = mlflow.MlflowClient(tracking_uri=uri)
        _, (run,) = logged(client)
        assert [each.path for each in client.list_artifacts(run.info.run_id)] == ["record.json"]
        assert len([path for path in (results / "mlflow").rglob("*") if path.is_file()]) == 1

        copied = tmp_path / "moved" / results.name
        shutil.copytree(sound, copied)
        before = sorted(sound.rglob("*"))
        store = RecordStore(copied)
        new = record(seed=3)
        store.write(new, [], store.draft(new.run_id))
        assert log_records(store, store.records()) == 1
        assert sorted(sound.rglob("*")) == before, "the folder that it was copied from is left alone"
        client = mlflow.MlflowClient(tracking_uri=default_uri(copied))
        for run in logged(client)[1]:
            assert [each.path for each in client.list_artifacts(run.info.run_id)] == ["record.json"]
            assert str(copied.as_uri()) in run.info.artifact_uri


def _sql(statement: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute(statement)

    return change


def _folder(path: Path) -> None:
    path.unlink()
    (path / "inner").mkdir(parents=True)


def _empty(path: Path) -> None:
    path.write_bytes(b"")
    path.with_name("mlflow.db-journal").write_bytes(b"of the one that was there")


def _killed(path: Path) -> None:
    """After the broken one was put aside, and before the new one was there."""
    path.rename(path.with_name("mlflow.db.broken"))
    path.with_name("mlflow.db-wal").write_bytes(b"of the one that was there")


faults: dict[str, Callable[[Path], None]] = {
    "garbage": lambda path: path.write_bytes(b"no database" * 10_000) and None,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": _empty,
    "folder": _folder,
    "revision": _sql("UPDATE alembic_version SET version_num = 'of another MLflow'"),
    "table": _sql("DROP TABLE metrics"),
    "killed": _killed,
}


def failed_run_made_again(store: RecordStore) -> float:
    new = record(seed=1, score=0.75)
    store.write(new, [], store.draft(new.run_id))
    return 0.75


class TestCurves:
    def test_thinned_keeps_the_ends_and_the_order(self) -> None:
        points = [(step, float(step)) for step in range(1234)]
        found = thinned(points)
        assert len(found) == 100
        assert found[0] == points[0]
        assert found[-1] == points[-1]
        assert found == sorted(set(found))
        assert thinned(points[:100]) == points[:100]

    def test_numbers_only(self) -> None:
        history = [{"update": 0, "batches": 1, "loss": 0.5, "s": [1.0], "gap": None}, {"batches": 2, "loss": 0.25}]
        assert curves(history) == {"loss": [(1, 0.5), (2, 0.25)]}
        assert (
            curves([{"batches": 10**30, "loss": 0.5}, {"batches": -1, "loss": 0.5}, {"batches": 1, "n": 10**400}]) == {}
        )
