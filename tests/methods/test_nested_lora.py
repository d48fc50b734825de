"""Adapters whose first components are adapters: contracts, the cut to a rank, exports at ranks, bad settings."""

import contextlib
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from harness import registry
from harness.cli import main
from harness.contracts import METHOD_CONTRACTS, Subject, start
from harness.method import Backbone
from tests.support.refusals import assert_refused

VARIANTS = [
    "matryoshka[rank=4,dropout=0.1]",
    "dylora[rank=4,alpha=8,weight_decay=0.1]",
    "dylora[rank=4,train_ranks=[1,3,4],frozen=false]",
]


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
@pytest.mark.parametrize("variant", VARIANTS)
def test_contracts(variant, contract, tmp_path):
    contract(Subject(variant, tmp_path))


def trained(variant, folder):
    started = start(Subject(variant, folder))
    started.training.run(lambda training: None)
    return started


def logits(started, model=None):
    batch = started.task.collate(started.training.encoded, range(8), None)
    with torch.no_grad():
        return (model or started.adaptation.model).eval()(**batch.inputs).logits


def scale(variant, rank):
    """As the papers have it: 1 / sqrt(b) by default, or alpha / b."""
    return rank**-0.5 if "matryoshka" in variant else (8 if "alpha" in variant else 16) / rank


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_an_export_at_a_rank_is_the_stock_lora_of_that_rank(rank, variant, tmp_path):
    started = trained(variant, tmp_path)
    with started.adaptation.at_rank(rank):
        wanted = logits(started)
        started.adaptation.export(tmp_path / "cut")
    started.adaptation.export(tmp_path / "whole")
    config = json.loads((tmp_path / "cut" / "adapter_config.json").read_text())
    assert config["r"] == rank
    assert config["lora_alpha"] / rank == pytest.approx(scale(variant, rank), rel=1e-12)
    cut, whole = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("cut", "whole"))
    assert cut.keys() == whole.keys()
    for name, value in cut.items():
        expected = whole[name][:rank] if "lora_A" in name else whole[name][:, :rank] if "lora_B" in name else None
        assert expected is None or torch.equal(value, expected), name
    reloaded = PeftModel.from_pretrained(started.before.module, str(tmp_path / "cut"))
    torch.testing.assert_close(logits(started, reloaded), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cut_is_the_first_components_at_the_scale_of_their_number(variant, tmp_path):
    """Not the best approximation; at the full rank, and above, the adapter as it is evaluated."""
    adaptation = trained(variant, tmp_path).adaptation
    pairs = {
        name: (layer.lora_B["default"].weight.detach().clone(), layer.lora_A["default"].weight.detach().clone())
        for name, layer in adaptation.layers.items()
    }
    evaluated = {name: layer.get_delta_weight("default") for name, layer in adaptation.layers.items()}
    count = adaptation.adapter_parameters()
    for rank in (1, 2, 3, 4, 9):
        live = min(rank, 4)
        with adaptation.at_rank(rank):
            found = {name: layer.get_delta_weight("default") for name, layer in adaptation.layers.items()}
            assert set(adaptation.ranks().values()) == {live}
            assert adaptation.adapter_parameters() == count * live / 4
        for name, (B, A) in pairs.items():
            expected = sum(torch.outer(B[:, i], A[i]) for i in range(live)) * scale(variant, live)
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-7)
            assert live < 4 or torch.equal(found[name], evaluated[name])


@pytest.mark.parametrize("name", ["matryoshka", "dylora"])
@pytest.mark.parametrize("rank", [3, 5, 7])
def test_after_a_cut_the_scale_is_what_it_was_to_the_last_digit(rank, name, tmp_path):
    """At ranks where alpha / rank rounds otherwise than the scale itself."""
    adaptation = start(Subject(f"{name}[rank={rank}]", tmp_path)).adaptation
    before = {layer: own.scaling["default"] for layer, own in adaptation.layers.items()}
    with adaptation.at_rank(2):
        assert {own.scaling["default"] for own in adaptation.layers.values()} != set(before.values())
    assert {layer: own.scaling["default"] for layer, own in adaptation.layers.items()} == before


