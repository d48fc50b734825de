"""MLflow as a view of the records, read back through its own client."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any

import mlflow
import pytest

from harness import cli
from harness.record_store import RecordStore
from harness.tracking import CONTENT, PARENT, RUN_ID, Unreachable, curves, default_uri, log_records, thinned
from tests.report_records import record, stored


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

        logging.getLogger("mlflow").setLevel(logging.INFO)  # as where another package has imported it
        assert log_records(store, store.records()) == 0, "nothing is logged twice"
        assert not logging.getLogger("mlflow.store").isEnabledFor(logging.INFO)
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
        assert "0 of 2 runs new" in capsys.readouterr().out

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

    def test_address_that_is_none(self, tmp_path: Path) -> None:
        store = store_with_history(tmp_path)
        with pytest.raises(Unreachable):
            log_records(store, store.records(), "carrier-pigeon://loft")


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
