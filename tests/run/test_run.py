"""run_one and the store: every outcome becomes a record, nothing half-written, the evaluation read once."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file

from harness import registry, storage
from harness.contracts import Subject, spec_of, start
from harness.errors import InputError
from harness.execute import serial
from harness.execute.view import View
from harness.method import Adaptation
from harness.record.environment import device_of
from harness.record.record import RunRecord
from harness.record.store import RecordStore
from harness.report.board.runs import every_split, runs_of
from harness.run import checkpoint, prediction, run
from harness.run.run import run_one
from harness.spec import Execution, Place
from harness.storage import Damaged
from methods.head import Head
from tasks.synthetic import Synthetic

HELD = ("holdout", "validation")


@pytest.fixture
def store(tmp_path):
    store = RecordStore(tmp_path / "results")
    store.make_ready()
    return store


def spec(tmp_path, name="head", batches=12, warmup=0.06, **place):
    made = spec_of(Subject(name, tmp_path, batches=batches, place=Place(**place)))
    return made.model_copy(update={"train": made.train.model_copy(update={"warmup": warmup})})


def test_what_a_finished_run_leaves(store, tmp_path):
    record = run_one(spec(tmp_path), store)
    folder = store.folder(record.run_id)
    assert sorted(path.name for path in folder.iterdir()) == ["history.jsonl", "predictions.safetensors", "record.json"]
    assert not list(store.runs.glob(".*"))
    assert record.batches == record.updates == 12
    assert record.rows == {"train": 144, "holdout": 16, "validation": 40}
    assert set(record.metrics) == set(record.holdout) == {"accuracy"}
    assert record.peak_bytes is None or record.peak_bytes >= 0
    assert record.seconds.training > 0
    assert record.environment.packages["torch"] == torch.__version__
    arrays = load_file(folder / "predictions.safetensors")
    accuracy = (arrays["validation/predictions"] == arrays["validation/references"]).mean()
    assert accuracy == pytest.approx(record.score)
    last = store.history(record.run_id)[-1]
    assert last["holdout_accuracy"] == record.holdout["accuracy"]


def test_a_record_holds_the_shapes_of_the_layers_with_ranks(store, tmp_path):
    made = spec(tmp_path, "lora")
    record = run_one(made, store)
    backbone = registry.task_of(made).backbone(None)
    assert record.shapes == {layer: backbone.shape(layer) for layer in record.ranks}
    assert store.load(record.run_id).shapes == record.shapes != {}
    assert run_one(spec(tmp_path, "head"), store).shapes == {}


def test_the_holdouts_last_predictions_are_kept_and_are_no_evaluation(store, tmp_path):
    several = spec(tmp_path).model_copy(update={"train": spec(tmp_path).train.model_copy(update={"holdout_points": 3})})
    record = run_one(several, store)
    arrays = load_file(store.folder(record.run_id) / "predictions.safetensors")
    assert set(arrays) == {f"{split}/{what}" for split in HELD for what in ("predictions", "references")}
    assert len(arrays["holdout/predictions"]) == record.rows["holdout"]
    assert (arrays["holdout/predictions"] == arrays["holdout/references"]).mean() == record.holdout["accuracy"]
    assert store.test_splits(record.run_id) == []
    assert [made.split for made in every_split(runs_of([record]))] == ["validation"]


def test_a_run_that_never_scores_the_holdout_keeps_nothing_of_it(store, tmp_path):
    never = spec(tmp_path).model_copy(update={"train": spec(tmp_path).train.model_copy(update={"holdout_points": 0})})
    record = run_one(never, store)
    arrays = load_file(store.folder(record.run_id) / "predictions.safetensors")
    assert set(arrays) == {"validation/predictions", "validation/references"}


def test_the_evaluation_split_is_read_once_at_the_end(store, tmp_path, monkeypatch):
    predicted, counted = [], []

    def predict(adaptation, task, encoded, references, *rest):
        predicted.append(len(references))
        return prediction.predict(adaptation, task, encoded, references, *rest)

    monkeypatch.setattr(run, "predict", predict)
    monkeypatch.setattr(Adaptation, "finish", lambda self, step: counted.append(list(predicted)))
    several = spec(tmp_path).model_copy(update={"train": spec(tmp_path).train.model_copy(update={"holdout_points": 4})})
    record = run_one(several, store)
    assert counted == [[16, 16, 16]]  # before the method finished: no evaluation, and three of the holdout's
    assert predicted[3:] == [16, 40]
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
    with serial.session(Execution(executor="serial")) as execute:
        execute(specs, store, View(specs, Console(quiet=True)))
    first, second = (store.read(each.run_id) for each in specs)
    assert first.status == status
    assert first.error.startswith(message)
    assert "\n" not in first.error
    assert "Traceback" in first.traceback
    assert first.score is None
    assert second.status == "done"


def test_a_diverging_run_keeps_its_history(store, tmp_path):
    record = run_one(spec(tmp_path, "full[learning_rate=1e30]", batches=40), store)
    assert record.status == "diverged"
    assert "at update" in record.error
    rows = store.history(record.run_id)
    assert any(row["loss"] is None for row in rows)  # JSON has no NaN
    json.loads((store.folder(record.run_id) / "record.json").read_text())


def test_a_divergence_in_the_last_update_is_no_score(store, tmp_path):
    record = run_one(spec(tmp_path, "full[learning_rate=1e30]", batches=1, warmup=0.0), store)
    assert (record.status, record.score) == ("diverged", None)
    assert "a prediction is not finite" in record.error


def test_parameters_that_are_not_finite_after_the_last_update_are_told(store, tmp_path, monkeypatch):
    def poison(self, step):
        with torch.no_grad():
            next(p for p in self.model.parameters() if p.requires_grad).fill_(float("inf"))
        return {}

    monkeypatch.setattr(Adaptation, "after_step", poison)
    record = run_one(spec(tmp_path, batches=1), store)
    assert (record.status, record.score) == ("diverged", None)
    assert record.error == "a trained parameter is not finite after the last update, 0"


def test_a_metric_that_is_not_a_number_is_a_divergence(store, tmp_path, monkeypatch):
    monkeypatch.setattr(Synthetic, "metrics", lambda self, predictions, references: {"accuracy": np.float32("nan")})
    record = run_one(spec(tmp_path), store)
    assert (record.status, record.error) == ("diverged", "accuracy is nan on the holdout")


def test_a_plugin_may_give_numbers_of_numpy(store, tmp_path, monkeypatch):
    monkeypatch.setattr(Adaptation, "after_step", lambda self, step: {"mine": np.float32(0.5), "count": np.int64(3)})
    monkeypatch.setattr(Synthetic, "metrics", lambda self, predictions, references: {"accuracy": np.float32(0.5)})
    record = run_one(spec(tmp_path), store)
    assert (record.status, record.score) == ("done", 0.5)
    assert store.history(record.run_id)[0]["mine"] == 0.5


def test_the_last_holdout_score_is_that_of_the_finished_model(store, tmp_path, monkeypatch):
    scored = []
    monkeypatch.setattr(Adaptation, "finish", lambda self, step: scored.append("finish"))
    monkeypatch.setattr(Synthetic, "metrics", lambda self, *arrays: scored.append(len(arrays[0])) or {"accuracy": 1.0})
    run_one(spec(tmp_path), store)
    assert scored == ["finish", 16, 40]


def test_a_full_disk_is_one_line_and_leaves_no_half_of_a_record(store, tmp_path, monkeypatch):
    def full(self, text, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match=r"cannot be written .No space left on device"):
        run_one(spec(tmp_path), store)
    assert not list(store.runs.iterdir())


def test_two_writers_of_one_run(store, tmp_path):
    record = run_one(spec(tmp_path), store)
    before = (store.folder(record.run_id) / "record.json").stat().st_ino
    store.write(record, [], store.draft(record.run_id))
    assert (store.folder(record.run_id) / "record.json").stat().st_ino == before  # the first stays
    other = record.spec.model_copy(update={"seed": 7})
    done = record.model_copy(update={"spec": other, "run_id": other.run_id})
    for each in (done.model_copy(update={"status": "failed"}),) * 2:
        store.write(each, [], store.draft(each.run_id))
    store.write(done, [], store.draft(done.run_id))
    assert store.read(other.run_id).status == "done"
    assert not list(store.runs.glob(".*"))


def test_folders_can_be_read_by_whoever_the_umask_allows(store, tmp_path):
    record = run_one(spec(tmp_path), store)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    assert store.folder(record.run_id).stat().st_mode == (tmp_path / "plain").stat().st_mode
    for path in store.folder(record.run_id).iterdir():
        assert path.stat().st_mode == (tmp_path / "plain" / "file").stat().st_mode, path.name


def test_what_a_killed_process_left_is_cleared(store, tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    mine = store.draft("a")
    theirs = mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{dead.stdout.strip()}-"))
    theirs.mkdir()
    finished = run_one(spec(tmp_path), store)
    begun = spec(tmp_path, batches=40)
    for run_id in (finished.run_id, begun.run_id):
        checkpoint.save(store.checkpoints / run_id, 4, {"at": 4})
    (store.checkpoints / begun.run_id / theirs.name.replace("a-", ".checkpoint-", 1)).mkdir()
    (store.sweeps / ".0123").write_text("a draft of an earlier version")
    store.make_ready()
    assert mine.exists()
    assert not theirs.exists()
    assert [path.name for path in store.checkpoints.iterdir()] == [begun.run_id]
    assert [path.name for path in (store.checkpoints / begun.run_id).iterdir()] == ["000000004"]
    assert not list(store.sweeps.iterdir())


def test_a_checkpoint_from_another_kind_of_device_is_refused(tmp_path):
    training = start(Subject("head", tmp_path)).training
    training.update()
    with pytest.raises(InputError, match="made on cuda, this is cpu"):
        training.load_state_dict(training.state_dict() | {"device": "cuda"})


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


def resealed(store, record, name, content):
    """The run with another content of one file, as if it had been written so."""
    folder = store.folder(record.run_id)
    (folder / name).write_bytes(content)
    files = storage.file_sums(folder)
    del files["record.json"]
    (folder / "record.json").write_text(record.model_copy(update={"files": files}).to_json())


@pytest.mark.parametrize("row", ['{"loss": 1.0}', "[1]", "{", "[" * 100_000])
def test_a_history_that_holds_no_rows_is_told(store, tmp_path, row):
    record = run_one(spec(tmp_path), store)
    resealed(store, record, "history.jsonl", (row + "\n").encode())
    with pytest.raises(Damaged, match="without its number of batches"):
        store.history(record.run_id)


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
        device_of(Place(device="cuda:99"))
    for name in ("gpu", "meta"):
        with pytest.raises(InputError, match=f"'{name}'"):
            device_of(Place(device=name))


def test_checkpoints_are_read_back_exactly(tmp_path):
    state = {
        "tensors": [torch.arange(3), torch.zeros(4, 0), torch.tensor(2.5)],
        "optimizer": {0: {"step": torch.tensor(3.0)}, 1: {}},
        "json": {"a": None, "b": [1, "x", True, 0.1], "tuple": (1, 2)},
    }
    checkpoint.save(tmp_path / "c", 5, state)
    loaded = checkpoint.load_newest(tmp_path / "c").state
    for one, two in zip(state["tensors"], loaded["tensors"], strict=True):
        assert torch.equal(one, two)
    assert loaded["optimizer"][0]["step"] == 3.0
    assert loaded["optimizer"][1] == {}
    assert loaded["json"] == {"a": None, "b": [1, "x", True, 0.1], "tuple": [1, 2]}


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for batches in (1, 2, 10):
        checkpoint.save(tmp_path, batches, {"at": batches})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000002", "000000010"]
    assert checkpoint.load_newest(tmp_path).state == {"at": 10}
    assert checkpoint.load_newest(tmp_path / "nowhere").state is None


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "origin.json", "sums.json"])
@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
def test_a_garbled_checkpoint_gives_way_to_the_one_before(tmp_path, name, how):
    for batches in (1, 2):
        checkpoint.save(tmp_path, batches, {"at": batches, "tensor": torch.arange(9.0)}, {"spec": "mine"})
    path = tmp_path / "000000002" / name
    content = bytearray(path.read_bytes())
    path.unlink()
    content[-2] ^= 1
    if how != "missing":
        path.write_bytes(content if how == "flipped" else content[:-3])
    assert checkpoint.load_newest(tmp_path, {"spec": "mine"}).state["at"] == 1


@pytest.mark.parametrize(("damaged", "began"), [(1, "from the one before"), (2, "anew")])
def test_a_damaged_checkpoint_is_told_of_and_changes_no_result(store, tmp_path, damaged, began):
    mine = spec(tmp_path, batches=20, checkpoint_every=4)
    interrupt_at(10, mine, store)
    folders = sorted((store.checkpoints / mine.run_id).iterdir())
    for folder in folders[2 - damaged :]:
        (folder / "tensors.safetensors").write_bytes(b"not tensors")
    record = run_one(mine, store)
    names = ", ".join(folder.name for folder in reversed(folders[2 - damaged :]))
    assert record.notes == (f"damaged checkpoint {names} passed over: the run began {began}",)
    whole = RecordStore(tmp_path / "whole")
    whole.make_ready()
    assert record.result() == run_one(spec(tmp_path, batches=20), whole).result()
    console = Console(file=io.StringIO())
    View([mine], console).ended(record)
    assert record.notes[0] in console.file.getvalue()


def test_a_checkpoint_of_another_run_or_version_is_refused_with_the_difference(store, tmp_path):
    mine = spec(tmp_path, batches=20, checkpoint_every=4)
    interrupt_at(10, mine, store)
    folder = store.checkpoints / mine.run_id
    other = mine.model_copy(update={"seed": 5})
    folder.rename(store.checkpoints / other.run_id)
    record = run_one(other, store)
    assert record.status == "failed"
    assert "was made with spec.seed = 0, this run has 5: delete" in record.error
    assert len(list((store.checkpoints / other.run_id).iterdir())) == 2  # still there: nothing began anew
    (store.checkpoints / other.run_id).rename(folder)
    for path in folder.iterdir():
        origin = json.loads((path / "origin.json").read_text())
        origin["version"]["torch"] = "1.0"
        (path / "origin.json").write_text(json.dumps(origin))
        sums = {"schema_version": 2, "files": storage.file_sums(path)}
        del sums["files"]["sums.json"]
        (path / "sums.json").write_text(storage.sealed_text(sums))
    assert f"was made with version.torch = 1.0, this run has {torch.__version__}" in run_one(mine, store).error


def interrupt_at(batches, wanted, store):
    def interrupt(progress):
        if progress.batches == batches:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_one(wanted, store, interrupt)


def test_records_with_unknown_fields_or_versions_are_refused(store, tmp_path):
    record = run_one(spec(tmp_path), store)
    values = record.model_dump(mode="json")
    for change in (
        {"schema_version": 3},
        {"started": "yesterday"},
        {"status": "fine"},
        {"extra": 1},
        {"score": "high"},
    ):
        with pytest.raises(ValueError, match="validation error"):
            RunRecord.model_validate(values | change)


def test_classes_are_found_by_name_only():
    assert isinstance(registry.make_method("head", {}), Head)
    assert isinstance(registry.make_task("synthetic", {}), Synthetic)
    assert np.array_equal(*[registry.make_task("synthetic", {}).load(None)[0].labels for _ in range(2)])
