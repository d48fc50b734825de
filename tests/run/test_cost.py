"""What a record has of a run's cost: memory, tokens, the kept file."""

from pathlib import Path

import pytest
import torch

from harness.contracts import Subject, spec_of
from harness.record.store import RecordStore
from harness.run.memory import PeakMemory
from harness.run.run import run_one
from harness.spec import Place
from tasks.synthetic import Synthetic

of_linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc"
)


@pytest.fixture
def store(tmp_path):
    store = RecordStore(tmp_path / "results")
    store.make_ready()
    return store


def spec(tmp_path, name="head", place=None, task="synthetic", holdout_points=1):
    made = spec_of(Subject(name, tmp_path, task, batches=6, place=place or Place()))
    return made.model_copy(update={"train": made.train.model_copy(update={"holdout_points": holdout_points})})


@of_linux
def test_peak_memory_is_that_of_this_run_alone():
    before = torch.ones(2**26)  # 256 MiB that an earlier run holds
    peak = PeakMemory(torch.device("cpu"))
    passing = torch.ones(2**25)
    del passing
    assert 0.9 * 2**27 < peak.bytes() < 1.5 * 2**27
    del before
    assert PeakMemory(torch.device("cpu")).bytes() < 2**24


@of_linux
def test_peak_memory_of_training_is_apart_from_what_comes_before_and_between():
    peak = PeakMemory(torch.device("cpu"))
    assert peak.of_training() is None
    torch.ones(2**26)  # 256 MiB of loading
    for bytes_of_training in (2**24, 2**25):
        peak.enter("training")
        torch.ones(bytes_of_training // 4)
        peak.enter("other")
        torch.ones(2**25)  # 128 MiB of an evaluation
    of_training = peak.of_training()
    assert 0.9 * 2**25 < of_training.taken < 2**26
    assert of_training.reserved is None
    assert 0.9 * 2**28 < peak.bytes() < 1.5 * 2**28


@of_linux
def test_a_record_has_the_peak_of_training_without_that_of_evaluations(store, tmp_path, monkeypatch):
    predict = Synthetic.predict

    def costly(self, model, batch):
        torch.ones(2**26)  # 256 MiB
        return predict(self, model, batch)

    monkeypatch.setattr(Synthetic, "predict", costly)
    record = run_one(spec(tmp_path, holdout_points=3), store)
    assert record.status == "done"
    assert record.training_peak_bytes < record.peak_bytes - 2**27


def test_a_record_counts_tokens_and_the_kept_file(store, tmp_path):
    record = run_one(spec(tmp_path, "lora[rank=2]", Place(save_adapter=True)), store)
    assert record.tokens == record.batches * record.spec.train.batch_size * 8
    weights = store.folder(record.run_id) / "adapter" / "adapter_model.safetensors"
    assert record.file_bytes == weights.stat().st_size >= record.parameters.stored_bytes
    assert run_one(spec(tmp_path, "lora[rank=3]"), store).file_bytes is None
    assert run_one(spec(tmp_path, task="digits"), store).tokens is None
