"""run_one and the store: every outcome becomes a record, nothing half-written, the evaluation read once."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from harness import checkpoint, registry, run
from harness.contracts import Subject, spec_of
from harness.errors import InputError
from harness.executors import serial
from harness.method import Adaptation
from harness.record import RecordStore, RunRecord
from harness.run import run_one
from harness.spec import Place
from methods.head import Head
from tasks.synthetic import Synthetic


@pytest.fixture
def store(tmp_path):
    store = RecordStore(tmp_path / "results")
    store.make_ready()
    return store


def spec(tmp_path, name="head", batches=12, **place):
    return spec_of(Subject(name, tmp_path, batches=batches, place=Place(**place)))


def test_what_a_finished_run_leaves(store, tmp_path):
    record = run_one(spec(tmp_path), store)
    folder = store.folder(record.run_id)
    assert sorted(path.name for path in folder.iterdir()) == ["history.jsonl", "predictions.safetensors", "record.json"]
    assert not list(store.runs.glob(".*"))
    assert record.batches == record.updates == 12
    assert record.rows == {"train": 144, "holdout": 16, "validation": 40}
    assert set(record.metrics) == set(record.holdout) == {"accuracy"}
    assert record.peak_bytes is None or record.peak_bytes > 2**20
    assert record.seconds.training > 0
    assert record.environment.packages["torch"] == torch.__version__
    arrays = load_file(folder / "predictions.safetensors")
    accuracy = (arrays["validation/predictions"] == arrays["validation/references"]).mean()
    assert accuracy == pytest.approx(record.score)
    last = store.history(record.run_id)[-1]
    assert last["holdout_accuracy"] == record.holdout["accuracy"]


def test_the_evaluation_split_is_read_once_at_the_end(store, tmp_path, monkeypatch):
    encoded, counted = [], []
    monkeypatch.setattr(Synthetic, "encode", lambda self, examples, model: encoded.append(len(examples)) or examples)
    monkeypatch.setattr(Adaptation, "finish", lambda self: counted.append(list(encoded)))
    several = spec(tmp_path).model_copy(update={"train": spec(tmp_path).train.model_copy(update={"holdout_points": 4})})
    record = run_one(several, store)
    assert counted == [[144, 16, 16, 16, 16]]  # no evaluation before the method finished
    assert encoded[5:] == [40]
    assert sum("holdout_accuracy" in row for row in store.history(record.run_id)) == 4


def start_that(error):
    def start(self, backbone, train, data, rng):
        raise error

    return start


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("no such thing\nsecond line"), "failed", "ValueError: no such thing"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory", "OutOfMemoryError: CUDA out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out_of_memory", "RuntimeError"),
        (MemoryError(), "out_of_memory", "MemoryError"),
        (RuntimeError("shapes differ"), "failed", "RuntimeError: shapes differ"),
    ],
)
def test_an_error_becomes_a_record_and_the_sweep_goes_on(store, tmp_path, monkeypatch, error, status, message):
    monkeypatch.setattr(Head, "start", start_that(error))
    specs = [spec(tmp_path), spec(tmp_path, "full")]
    first, second = serial.execute(specs, store, lambda progress: None)
    assert first.status == status
    assert first.error.startswith(message)
    assert "\n" not in first.error
    assert "Traceback" in first.traceback
    assert first.score is None
    assert second.status == "done"
    assert store.read(first.run_id) == first


def test_a_diverging_run_keeps_its_history(store, tmp_path):
    record = run_one(spec(tmp_path, "full[learning_rate=1e30]", batches=40), store)
    assert record.status == "diverged"
    assert "at update" in record.error
    rows = store.history(record.run_id)
    assert any(row["loss"] is None for row in rows)  # JSON has no NaN
    json.loads((store.folder(record.run_id) / "record.json").read_text())


def test_an_unsupported_cell_says_why_and_costs_nothing(store, tmp_path, monkeypatch):
    monkeypatch.setattr(Head, "unsupported", lambda self, backbone: "not on this one")
    record = run_one(spec(tmp_path), store)
    assert (record.status, record.error, record.batches) == ("unsupported", "not on this one", 0)


def test_an_interrupt_leaves_nothing_behind(store, tmp_path, monkeypatch):
    monkeypatch.setattr(Head, "start", start_that(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run_one(spec(tmp_path), store)
    assert not list(store.runs.iterdir())


def test_an_interrupted_run_is_taken_up_from_its_checkpoint_and_equals_the_uninterrupted_one(store, tmp_path):
    wanted = spec(tmp_path, "full[learning_rate=1e-3]", batches=20)
    whole = run_one(wanted, store)
    other = RecordStore(tmp_path / "other")
    other.make_ready()
    seen = []

    def interrupt(progress):
        seen.append(progress.batches)
        if progress.batches == 10:
            raise KeyboardInterrupt

    checkpointed = wanted.model_copy(update={"place": wanted.place.model_copy(update={"checkpoint_every": 4})})
    assert checkpointed.run_id == wanted.run_id
    with pytest.raises(KeyboardInterrupt):
        run_one(checkpointed, other, interrupt)
    folders = sorted(path.name for path in (other.checkpoints / wanted.run_id).iterdir())
    assert folders == ["000000004", "000000008"]
    seen.clear()
    resumed = run_one(checkpointed, other, lambda progress: seen.append(progress.batches))
    assert seen[0] == 10  # it went on from 8, not from 0: progress is told every ten updates
    assert resumed.result() == whole.result()
    assert other.history(wanted.run_id) == store.history(wanted.run_id)
    assert not (other.checkpoints / wanted.run_id).exists()


def test_changed_data_is_noticed(store, tmp_path):
    stale = spec(tmp_path).model_copy(update={"data_fingerprint": "another"})
    record = run_one(stale, store)
    assert record.status == "failed"
    assert "changed since the run was planned" in record.error


def test_a_saved_adapter_is_beside_the_record(store, tmp_path):
    record = run_one(spec(tmp_path, "lora[rank=2]", save_adapter=True), store)
    folder = store.folder(record.run_id) / "adapter"
    assert (folder / "adapter_model.safetensors").exists()
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2


def test_a_damaged_record_is_named_and_made_again(store, tmp_path):
    record = run_one(spec(tmp_path), store)
    path = store.folder(record.run_id) / "record.json"
    path.write_text(path.read_text()[:100])
    assert store.read(record.run_id) is None
    assert store.damaged() == [record.run_id]
    assert run_one(spec(tmp_path), store).result() == record.result()
    assert store.damaged() == []


def test_an_unwritable_results_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--results .* cannot be written"):
        RecordStore(tmp_path / "file" / "results").make_ready()


def test_a_device_that_is_not_there():
    with pytest.raises(InputError, match=r"--device 'cuda:99' is not on this machine; available: auto, cpu"):
        run.device_of(Place(device="cuda:99"))
    with pytest.raises(InputError, match="'gpu'"):
        run.device_of(Place(device="gpu"))


def test_checkpoints_are_read_back_exactly(tmp_path):
    state = {
        "tensors": [torch.arange(3), torch.zeros(4, 0), torch.tensor(2.5)],
        "optimizer": {0: {"step": torch.tensor(3.0)}, 1: {}},
        "json": {"a": None, "b": [1, "x", True, 0.1], "tuple": (1, 2)},
    }
    checkpoint.save(tmp_path / "c", 5, state)
    loaded = checkpoint.load_newest(tmp_path / "c")
    for one, two in zip(state["tensors"], loaded["tensors"], strict=True):
        assert torch.equal(one, two)
    assert loaded["optimizer"][0]["step"] == 3.0
    assert loaded["optimizer"][1] == {}
    assert loaded["json"] == {"a": None, "b": [1, "x", True, 0.1], "tuple": [1, 2]}


def test_only_the_newest_checkpoints_are_kept_and_a_damaged_one_is_told(tmp_path):
    for batches in (1, 2, 10):
        checkpoint.save(tmp_path, batches, {"at": batches})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000002", "000000010"]
    assert checkpoint.load_newest(tmp_path) == {"at": 10}
    (tmp_path / "000000010" / "state.json").write_text("{")
    with pytest.raises(InputError, match="000000010' cannot be read"):
        checkpoint.load_newest(tmp_path)
    assert checkpoint.load_newest(tmp_path / "nowhere") is None


def test_records_with_unknown_fields_or_versions_are_refused(store, tmp_path):
    record = run_one(spec(tmp_path), store)
    values = record.model_dump(mode="json")
    for change in ({"schema_version": 2}, {"status": "fine"}, {"extra": 1}, {"score": "high"}):
        with pytest.raises(ValueError, match="validation error"):
            RunRecord.model_validate(values | change)


def test_classes_are_found_by_name_only():
    assert isinstance(registry.make_method("head", {}), Head)
    assert isinstance(registry.make_task("synthetic", {}), Synthetic)
    assert np.array_equal(*[registry.make_task("synthetic", {}).load(None)[0].labels for _ in range(2)])
