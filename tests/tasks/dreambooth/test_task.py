"""The DreamBooth task on a tiny Stable Diffusion pipeline: splits, layers, noise, prior preservation, samples."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", reason="needs the extra: pip install 'rank-adaptive-harness[diffusion]'")

from harness.contracts import TASK_CONTRACTS, Subject
from harness.spec import Place
from harness.splits import make_splits
from tasks.dreambooth import encoding, pipeline, sampling
from tasks.dreambooth.pictures import read_pictures
from tasks.dreambooth.task import DreamBooth
from tests.tasks.dreambooth.settings import PRIOR, SETTINGS, SUBJECT, named


def made(path: Path, **settings) -> DreamBooth:
    return DreamBooth(path=str(path), **SETTINGS, **settings)


@pytest.fixture(scope="module")
def encoded(subject, model) -> encoding.Encoded:
    task = made(subject, **PRIOR)
    return task.encode(make_splits(task, None).train, model)


@pytest.mark.parametrize("contract", TASK_CONTRACTS, ids=lambda contract: contract.__name__)
def test_contract(contract, subject, model, tmp_path):
    where = Place(path=str(subject), model=model)
    name = named(subject, **SETTINGS, **PRIOR)
    contract(Subject(name, tmp_path, method="lora[rank=2]", batches=3, place=where))


def test_splits_share_no_picture_and_use_every_one(subject):
    train, evaluation = made(subject, **PRIOR).load(None)
    assert (len(train), len(evaluation["test"]), len(evaluation["class"])) == (16, 4, 12)
    for name, trained in (("test", train.columns["picture"]), ("class", train.columns["class_pictures"])):
        seen = {picture.tobytes() for picture in trained.reshape(-1, 16, 16, 3)}
        held = {picture.tobytes() for picture in evaluation[name].columns["picture"]}
        assert not seen & held
        assert len(seen | held) == {"test": 20, "class": 60}[name]
    assert "class_pictures" not in made(subject).load(None)[0].columns


def test_layers_are_attention_and_inner_convolutions(subject, model):
    backbone = made(subject).backbone(model)
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


def test_predictions_are_mean_losses_over_the_draws(encoded, subject, model):
    task = made(subject)
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


def test_prior_preservation_adds_the_weighted_loss_of_class_pictures(encoded, subject, model):
    task = made(subject, **PRIOR, prior_weight=0.5)
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
    plain = made(subject)
    alone = plain.encode(make_splits(plain, None).train, model)
    assert plain.collate(alone, (0, 3), torch.Generator().manual_seed(1)).labels.shape[1] == 1


def test_training_noise_follows_the_generator(encoded):
    one, same, other = (encoded.training((0, 1), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one.inputs["sample"], same.inputs["sample"])
    assert torch.equal(one.labels, same.labels)
    assert not torch.equal(one.labels, other.labels)
    steps = torch.cat([encoded.training((0,), torch.Generator().manual_seed(s)).inputs["timestep"] for s in range(200)])
    assert steps.min() < 50
    assert steps.max() > 950


def test_samples_are_those_of_the_stock_pipeline(subject, model):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    network = made(subject).backbone(model).module
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


def test_published_checkpoints_load(model, tmp_path):
    """Their names of tensors are older than the libraries that read them here; their scheduler is PNDM."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(model, tmp_path / "pipeline"))

    def rename(path: Path, new_name, **more) -> None:
        save_file({new_name(name): value for name, value in load_file(path).items()} | more, path, {"format": "pt"})

    def before_attention(name: str) -> str:
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(new, old)
        return name

    buffer = {"text_model.embeddings.position_ids": torch.arange(8)[None]}
    rename(folder / "text_encoder" / "model.safetensors", lambda name: f"text_model.{name}", **buffer)
    rename(folder / "vae" / f"{pipeline.WEIGHTS}.safetensors", before_attention)
    settings = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    settings |= {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "trained_betas": None}
    del settings["prediction_type"]
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    texts = [pipeline.text_states(place, [SUBJECT]) for place in (model, str(folder))]
    assert torch.equal(*texts)
    ours, published = (pipeline.load_vae(place).state_dict() for place in (model, str(folder)))
    assert ours.keys() == published.keys()
    assert all(torch.equal(ours[name], published[name]) for name in ours)
    schedules = [pipeline.load_schedule(place) for place in (model, str(folder))]
    assert torch.equal(schedules[0].kept, schedules[1].kept)
    assert schedules[1].prediction == "epsilon"
    assert len(pipeline.load_sampler(str(folder)).alphas_cumprod) == len(schedules[0].kept)


def test_what_is_fetched_of_a_published_repository():
    from huggingface_hub.utils import filter_repo_objects

    published = [
        "README.md",
        "model_index.json",
        "v1-5-pruned.ckpt",
        "v1-5-pruned-emaonly.safetensors",
        "feature_extractor/preprocessor_config.json",
        "safety_checker/config.json",
        "safety_checker/pytorch_model.bin",
        "safety_checker/model.safetensors",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder/pytorch_model.bin",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    fetched = set(filter_repo_objects(published, allow_patterns=list(pipeline.FILES)))
    assert fetched == {
        name
        for name in published
        if not name.startswith(("README", "v1-5", "feature_extractor", "safety_checker"))
        and not name.endswith((".bin", ".fp16.safetensors", ".non_ema.safetensors"))
    }


def test_the_tiny_pipeline_is_the_same_every_time(script, subject, model, tmp_path):
    script.write(tmp_path, updates=4)
    assert pipeline.fingerprint(str(tmp_path / "pipeline")) == pipeline.fingerprint(model)
    ours, again = (read_pictures(str(folder), 16)[0] for folder in (subject, tmp_path / "subject"))
    np.testing.assert_array_equal(ours, again)


def test_pictures_are_the_middle_squares(tmp_path):
    for number in range(4):
        wide = np.zeros((20, 60, 3), np.uint8)
        wide[:, 20:40] = 200 + number
        Image.fromarray(wide).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "class").mkdir()
    pictures, left_out = read_pictures(str(tmp_path), 16)
    assert pictures.shape == (4, 16, 16, 3)
    assert (pictures.reshape(4, -1) == [[200], [201], [202], [203]]).mean() > 0.8
    assert left_out == ()
