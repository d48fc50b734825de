"""Bad input to DreamBooth: one line, exit code 2, nothing written."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="needs the extra: pip install 'rank-adaptive-harness[diffusion]'")

from harness.cli import main
from tests.test_dreambooth import CLASS, SETTINGS, SUBJECT, model, named, place, script  # noqa: F401 (fixtures)


@pytest.fixture
def refused(place, model, tmp_path, capsys):  # noqa: F811
    """Runs the task with changed settings or another model, and gives the one line on stderr."""

    def run(changed: dict, source: str | None = None, root: Path | None = None) -> str:
        settings = {key: value for key, value in (SETTINGS | changed).items() if value is not None}
        results = tmp_path / "results"
        command = ["run", "--methods", "lora[rank=2]", "--tasks", named(**settings), "--model", source or model]
        assert main([*command, "--data-root", str(root or place), "--results", str(results), "--batches", "2"]) == 2
        assert not results.exists()
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


@pytest.fixture
def copied(model, tmp_path) -> Path:  # noqa: F811
    return Path(shutil.copytree(model, tmp_path / "pipeline"))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"instance_images": None}, ["dreambooth.instance_images is missing"]),
        ({"instance_images": "subjects"}, ["instance_images = 'subjects'", "there is no folder"]),
        ({"instance_prompt": None}, ["dreambooth.instance_prompt is missing"]),
        ({"class_images": "class"}, ["class_images and class_prompt go together"]),
        ({"class_prompt": CLASS}, ["class_images and class_prompt go together"]),
        ({"class_images": "clas", "class_prompt": CLASS}, ["class_images = 'clas'", "there is no folder"]),
        ({"resolution": 20}, ["dreambooth.resolution = 20", "multiple of 8"]),
        ({"draw": 3}, ["'draw'", "Did you mean 'draws'?"]),
        ({"guidance": 0.5}, ["dreambooth.guidance = 0.5", "greater than or equal to 1"]),
        ({"instance_prompt": f"{SUBJECT} and of much else"}, ["tokens", "reads at most 8"]),
    ],
)
def test_settings(refused, changed, expected):
    line = refused(changed)
    assert all(text in line for text in expected), line


def test_pictures(refused, place, tmp_path):  # noqa: F811
    few, broken, twins, empty = (tmp_path / name for name in ("few", "broken", "twins", "empty"))
    for folder in (few, broken, twins):
        folder.mkdir()
        for path in sorted((place / "subject").iterdir())[: 3 if folder == few else 5]:
            shutil.copy(path, folder)
    (broken / "x.png").write_bytes(b"no picture")
    shutil.copy(twins / "00.png", twins / "x.png")
    empty.mkdir()
    assert "holds 3 pictures; at least 4" in refused({"instance_images": few})
    assert "1 of 6 pictures in" in (line := refused({"instance_images": broken}))
    assert "first 'x.png'" in line
    assert "'00.png' and 'x.png' are the same picture" in refused({"instance_images": twins})
    assert "holds no picture (.bmp, .jpeg" in refused({"instance_images": empty})


def test_a_model_that_is_no_pipeline(refused, tmp_path):
    assert "there is no such folder" in refused({}, str(tmp_path / "nowhere"))
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text("{}")
    line = refused({}, str(tmp_path / "bert"))
    assert "is not a Stable Diffusion pipeline" in line
    assert "'model_index.json' is missing; it holds: config.json" in line


@pytest.mark.parametrize(
    ("part", "changed", "expected"),
    [
        ("unet/config.json", {"addition_embed_type": "text_time"}, "SDXL"),
        ("unet/config.json", {"in_channels": 9}, "takes 9 and gives 4 channels"),
        ("unet/config.json", {"_class_name": "SanaTransformer2DModel"}, "its unet is a SanaTransformer2DModel"),
        ("unet/config.json", {"cross_attention_dim": 64}, "text states 64 wide"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type = sample; allowed are"),
    ],
)
def test_another_architecture(refused, copied, part, changed, expected):
    path = copied / part
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    line = refused({}, str(copied))
    assert "is not Stable Diffusion 1 or 2" in line
    assert expected in line


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_damaged_weights(refused, copied, part):
    (weights,) = (copied / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded" in refused({}, str(copied))


def test_weights_of_another_network(refused, copied):
    from safetensors.torch import load_file, save_file

    (weights,) = (copied / "unet").glob("*.safetensors")
    tensors = load_file(weights)
    tensors.pop("conv_in.weight")
    save_file(tensors, weights)
    assert "lack 1 tensors of its unet (first: 'conv_in.weight')" in refused({}, str(copied))


def test_missing_weights_and_pickles(refused, copied):
    (weights,) = (copied / "vae").glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    assert "'vae/diffusion_pytorch_model.safetensors' is missing" in refused({}, str(copied))


def test_a_missing_tokenizer(refused, copied):
    shutil.rmtree(copied / "tokenizer")
    assert "has no tokenizer" in refused({}, str(copied))


def test_without_diffusers(refused, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "diffusers" else found(name))
    assert "pip install 'rank-adaptive-harness[diffusion]'" in refused({})
