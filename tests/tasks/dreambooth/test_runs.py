"""Whole runs of DreamBooth on a tiny Stable Diffusion pipeline: methods, samples, resume, Ray, the published size."""

import hashlib
import pickle

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra: pip install 'rank-adaptive-harness[diffusion]'")

from harness.cli import main
from harness.contracts import Subject, spec_of
from harness.contracts.subject import method_of
from harness.method import Backbone
from harness.record.store import RecordStore
from harness.run.data import data_of
from harness.run.run import run_one
from harness.spec import Limits, Place, Search
from tasks.dreambooth.task import DreamBooth, layers_of
from tests.tasks.dreambooth.settings import PRIOR, SETTINGS, named

ATTENTION = 'target_modules=["to_q","to_k","to_v","to_out.0"]'
METHODS = (
    "lora[rank=2]",
    "adalora[init_rank=3,target_rank=2,learning_rate=0.1]",
    "debora[rank=2,T_max=2,n0=0]",
    "debora[rank=2,T_max=2,n0=0,geometry=oblique]",
    "full[learning_rate=1e-3]",
)


def ran(results, subject, model, methods, batches, *extra, executor="serial", **changed) -> int:
    """The command line's exit code."""
    task = named(subject, **(SETTINGS | PRIOR | changed))
    where = ["--model", model, "--results", str(results), "--executor", executor]
    return main(["run", "--methods", methods, "--tasks", task, "--batches", str(batches), *where, *extra])


def ready(folder) -> RecordStore:
    store = RecordStore(folder)
    store.make_ready()
    return store


def digest_of(store, record, stage) -> str:
    picture = store.folder(record.run_id) / "artifacts" / stage / "samples.png"
    return hashlib.sha256(picture.read_bytes()).hexdigest()


@pytest.fixture
def spec_with(subject, model, tmp_path):
    """Makes the spec of a run of a method."""

    def make(method, batches=4, **place):
        task = named(subject, **SETTINGS, **PRIOR)
        return spec_of(
            Subject(method, tmp_path, task, batches=batches, place=Place(path=str(subject), model=model, **place))
        )

    return make


def test_methods(spec_with, tmp_path):
    store = ready(tmp_path)
    records = [run_one(spec_with(method), store) for method in METHODS]
    for found in records:
        assert found.status == "done", found.traceback
        assert found.batches == 4
        assert not found.higher_is_better
        assert set(found.metrics) == {"denoising_loss", "class_denoising_loss"}
    before, after = ({digest_of(store, found, stage) for found in records} for stage in ("before", "after"))
    assert len(before) == 1, "every method starts from the same network"
    assert len(after - before) == len(METHODS)


def test_from_the_command_line_to_the_table(subject, model, tmp_path, capsys):
    methods = "full[learning_rate=2e-3],head"
    assert ran(tmp_path, subject, model, methods, 25, "--batch-size", "8", samples=0) in (0, 1)
    store = RecordStore(tmp_path)
    found, head = sorted(store.records(), key=lambda record: record.spec.method)
    assert found.spec.task == "dreambooth:subject"
    assert not (store.folder(found.run_id) / "artifacts").exists()
    assert (head.status, head.error) == ("unsupported", "the backbone has no head to train")
    assert "lower is better" in (tmp_path / "tables" / "leaderboard.md").read_text()
    task = DreamBooth(path=str(subject), **SETTINGS)
    test = task.load(None)[1]["test"]
    with torch.no_grad():
        batch = task.collate(task.encode(test, model), range(len(test)), None)
        untrained = task.predict(task.backbone(model).module.eval(), batch).mean().item()
    assert found.score < 0.85 * untrained


def test_an_interrupted_run_equals_the_uninterrupted_one(spec_with, tmp_path):
    spec = spec_with("lora[rank=2]", batches=11, checkpoint_every=5)
    whole, broken = ready(tmp_path / "whole"), ready(tmp_path / "broken")
    expected = run_one(spec, whole)
    assert expected.status == "done", expected.traceback

    def interrupt(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_one(spec, broken, interrupt)
    assert list((broken.checkpoints / spec.run_id).iterdir())
    resumed = run_one(spec, broken)
    assert resumed.result() == expected.result()
    assert broken.history(spec.run_id) == whole.history(spec.run_id)
    for stage in ("before", "after"):
        assert digest_of(broken, resumed, stage) == digest_of(whole, expected, stage)


def test_a_trial_of_a_search_draws_no_samples(spec_with, tmp_path):
    store = ready(tmp_path)
    trial = spec_with("lora[rank=2]", batches=2).model_copy(update={"search": Search(role="trial", parameters=())})
    record = run_one(trial, store)
    assert record.holdout["denoising_loss"] > 0
    assert not (store.folder(record.run_id) / "artifacts").exists()


def test_what_rays_workers_get_is_what_serial_runs_have(subject, model):
    task = DreamBooth(path=str(subject), **SETTINGS, **PRIOR)
    data = data_of(task, None, Limits(), model)
    sent = pickle.loads(pickle.dumps(data.without_texts()))  # noqa: S301 (as Ray does)
    for split in ("train", "holdout", "test", "class"):
        for generator in (None, torch.Generator().manual_seed(0)):
            state = generator and generator.get_state()
            ours = task.collate(data.encoded(split), (0,), generator)
            theirs = task.collate(sent.encoded(split), (0,), generator and generator.set_state(state))
            assert torch.equal(ours.labels, theirs.labels)
            assert all(torch.equal(ours.inputs[name], theirs.inputs[name]) for name in ours.inputs)


@pytest.mark.slow
def test_ray_gives_the_records_of_serial(subject, model, tmp_path, capsys):
    found = []
    for executor in ("serial", "ray"):
        store = RecordStore(tmp_path / executor)
        ran(store.results, subject, model, "lora[rank=2]", 3, "--seeds", "2", executor=executor)
        found.append({r.run_id: (r.result(), digest_of(store, r, "after")) for r in store.records()})
    assert len(found[0]) == 2
    assert found[0] == found[1]


def test_the_network_of_stable_diffusion_1():
    """Its published size, and that of a rank-4 LoRA on its attention as diffusers' examples have it."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        network = UNet2DConditionModel(cross_attention_dim=768)
    assert sum(p.numel() for p in network.parameters()) == 859_520_964
    backbone = Backbone(network, head=(), layers=layers_of(network))
    lora = method_of(f"lora[rank=4,{ATTENTION}]").start(backbone, None, None, torch.Generator())
    assert lora.adapter_parameters() == 797_184
    assert len(lora.ranks()) == 128
