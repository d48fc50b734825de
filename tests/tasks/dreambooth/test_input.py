"""Bad input to DreamBooth: one line, exit code 2, nothing written."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="needs the extra: pip install 'rank-adaptive-harness[diffusion]'")

from harness.cli import main
from harness.record.store import RecordStore
from tests.tasks.dreambooth.settings import CLASS, SETTINGS, SUBJECT, named


@pytest.fixture
def refused(subject, model, tmp_path, capsys):
    """Runs the task with changed settings, other pictures or another model, and gives the one line on stderr."""

    def run(changed: dict, source: str | None = None, pictures: Path | None = None) -> str:
        settings = {key: value for key, value in (SETTINGS | changed).items() if value is not None}
        task, results = named(pictures or subject, **settings), tmp_path / "results"
        command = ["run", "--methods", "lora[rank=2]", "--tasks", task, "--model", source or model]
        assert main([*command, "--results", str(results), "--batches", "2"]) == 2
        assert not results.exists()
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


@pytest.fixture
def copied(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "pipeline"))


@pytest.fixture
def pictures(subject, tmp_path):
    """Makes a folder with so many of the subject's pictures."""

    def make(name: str, count: int, source: str = ".") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for path in sorted((subject / source).glob("*.png"))[:count]:
            shutil.copy(path, folder)
        return folder

    return make


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"instance_prompt": None}, ["instance_prompt is missing"]),
        ({"resolution": 20}, ["resolution = 20", "multiple of 8"]),
        ({"draw": 3}, ["'draw'", "Did you mean 'draws'?"]),
        ({"guidance": 0.5}, ["guidance = 0.5", "greater than or equal to 1"]),
        ({"instance_prompt": f"{SUBJECT} and of much else"}, ["tokens", "reads at most 8"]),
    ],
)
def test_settings(refused, changed, expected):
    line = refused(changed)
    assert all(text in line for text in expected), line


def test_missing_folders(refused, pictures, tmp_path):
    assert "subjects' is not there" in refused({}, pictures=tmp_path / "subjects")
    line = refused({"class_prompt": CLASS}, pictures=pictures("alone", 5))
    assert "alone/class' is not there" in line
    assert "those for class_prompt in PATH/class" in line


def test_a_task_without_its_path(tmp_path, capsys):
    command = ["run", "--methods", "lora", "--tasks", "dreambooth[instance_prompt=a]", "--results"]
    assert main([*command, str(tmp_path / "results")]) == 2
    assert "write dreambooth:PATH" in capsys.readouterr().err


def test_too_few_pictures(refused, pictures):
    assert "holds 3 pictures" in refused({}, pictures=pictures("few", 3))
    assert "holds 0 pictures" in (line := refused({}, pictures=pictures("none", 0)))
    assert "at least 4 are needed" in line


def test_pictures_that_cannot_be_read(refused, pictures):
    broken = pictures("broken", 5)
    (broken / "x.png").write_bytes(b"no picture")
    assert "1 of 6 pictures cannot be read (at most 1 % may be left out): x.png" in refused({}, pictures=broken)


def test_pictures_that_are_no_regular_files_of_the_folder(refused, pictures, subject):
    piped, linked = pictures("piped", 5), pictures("linked", 5)
    os.mkfifo(piped / "x.png")
    assert "1 of 6 pictures cannot be read (at most 1 % may be left out): x.png" in refused({}, pictures=piped)
    (linked / "x.png").symlink_to(next(subject.glob("*.png")))
    assert f"image 'x.png' is not inside '{linked}'" in refused({}, pictures=linked)
    assert "'/dev/zero' is no folder" in refused({}, pictures=Path("/dev/zero"))


def test_one_picture_in_a_hundred_is_left_out_and_named(script, model, tmp_path, capsys):
    many = tmp_path / "many"
    script.write_pictures(many, script.torch.rand(99, 3, 16, 16, generator=script.torch.Generator().manual_seed(0)))
    (many / "x.png").write_bytes(b"no picture")
    task = named(many, **SETTINGS | {"samples": 0})
    where = ["--model", model, "--results", str(tmp_path / "results"), "--executor", "serial"]
    assert main(["run", "--methods", "lora[rank=2]", "--tasks", task, "--batches", "1", *where]) == 0
    (found,) = RecordStore(tmp_path / "results").records()
    assert sum(found.rows.values()) == 99
    assert found.data["train"] == {"num_left_out": 1, "left_out": ["x.png"]}


def test_one_picture_twice(refused, pictures):
    twins = pictures("twins", 5)
    shutil.copy(twins / "00.png", twins / "x.png")
    assert "'00.png' and 'x.png' are the same picture" in refused({}, pictures=twins)


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