def test_a_cut_is_undone_after_an_error(tmp_path):
    started = trained(VARIANTS[0], tmp_path)
    before = logits(started)
    with contextlib.suppress(KeyError), started.adaptation.at_rank(2):
        assert not torch.equal(logits(started), before)
        raise KeyError
    assert torch.equal(logits(started), before)


class Convolutions(nn.Sequential):
    """Two convolutions that PEFT takes for a model."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.Tanh(), nn.Conv2d(6, 4, 1))


@pytest.mark.parametrize("name", ["matryoshka", "dylora"])
def test_exports_of_convolutions(name, tmp_path):
    torch.manual_seed(0)
    backbone, plain = (Backbone(Convolutions(), (), ("0", "2")) for _ in range(2))
    plain.module.load_state_dict(backbone.module.state_dict())
    method = registry.make_method(name, {"rank": 3})
    assert method.unsupported(backbone) is None
    adaptation = method.start(backbone, None, None, torch.Generator())
    with torch.no_grad():
        for layer in adaptation.layers.values():
            layer.lora_B["default"].weight.normal_()
    images = torch.randn(2, 3, 5, 5)
    with torch.no_grad(), adaptation.at_rank(2):
        wanted = adaptation.model.eval()(images)
        adaptation.export(tmp_path / "two")
    with torch.no_grad():
        found = PeftModel.from_pretrained(plain.module, str(tmp_path / "two")).eval()(images)
        assert (adaptation.model(images) - wanted).abs().max() > 1e-2
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["matryoshka", "dylora"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("train_ranks=[4,2,8]", "train_ranks = [4, 2, 8] is not ascending"),
        ("train_ranks=[2,2,8]", "train_ranks = [2, 2, 8] is not ascending"),
        ("train_ranks=[4,16]", "train_ranks = [4, 16] goes above rank = 8"),
        ("rank=4,train_ranks=[2]", "train_ranks = [2] ends below rank = 4: components above 2 would never train"),
        ("train_ranks=[0,8]", "train_ranks.0 = 0 is not allowed"),
        ("train_ranks=[]", "train_ranks = [] is not allowed"),
        ("rank=17,train_ranks=[17]", "rank = 17 is above the smaller side of layer 'bert.encoder.layer.0"),
    ],
)
def test_bad_settings_are_one_line(name, settings, message, tmp_path, capsys):
    assert_refused(f"{name}[{settings}]", message, tmp_path, capsys)


@pytest.mark.parametrize(
    ("method", "note"),
    [
        (
            "matryoshka[rank=6]",
            "trains ranks 1, 2, 4, 6 at once: component 1 has weight 2.62, component 6 0.408; evaluated at rank 6, "
            "where all have weight 0.408",
        ),
        ("dylora[rank=5]", "each of 20 updates draws one of 5 ranks: every component is trained by about 4 of them"),
        (
            "dylora[rank=5,train_ranks=[1,5],frozen=false]",
            "each of 20 updates draws one of 2 ranks: component 5 is trained by about 10 of them",
        ),
    ],
)
def test_a_dry_run_says_what_is_trained(method, note, tmp_path, capsys):
    options = ["--tasks", "synthetic", "--batches", "20", "--results", str(tmp_path), "--dry-run"]
    assert main(["run", "--methods", method, *options]) == 0
    assert note in " ".join(capsys.readouterr().out.split())


def test_layers_that_it_does_not_fit():
    method = registry.make_method("dylora", {"rank": 2})
    assert "dilation" in method.unsupported(Backbone(nn.Sequential(nn.Conv2d(4, 4, 3, dilation=2)), (), ("0",)))
    assert "no linear or convolution layer" in method.unsupported(Backbone(nn.Sequential(nn.Tanh()), (), ()))
