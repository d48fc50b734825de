"""Whole runs of DreamBooth on a tiny Stable Diffusion pipeline: methods, samples, resume, Ray, the published size."""

import hashlib
import pickle

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra: pip install 'rank-adaptive-harness[diffusion]'")

from harness.cli import main
from harness.contracts import Subject, spec_of
from harness.contracts.subject import method_of
from harness.data import data_of
from harness.method import Backbone
from harness.record import RecordStore
from harness.run import run_one
from harness.spec import Place, Search, TrainSpec
from tasks.dreambooth.task import DreamBooth, layers_of
from tests.dreambooth.settings import PRIOR, SETTINGS, named

ATTENTION = 'target_modules=["to_q","to_k","to_v","to_out.0"]'
METHODS = (
    "lora[rank=2]",
    f"lora[rank=2,{ATTENTION}]",
    "adalora[init_rank=3,target_rank=2,learning_rate=0.1]",
    "debora[rank=2,T_max=2,n0=0]",
    "debora[rank=2,T_max=2,n0=0,geometry=oblique]",
    "full[learning_rate=1e-3]",
)


def ran(results, subject, model, methods, *extra, batches=6, executor="serial", **changed) -> int:
    task = named(subject, **(SETTINGS | PRIOR | changed))
    where = ["--model", model, "--results", str(results), "--executor", executor]
    return main(["run", "--methods", methods, "--tasks", task, "--batches", str(batches), *where, *extra])


def digest_of(store, record, stage) -> str:
    picture = store.folder(record.run_id) / "artifacts" / stage / "samples.png"
    return hashlib.sha256(picture.read_bytes()).hexdigest()


def test_methods(subject, model, tmp_path, capsys):
    assert ran(tmp_path, subject, model, ",".join([*METHODS, "head"]), "--batch-size", "4") in (0, 1)
    store = RecordStore(tmp_path)
    by_status = {}
    for found in store.records():
        by_status.setdefault(found.status, []).append(found)
    assert {status: len(found) for status, found in by_status.items()} == {"done": len(METHODS), "unsupported": 1}
    for found in by_status["done"]:
        assert found.spec.task == "dreambooth:subject"
        assert found.batches == 6
        assert not found.higher_is_better
        assert set(found.metrics) == {"denoising_loss", "class_denoising_loss"}
    before, after = ({digest_of(store, found, stage) for found in by_status["done"]} for stage in ("before", "after"))
    assert len(before) == 1, "every method starts from the same network"
    assert len(after - before) == len(METHODS)
    assert "no head" in by_status["unsupported"][0].error
    assert "lower is better" in (tmp_path / "tables" / "leaderboard.md").read_text()


def test_training_lowers_the_loss_on_held_out_pictures(subject, model, tmp_path, capsys):
    changed = {"samples": 0}
    assert ran(tmp_path, subject, model, "full[learning_rate=2e-3]", "--batch-size", "8", batches=40, **changed) == 0
    (found,) = RecordStore(tmp_path).records()
    assert not (RecordStore(tmp_path).folder(found.run_id) / "artifacts").exists()
    task = DreamBooth(path=str(subject), **SETTINGS)
    test = task.load(None)[1]["test"]
    with torch.no_grad():
        batch = task.collate(task.encode(test, model), range(len(test)), None)
        untrained = task.predict(task.backbone(model).module.eval(), batch).mean().item()
    assert found.score < 0.8 * untrained


@pytest.fixture
def spec(subject, model, tmp_path):
    """A run of dEBORA with a checkpoint every three batches."""
    place = Place(path=str(subject), model=model, checkpoint_every=3)
    task = named(subject, **SETTINGS, **PRIOR)
    return spec_of(Subject("debora[rank=2,T_max=2,n0=0]", tmp_path, task, batches=12, place=place))


def test_an_interrupted_run_equals_the_uninterrupted_one(spec, tmp_path):
    whole, broken = RecordStore(tmp_path / "whole"), RecordStore(tmp_path / "broken")
    for store in (whole, broken):
        store.make_ready()
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


def test_a_trial_of_a_search_draws_no_samples(spec, tmp_path):
    store = RecordStore(tmp_path)
    store.make_ready()
    trial = spec.model_copy(
        update={"search": Search(role="trial", parameters=()), "train": TrainSpec(batches=2, batch_size=4)}
    )
    record = run_one(trial, store)
    assert record.holdout["denoising_loss"] > 0
    assert not (store.folder(record.run_id) / "artifacts").exists()


def test_what_rays_workers_get_is_what_serial_runs_have(subject, model):
    task = DreamBooth(path=str(subject), **SETTINGS, **PRIOR)
    data = data_of(task, None, None, model)
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
        ran(store.results, subject, model, "lora[rank=2]", "--seeds", "2", batches=3, executor=executor)
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
    assert lora.parameter_count().adapter_initial == 797_184
    assert len(lora.ranks()) == 128
