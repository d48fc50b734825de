"""MoRA's mixture of rank-ones: slow weights, what routing changes, the threshold, LoRA as its limit, files."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from harness import registry
from harness.errors import InputError
from harness.method import Backbone
from harness.spec import TrainSpec
from methods.mora import load
from tests.support.network import method_training
from tests.support.refusals import assert_refused
from tests.support.routed import LAYERS, STEP, TEXTS, changed_byte, inputs_of, logits, on_bert, tiny_bert
from tests.support.trained import trained

ON_NETWORK = ("linear", "transposed")  # (10, 36) and (8, 10)


def mora(**settings):
    return registry.make_method("mora", settings)


def by_hand(x, layer, router, tau, k, threshold=-1.0):
    """A token's update, (inputs,) to (outputs,), and its weights, in NumPy."""
    A, B = (factor.detach().numpy() for factor in (router.weight, layer.lora_B["default"].weight))
    y = np.array([sum(a * b for a, b in zip(row, x, strict=True)) for row in A])
    s = y / np.sqrt((y**2).sum())
    w = np.exp(s / tau) / np.exp(s / tau).sum()
    largest = sorted(range(len(s)), key=lambda i: -s[i])[:k]
    w = [w[i] if i in largest and s[i] >= threshold else 0.0 for i in range(len(s))]
    return 16.0 * sum(w[i] * B[:, i] * y[i] for i in range(len(s))), w


@pytest.mark.parametrize(("training", "threshold"), [(True, 0.5), (False, 0.5), (False, None)])
def test_a_token_weighs_components_by_their_own_activation(training, threshold):
    run = on_bert("mora", tau=0.3, top_k=3, threshold=threshold)
    layer, router = run.layers[LAYERS[0]], run.routers[LAYERS[0]]
    x = inputs_of(run, LAYERS[0]).flatten(0, 1)
    layer.train(training)
    with torch.no_grad():
        found = (layer(x) - layer.get_base_layer()(x)).numpy()
    least = -1.0 if training or threshold is None else threshold
    wanted, weights = zip(*(by_hand(token, layer, router, 0.3, 3, least) for token in x.numpy()), strict=True)
    np.testing.assert_allclose(found, np.stack(wanted), rtol=0, atol=2e-4)
    used = {tuple(np.flatnonzero(own)) for own in weights}
    assert len(used) > 3, "all tokens choose alike"
    assert ({len(own) for own in used} == {3}) == (least == -1.0), "the threshold cuts nothing"


def test_routing_differs_between_tokens_and_changes_what_the_model_computes():
    """Against uniform weights of the same sum, which a LoRA has."""
    run = on_bert("mora", tau=0.3, top_k=6)
    weights = np.array(
        [
            by_hand(token, run.layers[LAYERS[0]], run.routers[LAYERS[0]], 0.3, 6)[1]
            for token in inputs_of(run, LAYERS[0]).flatten(0, 1).numpy()
        ]
    )
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    assert weights.std(0).min() > 0.05
    routed = logits(run.model)
    for router in run.routers.values():
        router.route = lambda router, y: (y / 6, torch.ones_like(y, dtype=torch.bool))
    assert (logits(run.model) - routed).abs().max() > 0.1


def test_gradients_go_through_weights_and_update():
    """All of them, by finite differences, where no choice is near a tie."""
    training = method_training(mora(rank=4, top_k=2, tau=0.4), ("linear",))
    layer = training.adaptation.layers["linear"]
    A, B = training.adaptation.routers["linear"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        B.normal_()
    x = torch.randn(3, 36, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, A, B: layer(x), (x, A, B), eps=1e-7, atol=1e-5, fast_mode=True)


def test_a_token_of_zeros_has_finite_gradients():
    training = method_training(mora(rank=4), ("linear",))
    layer = training.adaptation.layers["linear"]
    x = torch.zeros(2, 36, dtype=torch.float64, requires_grad=True)
    for parameter in (layer.lora_B["default"].weight, training.adaptation.routers["linear"].weight):
        nn.init.normal_(parameter)
    layer(x).square().sum().backward()
    assert all(value.grad.isfinite().all() for value in (x, *layer.lora_B.parameters(), *layer.lora_A.parameters()))


def test_at_a_high_temperature_with_all_components_it_is_lora():
    losses = []
    for name, settings in (("mora", {"top_k": 4, "tau": 1e9}), ("lora", {})):
        training = method_training(registry.make_method(name, {"rank": 4, "alpha": 8.0} | settings), ON_NETWORK)
        training.run(lambda training: None)
        losses.append([row["loss"] for row in training.history])
        assert all(layer.lora_B["default"].weight.abs().max() > 1e-3 for layer in training.adaptation.layers.values())
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-8)


