"""SoRA: its update against a loop by hand, its limit LoRA, the schedule of the threshold, the penalty."""

import pytest
import torch
from torch import nn

from harness.contracts import Subject, start
from harness.contracts.subject import method_of
from harness.method import Backbone
from harness.spec import TrainSpec
from tests.support.network import method_training
from tests.support.refusals import assert_refused, least_that_does
from tests.support.small_lora import adapted
from tests.support.trained import trained


def test_without_a_threshold_and_with_gates_of_1_it_is_lora_bit_for_bit(tmp_path):
    limit = "sora[rank=4,threshold=0,gate_init=ones,gate_ratio=0,weight_decay=0.1]"
    ours, lora = (trained(name, tmp_path) for name in (limit, "lora[rank=4,weight_decay=0.1]"))
    for row, other in zip(ours.training.history, lora.training.history, strict=True):
        assert other.items() <= row.items()
    found = ours.adaptation.model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in lora.adaptation.model.state_dict().items())


def test_updates_against_a_loop_by_hand():
    """AdamW of torch on A, B and g, in float64, and the threshold after it."""
    threshold, batches = 0.1, 8
    training = method_training(
        method_of(f"sora[rank=3,threshold={threshold},learning_rate=1e-2,weight_decay=0.1]"), ("linear",), batches
    )
    adaptation = training.adaptation
    layer, head = adaptation.layers["linear"], adaptation.model.base_model.model.head.modules_to_save["default"]
    A, B = (part["default"].weight.detach().clone().requires_grad_() for part in (layer.lora_A, layer.lora_B))
    g = adaptation.gates()["linear"].detach().clone().requires_grad_()
    W, b = head.weight.detach().clone().requires_grad_(), head.bias.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW(
        [{"params": [A, B, W], "weight_decay": 0.1}, {"params": [g, b], "weight_decay": 0.0}], lr=1e-2
    )
    network, rows = training_network(), [training.data.draw("all") for _ in range(batches)]
    drawn = iter(rows)
    training.data.draw = lambda stream: next(drawn)
    seen = []
    for indices in rows:
        images, labels = training.encoded.inputs["images"][list(indices)], training.encoded.labels[list(indices)]
        loss = nn.functional.cross_entropy(by_hand(network, images, A, B, g, W, b), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([A, B, g, W, b], training.train.clip_norm)
        optimizer.step()
        with torch.no_grad():
            for i, value in enumerate(g.tolist()):
                g[i] = 0.0 if abs(value) <= threshold else value - threshold * (1 if value > 0 else -1)
        seen.append(loss.item())
    training.run(lambda training: None)
    assert [row["loss"] for row in training.history] == pytest.approx(seen, rel=0, abs=1e-6)
    torch.testing.assert_close(adaptation.gates()["linear"].detach(), g.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.lora_B["default"].weight.detach(), B.detach(), rtol=0, atol=1e-10)
    assert 0 < adaptation.ranks()["linear"] < 3


def training_network():
    """The network that such a run starts from."""
    return method_training(method_of("head"), ("linear",)).adaptation.model


def by_hand(network, images, A, B, g, W, b):
    """Its scores with scale B diag(g) A beside the linear layer, and this head."""
    features = torch.relu(network.norm(network.convolution(images))).flatten(1)
    hidden = network.linear(features) + 16 / 3 * ((features @ A.T) * g) @ B.T
    return torch.relu(network.transposed(torch.relu(hidden))) @ W.T + b


@pytest.mark.parametrize("learning_rate", [1e-4, 1e-2])
def test_the_threshold_is_not_multiplied_by_the_learning_rate(learning_rate, tmp_path):
    """Gates that the loss does not move lose it with every update."""
    name = f"sora[rank=4,threshold=0.02,gate_ratio=0,learning_rate={learning_rate}]"
    before = [gate.clone() for gate in start(Subject(name, tmp_path)).adaptation.gates().values()]
    after = trained(name, tmp_path).adaptation.gates().values()
    for gate, own in zip(after, before, strict=True):
        torch.testing.assert_close(gate, own.sign() * (own.abs() - 24 * 0.02).clamp(min=0), rtol=0, atol=1e-5)


def test_the_penalty_is_the_mean_over_all_gates():
    adaptation = adapted("sora", "linear", {"penalty": 3.0})
    adaptation.penalty().backward()
    for gate in adaptation.gates().values():
        torch.testing.assert_close(gate.grad, 3.0 / 6 * gate.detach().sign())
    assert adapted("sora", "linear", {}).penalty() is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("", [1.0] * 10),
        ("schedule=linear,values=3,dense=0.4", [0, 0, 0, 0, 0.5, 0.5, 0.5, 1, 1, 1]),
        ("schedule=linear,values=2,dense=0", [1.0] * 10),
        ("schedule=linear,values=4,dense=0.7", [0] * 7 + [1 / 3, 2 / 3, 1]),
        ("components=1,values=3,dense=0.4", [1.0] * 10),
    ],
)
def test_the_schedule_of_the_threshold(settings, expected):
    method = method_of(f"sora[threshold=1,{settings}]" if settings else "sora[threshold=1]")
    assert [method.threshold_at(used, 10) for used in range(1, 11)] == pytest.approx(expected)


def notes(method, batches):
    backbone = Backbone(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), (), ("0", "1"))
    return method.notes(backbone, TrainSpec(batches=batches), 100)


@pytest.mark.parametrize("dense", [0.0, 0.36, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("settings", ["schedule=linear,values=5", "components=3"])
def test_the_least_budget_that_is_named_does(settings, dense):
    method = method_of(f"sora[{settings},dense={dense}]")
    least = least_that_does(lambda batches: notes(method, batches))
    stages = {method.stage(used, least) for used in range(1, least + 1)}
    assert stages - {0.0} == {stage / (method.values - 1) for stage in range(1, method.values)}


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ("threshold=1e-3", "16 gates in 2 layers, drawn from N(0, 1): the thresholds of 30 updates sum to 0.03"),
        (
            "gate_init=ones,components=4,threshold=0",
            "16 gates in 2 layers, 1 at the start: the thresholds of 30 updates sum to 0; at most 4 components are "
            "live in the end",
        ),
    ],
)
def test_a_dry_run_says_how_far_the_threshold_reaches(settings, note):
    assert notes(method_of(f"sora[{settings}]"), 30) == [note]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("dense=0.5", "dense = 0.5 is for schedule = linear or components, and neither is given"),
        ("values=3", "values = 3 is for schedule = linear or components, and neither is given"),
        ("penalty=1,gate_ratio=0", "penalty = 1 is for gates that train, and gate_ratio = 0 stops them"),
        ("schedule=cubic", "sora.schedule = 'cubic' is not allowed: it should be 'constant' or 'linear'"),
        (
            "schedule=linear",
            "values = 7 after dense = 0.36 of the budget does not fit into 6 batches: it takes at least 9",
        ),
    ],
)
def test_bad_settings_are_one_line(settings, message, tmp_path, capsys):
    assert_refused(f"sora[{settings}]", message, tmp_path, capsys, "--batches", "6")
