"""LoRA-GA: singular vectors of the gradient, the first step, an unchanged function, PEFT's form, export."""

import itertools
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, LoraGAConfig, PeftModel, get_peft_model, preprocess_loraga
from torch import nn
from transformers.pytorch_utils import Conv1D

from harness import registry
from harness.contracts import METHOD_CONTRACTS, Subject, start
from harness.method import Backbone
from harness.run import checkpoint
from harness.spec import TrainSpec
from tests.support.network import KINDS, Network, mean_gradients, method_training, weights_of
from tests.support.refusals import assert_refused

SETTINGS = "rank=3,form=peft,rslora=true,dropout=0.1,direction=random,scale=weight_svd,batches=2"
DIRECTIONS = ("ArB2r", "A2rBr", "ArBr")
SCALES = ("stable", "gd_scale", "unit", "weight_svd")


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
def test_contracts(contract, tmp_path):
    """With other settings than those that every method is tried with."""
    contract(Subject(f"lora_ga[{SETTINGS}]", tmp_path))


def lora_ga(**settings):
    return registry.make_method("lora_ga", settings)


class Smooth(nn.Module):
    """Images (rows, 2, 6, 6), of which it sees twelve numbers: its gradients have full rank."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 10)
        self.transposed = Conv1D(8, 10)
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        return self.head(torch.sin(4 * self.transposed(torch.sin(4 * self.linear(images.flatten(1)[:, :12])))))


SMOOTH = ("linear", "transposed")


def on_network(layers=KINDS, module=Network, **settings):
    """A run on a network with a convolution, a linear and a transposed layer in float64, prepared by 2 batches."""
    training = method_training(lora_ga(**{"rank": 2, "batches": 2} | settings), layers, module=module)
    training.prepare()
    return training


def rng():
    return torch.Generator().manual_seed(0)


def matrices(m=12, n=15, dtype=torch.float64):
    """A gradient and a weight."""
    generator = rng()
    return [torch.randn(m, n, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


def pairs(adaptation):
    """(B, A) of each layer as matrices, without the scale."""
    scale = adaptation.method.scaling
    return {name: (B.flatten(1) / scale, A.flatten(1)) for name, (B, A) in adaptation.scaled_pairs().items()}


def same_up_to_signs(found, expected, atol):
    """Vectors in columns, each known but for its sign."""
    found, expected = np.asarray(found), np.asarray(expected)
    np.testing.assert_allclose(found * np.sign((found * expected).sum(0)), expected, rtol=0, atol=atol)


class TestOfficialForm:
    @pytest.mark.parametrize(("module", "layers", "rank"), [(Smooth, SMOOTH, 4), (Network, ("convolution",), 2)])
    def test_a_and_b_are_scaled_singular_vectors_of_the_mean_gradient(self, module, layers, rank):
        training = on_network(layers, module, rank=rank, gamma=9.0)
        gradients = mean_gradients(2, layers, module)
        for name, (B, A) in pairs(training.adaptation).items():
            U, S, Vh = np.linalg.svd(gradients[name].numpy())
            assert S[-1] > 1e-5 * S[0]
            c = len(B) ** 0.25 / 3
            same_up_to_signs(B, c * U[:, rank : 2 * rank], 1e-9)
            same_up_to_signs(A.T, c * Vh[:rank].T, 1e-9)

    @pytest.mark.parametrize("options", [{}, {"rslora": True, "alpha": 3.0}])
    def test_the_first_step_goes_along_the_best_approximation_of_twice_the_rank(self, options):
        """d(s B A) under a step of gradient descent: s (dB A + B dA) = -(s c)^2 G_2r times the learning rate."""
        rank = 3
        training = on_network(SMOOTH, Smooth, rank=rank, batches=1, **options)
        method, adaptation = training.adaptation.method, training.adaptation
        rows = method_training(registry.make_method("head", {}), SMOOTH, module=Smooth).data.draw("all")
        batch = training.task.collate(training.encoded, rows, None)
        training.task.loss(adaptation.model, batch, rng()).backward()
        for name, gradient in mean_gradients(1, SMOOTH, Smooth).items():
            layer, (B, A) = adaptation.layers[name], pairs(adaptation)[name]
            d_B, d_A = layer.lora_B["default"].weight.grad, layer.lora_A["default"].weight.grad
            moved = method.scaling * (d_B @ A + B @ d_A)
            U, S, Vh = np.linalg.svd(gradient.numpy(), full_matrices=False)
            best = (U[:, : 2 * rank] * S[: 2 * rank]) @ Vh[: 2 * rank]
            factor = method.scaling**2 * math.sqrt(len(B)) / 16
            np.testing.assert_allclose(moved, factor * best, rtol=0, atol=1e-9 * factor * S[0])
            assert np.abs(gradient.numpy() - best).max() > 1e-5 * S[0]

    def test_scales_of_the_authors(self):
        gradient, weight = matrices()
        U, _, Vh = np.linalg.svd(gradient.numpy())
        of_weight = np.linalg.svd(weight.numpy(), compute_uv=False)
        s = 6 / 3
        lengths = {
            "stable": 12**0.25 / 4,
            "gd_scale": 1 / s,
            "unit": 1.0,
            "weight_svd": np.sqrt(of_weight[:3] / s).mean(),
        }
        for scale, length in lengths.items():
            B, A = lora_ga(rank=3, alpha=6.0, scale=scale).factors(gradient, weight, rng())
            same_up_to_signs(B, length * U[:, 3:6], 1e-10)
            same_up_to_signs(A.T, length * Vh[:3].T, 1e-10)

    def test_where_the_gradient_has_more_directions_the_leading_ones_are_found(self):
        """The decomposition is randomized then."""
        generator = rng()
        U, V = (torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64))[0] for _ in range(2))
        gradient = (U * 0.8 ** torch.arange(60.0)) @ V.T
        B, A = lora_ga(rank=3, scale="unit").factors(gradient, gradient, rng())
        same_up_to_signs(B, U[:, 3:6], 1e-2)
        same_up_to_signs(A.T, V[:, :3], 1e-2)


@pytest.mark.parametrize("form", ["official", "peft"])
class TestDirections:
    @pytest.mark.parametrize("direction", DIRECTIONS)
    def test_which_vectors_a_and_b_get(self, form, direction):
        gradient, weight = matrices()
        U, S, Vh = np.linalg.svd(gradient.numpy())
        first, second, odd, even = [0, 1, 2], [3, 4, 5], [1, 3, 5], [0, 2, 4]
        of_A, of_B = {"ArB2r": (first, second), "A2rBr": (second, first), "ArBr": (odd, even)}[direction]
        B, A = lora_ga(rank=3, form=form, direction=direction, scale="unit").factors(gradient, weight, rng())
        same_up_to_signs(B, U[:, of_B] * (S[of_B] if form == "peft" else 1), 1e-10)
        same_up_to_signs(A.T, Vh[of_A].T, 1e-10)

    def test_random_ones_come_from_the_seed(self, form):
        """PEFT gives A and B the same ones, the authors give the others."""
        gradient, weight = matrices()
        U, _, Vh = torch.linalg.svd(gradient)
        seen = set()
        for seed in range(5):
            method = lora_ga(rank=3, form=form, direction="random")
            B, A = method.factors(gradient, weight, torch.Generator().manual_seed(seed))
            of_B, of_A = ((base.T @ vectors).abs().argmax(0).tolist() for base, vectors in ((U, B), (Vh.T, A.T)))
            assert len(set(of_A)) == 3
            assert set(of_B) == (set(of_A) if form == "peft" else set(range(6)) - set(of_A))
            seen.add(tuple(of_A))
        assert len(seen) > 1


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # PEFT's, of a first layer
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("direction", "scale"), list(itertools.product(DIRECTIONS, SCALES)))
def test_peft_form_is_what_the_installed_peft_gives(direction, scale, rslora):
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(15, 12)), torch.randn(20, 15), torch.randn(20, 12)
    with torch.no_grad():  # a large first singular value, which a randomized decomposition finds exactly
        model[0].weight += 2
    weight, gradient = model[0].weight.detach().clone(), y.T @ x
    config = LoraConfig(
        r=3,
        lora_alpha=7,
        use_rslora=rslora,
        target_modules=["0"],
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction=direction, scale=scale, stable_gamma=9),
    )
    preprocess_loraga(model, config, lambda: (model(x) * y).sum().backward())
    theirs = get_peft_model(model, config).base_model.model[0]
    method = lora_ga(rank=3, alpha=7.0, rslora=rslora, form="peft", direction=direction, scale=scale, gamma=9.0)
    B, A = method.factors(gradient, weight, rng())
    assert theirs.scaling["default"] == pytest.approx(method.scaling)
    for found, expected in (
        (B, theirs.lora_B["default"].weight.detach()),
        (A.T, theirs.lora_A["default"].weight.detach().T),
    ):
        same_up_to_signs(found, expected, 1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("form", ["official", "peft"])
def test_the_function_stays_while_the_weights_change(form):
    training = on_network(form=form)
    images = training.encoded.inputs["images"]
    torch.manual_seed(0)
    before = Network().eval().double()
    with torch.no_grad():
        torch.testing.assert_close(training.adaptation.model(images), before(images), rtol=0, atol=1e-13)
    for name, weight in weights_of().items():
        base = training.adaptation.layers[name].get_base_layer().weight.detach()
        found = base.T if name == "transposed" else base.flatten(1)
        B, A = pairs(training.adaptation)[name]
        torch.testing.assert_close(found, weight - training.adaptation.method.scaling * B @ A, rtol=0, atol=1e-14)
        assert (found - weight).norm() > 1e-5


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # of layers of both kinds
def test_an_export_is_a_stock_lora_of_twice_the_rank_for_the_backbone_as_it_was(tmp_path):
    training = on_network()
    training.run(lambda training: None)
    training.adaptation.export(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Network().eval().double(), str(tmp_path)).eval().double()
    images = training.encoded.inputs["images"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), training.adaptation.model(images), rtol=0, atol=1e-10)
    assert {name: len(values) for name, values in lora_ga().singular_values(tmp_path).items()} == dict.fromkeys(
        KINDS, 4
    )
    assert set(training.adaptation.ranks().values()) == {2}
    assert training.adaptation.at_rank(1) is None


def test_a_dry_run_knows_what_will_be_stored(tmp_path):
    """An export holds what was taken out of the backbone as well: before the start from the gradient, and after."""
    run = start(Subject("lora_ga[rank=4,batches=2]", tmp_path))
    before = run.training.sizes.parameters()
    run.training.prepare()
    assert run.training.sizes.parameters() == before
    assert before.stored_bytes == 4 * (2 * before.adapter_final + before.head)
    assert run.training.used == run.training.data.drawn["all"] == 2


def test_changed_weights_come_back_with_a_checkpoint(tmp_path):
    """Also where the start, made again, would give something else; and from before the first update."""
    whole = start(Subject("lora_ga[rank=4,batches=2]", tmp_path))
    whole.training.prepare()
    checkpoint.save(tmp_path / "c", 2, whole.training.state_dict())
    resumed = start(Subject("lora_ga[rank=4,batches=2]", tmp_path), seed=1)
    resumed.training.data.seed = 0
    resumed.training.load_state_dict(checkpoint.load_newest(tmp_path / "c").state)
    for name, layer in whole.adaptation.layers.items():
        other = resumed.adaptation.layers[name]
        assert torch.equal(layer.get_base_layer().weight, other.get_base_layer().weight)
        for one, two in zip(whole.adaptation.taken[name], resumed.adaptation.taken[name], strict=True):
            assert torch.equal(one, two)
            assert one.norm() > 0
    assert resumed.training.used == 2


def test_advice_is_a_lora_of_this_rank():
    form = lora_ga(rank=2, alpha=8.0).peft_form({"a": 2, "b": 2})
    assert (form.method, form.parameters["rank"], form.parameters["rank_pattern"]) == ("lora", 2, {})
    assert form.config["lora_alpha"] / form.config["r"] == 4


def test_a_dry_run_tells_what_the_start_costs():
    backbone = Backbone(nn.Sequential(nn.Linear(512, 256), nn.Linear(256, 512)), (), ("0", "1"))
    (note,) = lora_ga(batches=3).notes(backbone, TrainSpec(batches=40), 100)
    assert note.startswith("3 of 40 batches go before the first update, for the mean gradient of 2 layers")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("batches=6,rank=2", "batches = 6 before the first update leave none of the budget of 6 to train with"),
        ("batches=6,rank=2", "the least budget is 7"),
        ("rank=9,batches=1", "rank = 9 takes 18 singular vectors, and layer '"),
        ("rank=9,batches=1", "has 16: allowed is 1 to 8"),
        ("form=other", "lora_ga.form = 'other' is not allowed"),
        ("gamma=0", "lora_ga.gamma = 0"),
    ],
)
def test_bad_settings_are_one_line_and_nothing_is_written(settings, message, tmp_path, capsys):
    assert_refused(f"lora_ga[{settings}]", message, tmp_path, capsys, "--batches", "6")


def test_what_does_not_fit_a_backbone_is_a_reason():
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    layers[1].weight = layers[0].weight
    assert "layers '0' and '1' share their weight" in lora_ga(rank=2).unsupported(Backbone(layers, (), ("0", "1")))
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    assert "groups" in lora_ga(rank=2).unsupported(Backbone(grouped, (), ("0",)))