def test_a_threshold_that_nothing_reaches_leaves_the_backbone(tmp_path):
    """s has length 1, and so 1 is reached where all other activations are 0 alone."""
    run = trained("mora[rank=4,threshold=1.0]")
    adaptation = run.adaptation
    assert all(layer.lora_B["default"].weight.any() for layer in adaptation.layers.values())
    batch = run.batch(range(8)).inputs
    with torch.no_grad():
        found = adaptation.model.eval()(**batch).logits
        for layer in adaptation.layers.values():
            layer.lora_B["default"].weight.zero_()
        assert torch.equal(found, adaptation.model(**batch).logits)
        adaptation.model.train()
    adaptation.export(tmp_path)
    assert torch.equal(load(run.before.module, tmp_path)(**batch).logits, found)


def test_chosen_components_are_counted_without_padding():
    run = on_bert("mora", top_k=2)
    with run.for_batch(STEP):
        run.model(**TEXTS)
    assert [int(count.sum()) for count in run.counts.values()] == [2 * 15, 2 * 15]
    imbalance = run.after_step(STEP)["imbalance"].item()
    assert imbalance == pytest.approx(np.mean([count.max().item() / 5 for count in run.counts.values()]))
    assert 1 < imbalance <= 3


def test_its_parameters_are_those_of_a_lora_of_as_many_components():
    counts = [trained(name, batches=1).adaptation.adapter_parameters() for name in ("mora[rank=3]", "lora[rank=3]")]
    assert counts[0] == counts[1]


def test_an_export_gives_the_same_logits(tmp_path):
    run = on_bert("mora", components=9, top_k=2, threshold=0.5)
    run.export(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mora.json", "trained.safetensors"]
    torch.testing.assert_close(logits(load(tiny_bert(), tmp_path)), logits(run.model), rtol=0, atol=0)
    assert run.stored_bytes() == sum(
        4 * value.numel() for value in load_file(tmp_path / "trained.safetensors").values()
    )
    changed_byte(tmp_path / "mora.json")
    with pytest.raises(InputError, match="holds no exported mora adapter that can be read"):
        load(tiny_bert(), tmp_path)


def test_stock_peft_cannot_hold_it_and_the_list_tells_the_two_apart():
    run = on_bert("mora", top_k=6)
    with pytest.raises(ValueError, match="mora is no LoRA: what a token is given depends on the token"):
        run.scaled_pairs()
    assert run.method.peft_form(run.ranks()) is None
    told = "".join(type(run.method).details())
    assert "not the square matrix of kongds/MoRA" in told
    assert "not kongds/MoRA's square matrix" in type(run.method).__doc__.splitlines()[0]


def test_a_dry_run_tells_what_a_token_uses():
    (told,) = mora(rank=8).notes(Backbone(tiny_bert(), (), LAYERS), TrainSpec(), 100)
    assert told.startswith("a token uses 2 of 8 components of a layer, 16 in 2 layers; what a token is given depends")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("tau=0", "mora.tau = 0 is not allowed"),
        ("threshold=1.5", "mora.threshold = 1.5 is not allowed"),
        ("rank=4,top_k=5", "top_k = 5 is above the 4 components of layer"),
        ("rank=17", "rank = 17 is above the smaller side of layer"),
        ("rslora=true", "unknown parameter of mora 'rslora'"),
    ],
)
def test_bad_settings_are_one_line_and_nothing_is_written(settings, message, tmp_path, capsys):
    assert_refused(f"mora[{settings}]", message, tmp_path, capsys)


def test_a_convolution_is_a_reason():
    told = mora(rank=2).unsupported(Backbone(nn.Sequential(nn.Conv2d(4, 4, 3)), (), ("0",)))
    assert told == "a choice for every token is for linear layers, and layer '0' is a convolution"
