"""DreamBooth on a tiny Stable Diffusion pipeline: noise, prior preservation, samples, methods."""

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", reason="needs the extra: pip install 'rank-adaptive-harness[diffusion]'")

from harness.cli import main
from harness.contracts import TASK_CONTRACTS, Subject
from harness.record import RecordStore
from harness.spec import Place
from harness.task import make_splits
from tasks.dreambooth import encoding, pipeline, sampling
from tasks.dreambooth.pictures import read_pictures
from tasks.dreambooth.task import DreamBooth
from tests.report_records import board, record

SUBJECT, CLASS = "a photo of a sks three", "a photo of a three"
SETTINGS = {
    "instance_images": "subject",
    "instance_prompt": SUBJECT,
    "resolution": 16,
    "draws": 4,
    "samples": 2,
    "sampling_steps": 3,
}
PRIOR = {"class_images": "class", "class_prompt": CLASS}


def named(**settings) -> str:
    """The task as the command line names it."""
    return f"dreambooth[{','.join(f'{key}={value}' for key, value in settings.items())}]"


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parent.parent / "scripts" / "make_tiny_diffusion.py"
    specification = importlib.util.spec_from_file_location("make_tiny_diffusion", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def place(script, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_diffusion")
    script.write(folder, updates=4)
    return folder


@pytest.fixture(scope="module")
def model(place) -> str:
    return str(place / "pipeline")


@pytest.fixture(scope="module")
def encoded(place, model) -> encoding.Encoded:
    task = DreamBooth(**SETTINGS, **PRIOR)
    return task.encode(make_splits(task, str(place), None).train, model)


@pytest.mark.parametrize("contract", TASK_CONTRACTS, ids=lambda contract: contract.__name__)
def test_contract(contract, place, model, tmp_path):
    where = Place(data_root=str(place), model=model)
    contract(Subject(named(**SETTINGS, **PRIOR), tmp_path, method="lora[rank=2]", batches=3, place=where))


def test_splits_share_no_picture_and_use_every_one(place):
    task = DreamBooth(**SETTINGS, **PRIOR)
    train, evaluation = task.load(str(place))
    assert (len(train), len(evaluation["test"]), len(evaluation["class"])) == (16, 4, 12)
    for name, trained in (("test", train.columns["picture"]), ("class", train.columns["class_pictures"])):
        seen = {picture.tobytes() for picture in trained.reshape(-1, 16, 16, 3)}
        held = {picture.tobytes() for picture in evaluation[name].columns["picture"]}
        assert not seen & held
        assert len(seen | held) == {"test": 20, "class": 60}[name]
    assert "class_pictures" not in DreamBooth(**SETTINGS).load(str(place))[0].columns


def test_layers_are_attention_and_inner_convolutions(model):
    backbone = DreamBooth(**SETTINGS).backbone(model)
    assert backbone.head == ()
    ends = {name.rsplit(".", 1)[-1] for name in backbone.layers if "attn" in name}
    assert ends == {"to_q", "to_k", "to_v", "0"}
    convolutions = {n for n, m in backbone.module.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert convolutions - set(backbone.layers) == {"conv_in", "conv_out"}
    assert not any(".ff." in name or "time_emb" in name for name in backbone.layers)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_targets_are_those_of_diffusers(model, prediction):
    from diffusers import DDPMScheduler

    reference = DDPMScheduler.from_pretrained(Path(model) / "scheduler", prediction_type=prediction)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 6, 4, 8, 8, generator=generator)
    steps = torch.tensor([0, 1, 250, 500, 998, 999])
    schedule = pipeline.Schedule(reference.alphas_cumprod, prediction)
    noisy, target = encoding.diffused(clean, noise, steps, schedule)
    expected = noise if prediction == "epsilon" else reference.get_velocity(clean, noise, steps)
    torch.testing.assert_close(noisy, reference.add_noise(clean, noise, steps))
    torch.testing.assert_close(target, expected)


def test_evaluation_noise_belongs_to_the_picture(encoded):
    together, alone = encoded.evaluation((5, 2), 4), encoded.evaluation((2,), 4)
    assert together.inputs["timestep"].tolist() == [[125, 375, 625, 875]] * 2
    assert torch.equal(together.labels[1], alone.labels[0])
    assert torch.equal(together.inputs["sample"][1], alone.inputs["sample"][0])
    assert not torch.equal(together.labels[0], together.labels[1])


def test_predictions_are_mean_losses_over_the_draws(encoded, model):
    task = DreamBooth(**SETTINGS)
    network = task.backbone(model).module.eval()
    batch = task.collate(encoded, (0, 3), None)
    with torch.no_grad():
        found = task.predict(network, batch)
        slow = []
        for row in range(2):
            inputs = (batch.inputs[name][row] for name in batch.inputs)
            pairs = zip(*inputs, batch.labels[row], strict=True)
            errors = [((network(x[None], t[None], e[None]).sample[0] - y) ** 2).mean() for x, t, e, y in pairs]
            slow.append(torch.stack(errors).mean())
    torch.testing.assert_close(found, torch.stack(slow), rtol=1e-4, atol=1e-5)


def test_prior_preservation_adds_the_weighted_loss_of_class_pictures(encoded, place, model):
    task = DreamBooth(**SETTINGS, **PRIOR, prior_weight=0.5)
    network = task.backbone(model).module.eval()
    batch = task.collate(encoded, (0, 3, 4), torch.Generator().manual_seed(1))
    assert batch.labels.shape == (3, 2, 4, 8, 8)
    own, others = encoded.texts[encoded.prompt[0]], encoded.texts[encoded.class_prompt]
    assert torch.equal(batch.inputs["encoder_hidden_states"][0], torch.stack([own, others]))
    with torch.no_grad():
        errors = [
            (network(*(value[:, kind] for value in batch.inputs.values())).sample - batch.labels[:, kind])
            .square()
            .mean()
            for kind in range(2)
        ]
        torch.testing.assert_close(task.loss(network, batch, None), errors[0] + 0.5 * errors[1])
    plain = DreamBooth(**SETTINGS)
    alone = plain.encode(make_splits(plain, str(place), None).train, model)
    assert plain.collate(alone, (0, 3), torch.Generator().manual_seed(1)).labels.shape[1] == 1


def test_training_noise_follows_the_generator(encoded):
    one, same, other = (encoded.training((0, 1), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one.inputs["sample"], same.inputs["sample"])
    assert torch.equal(one.labels, same.labels)
    assert not torch.equal(one.labels, other.labels)
    steps = torch.cat([encoded.training((0,), torch.Generator().manual_seed(s)).inputs["timestep"] for s in range(200)])
    assert steps.min() < 50
    assert steps.max() > 950


def test_samples_are_those_of_the_stock_pipeline(model):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    network = DreamBooth(**SETTINGS).backbone(model).module
    ours = sampling.sample(network, model, [SUBJECT], count=2, side=16, steps=3, guidance=4.0)[0]
    stock = StableDiffusionPipeline.from_pretrained(model, use_safetensors=True)
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    stock.set_progress_bar_config(disable=True)
    start = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    theirs = stock(
        SUBJECT,
        num_inference_steps=3,
        guidance_scale=4.0,
        latents=start,
        num_images_per_prompt=2,
        height=16,
        width=16,
        output_type="np",
    ).images
    assert np.abs(ours - theirs * 255).max() <= 1
    assert ours.std() > 0


def test_grid_has_a_row_for_each_prompt(tmp_path):
    pictures = np.zeros((2, 3, 16, 16, 3), np.uint8)
    pictures[1, 2] = 200
    sampling.write_grid(pictures, tmp_path / "new" / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert grid.shape == (34, 52, 3)
    assert (grid[18:, 36:] == 200).all()
    assert (grid[16:18] == 255).all()


def test_methods_end_to_end(place, model, tmp_path, capsys):
    methods = "lora[rank=2],debora[rank=2,T_max=2,n0=0],debora[rank=2,T_max=2,n0=0,geometry=oblique],full,head"
    command = ["run", "--methods", methods, "--tasks", named(**SETTINGS, **PRIOR), "--model", model]
    where = ["--data-root", str(place), "--results", str(tmp_path)]
    assert main([*command, *where, "--batches", "6", "--batch-size", "4"]) in (0, 1)
    store = RecordStore(tmp_path)
    by_status = {}
    for found in store.records():
        by_status.setdefault(found.status, []).append(found)
    assert {status: len(found) for status, found in by_status.items()} == {"done": 4, "unsupported": 1}
    before, after = set(), set()
    for found in by_status["done"]:
        assert found.batches == 6
        assert not found.higher_is_better
        assert set(found.metrics) == {"denoising_loss", "class_denoising_loss"}
        for stage, digests in (("before", before), ("after", after)):
            picture = store.folder(found.run_id) / "artifacts" / stage / "samples.png"
            digests.add(hashlib.sha256(picture.read_bytes()).hexdigest())
    assert len(before) == 1, "every method starts from the same network"
    assert len(after - before) == 4
    assert "no head" in by_status["unsupported"][0].error
    assert "lower is better" in (tmp_path / "tables" / "leaderboard.md").read_text()


def test_training_lowers_the_loss_on_held_out_pictures(place, model, tmp_path, capsys):
    settings = SETTINGS | {"samples": 0}
    command = ["run", "--methods", "full[learning_rate=2e-3]", "--tasks", named(**settings), "--model", model]
    where = ["--data-root", str(place), "--results", str(tmp_path)]
    assert main([*command, *where, "--batches", "40", "--batch-size", "8"]) == 0
    (found,) = RecordStore(tmp_path).records()
    assert not (RecordStore(tmp_path).folder(found.run_id) / "artifacts").exists()
    task = DreamBooth(**settings)
    test = task.load(str(place))[1]["test"]
    with torch.no_grad():
        batch = task.collate(task.encode(test, model), range(len(test)), None)
        untrained = task.predict(task.backbone(model).module.eval(), batch).mean().item()
    assert found.score < 0.8 * untrained


def test_a_lower_loss_is_the_better_one_in_tables():
    losses = [
        record(method, "pictures", 0, score, higher_is_better=False) for method, score in (("a", 0.3), ("b", 0.2))
    ]
    made = board(*losses)
    assert [row.label for row in made.rows] == ["b", "a"]
    assert made.is_best(made.rows[0], made.columns[0])
    assert not made.is_best(made.rows[1], made.columns[0])
    mixed = board(*losses, record("a", "digits", 0, 0.5), record("b", "digits", 0, 0.5))
    assert all(row.average is None for row in mixed.rows)


def test_the_tiny_pipeline_is_the_same_every_time(script, place, model, tmp_path):
    script.write(tmp_path, updates=4)
    assert pipeline.fingerprint(str(tmp_path / "pipeline")) == pipeline.fingerprint(model)
    ours, again = (read_pictures("subject", 16, str(folder), "x") for folder in (place, tmp_path))
    np.testing.assert_array_equal(ours, again)


def test_pictures_are_the_middle_square(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    Image.fromarray(wide).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no picture")
    pictures = read_pictures(str(tmp_path), 16, None, "x")
    assert pictures.shape == (1, 16, 16, 3)
    assert pictures.min() > 200
