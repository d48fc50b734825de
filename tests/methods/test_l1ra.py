"""L1RA: its update against a loop by hand, its limit LoRA, what is handed on to whom, that no rank is lost, export."""

import math

import pytest
import torch
from torch import nn

from harness.contracts import Subject, start
from harness.contracts.methods import (
    a_cut_to_a_rank_has_it_and_is_undone,
    a_run_interrupted_after_every_update_equals_the_uninterrupted_one,
    every_size_is_counted,
    nothing_is_pickled,
    the_history_holds_what_is_declared,
    the_same_seed_gives_the_same_record,
)
from harness.contracts.subject import method_of
from harness.errors import InputError
from harness.method import Backbone
from harness.spec import TrainSpec
from methods.l1ra import handed_out
from tests.support.network import method_training
from tests.support.refusals import assert_refused
from tests.support.small_lora import NETWORKS, FakeStep, adapted, assert_export_is_stock_lora, outputs
from tests.support.trained import trained

HANDS_ON = "l1ra[rank=3,gate_learning_rate=0.3,every=0.2]"
NONE_LEFT = "l1ra[rank=3,l1=50,every=0.2,components=30]"
CONTRACTS = (
    every_size_is_counted,
    a_run_interrupted_after_every_update_equals_the_uninterrupted_one,
    the_same_seed_gives_the_same_record,
    the_history_holds_what_is_declared,
    nothing_is_pickled,
    a_cut_to_a_rank_has_it_and_is_undone,
)


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.__name__)
def test_contracts_where_nothing_is_left(contract, tmp_path):
    """All gates are 0 after every update but those that were just handed on."""
    contract(Subject(NONE_LEFT, tmp_path))


def test_with_gates_that_do_not_move_it_is_lora_bit_for_bit(tmp_path):
    ours, lora = (
        trained(name, tmp_path) for name in ("l1ra[rank=4,gate_learning_rate=0]", "lora[rank=4,init=gaussian]")
    )
    for row, other in zip(ours.training.history, lora.training.history, strict=True):
        assert other.items() <= row.items()
    found = ours.adaptation.model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in lora.adaptation.model.state_dict().items())


def test_updates_against_a_loop_by_hand():
    """AdamW of torch with two learning rates, in float64, the L1 step and the bounds after it."""
    name = "l1ra[rank=3,learning_rate=1e-2,gate_learning_rate=0.05,l1=0.4,every=0.9]"
    training = method_training(method_of(name), ("linear",), 12)
    adaptation = training.adaptation
    layer, head = adaptation.layers["linear"], adaptation.model.base_model.model.head.modules_to_save["default"]
    own = [layer.lora_A["default"].weight, layer.lora_B["default"].weight, adaptation.gates()["linear"]]
    A, B, c, W, b = (p.detach().clone().requires_grad_() for p in (*own, head.weight, head.bias))
    network = method_training(method_of("head"), ("linear",)).adaptation.model
    rows = [training.data.draw("all") for _ in range(12)]
    drawn = iter(rows)
    training.data.draw = lambda stream: next(drawn)
    seen = []
    groups = [{"params": [A, B, W, b]}, {"params": [c], "lr": 0.05}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)
    for indices in rows:
        images, labels = training.encoded.inputs["images"][list(indices)], training.encoded.labels[list(indices)]
        features = torch.relu(network.norm(network.convolution(images))).flatten(1)
        hidden = torch.relu(network.linear(features) + 16 / 3 * ((features @ A.T) * c) @ B.T)
        loss = nn.functional.cross_entropy(torch.relu(network.transposed(hidden)) @ W.T + b, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([A, B, c, W, b], training.train.clip_norm)
        optimizer.step()
        seen.append(loss.item())
        with torch.no_grad():
            bounded = [min(max(value - 0.4 * 0.05, 0.0), 1.0) for value in c.tolist()]
            c.copy_(torch.tensor(bounded, dtype=torch.float64))
    training.run(lambda training: None)
    assert [row["loss"] for row in training.history] == pytest.approx(seen, rel=0, abs=1e-6)
    for parameter, expected in zip(own, (A, B, c), strict=True):
        torch.testing.assert_close(parameter.detach(), expected.detach(), rtol=0, atol=1e-10)
    assert c.min() < 0.9
    assert c.max() <= 1


def test_gates_have_their_own_constant_rate_and_lose_l1_times_it(tmp_path):
    """Where B is 0 no gradient reaches them: of the first update the L1 step alone is left."""
    started = start(Subject("l1ra[rank=3,l1=2,gate_learning_rate=0.05]", tmp_path))
    training = started.training
    training.train = TrainSpec(batches=24, warmup=0.0, schedule="linear")
    training.update()
    for gate in started.adaptation.gates().values():
        torch.testing.assert_close(gate.detach(), torch.full((3,), 0.9))
    training.run(lambda training: None)
    rates = sorted({group["lr"] for group in started.adaptation.optimizer.param_groups})
    assert rates == [pytest.approx(1e-3 / 24), 0.05]


def step_of(used):
    step = FakeStep(used)
    step.rng = torch.Generator().manual_seed(5)
    return step


def with_gates(network, gates, **settings):
    """A small network with these gates, which the L1 step does not move."""
    adaptation = adapted("l1ra", network, {"every": 0.5, "l1": 0.0} | settings)
    for gate, values in zip(adaptation.gates().values(), gates, strict=True):
        gate.data.copy_(torch.tensor(values))
    inputs = torch.randn(*NETWORKS[network][1], generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    adaptation.model(inputs).square().mean().backward()
    rates = [group["lr"] for group in adaptation.optimizer.param_groups]
    for group in adaptation.optimizer.param_groups:
        group["lr"] = 0.0
    adaptation.optimizer.step()  # so that the optimizer has a past
    for group, rate in zip(adaptation.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return adaptation


@pytest.mark.parametrize("network", NETWORKS)
def test_handing_on_changes_neither_the_function_nor_the_number_of_components(network):
    adaptation = with_gates(network, [[0.0, 0.6, 0.0], [0.9, 0.5, 1.0]])
    before = outputs(adaptation, network)
    assert adaptation.after_step(step_of(4)) == {}
    row = adaptation.after_step(step_of(5))
    assert row == {"rank": 6, "ranks": [2, 4], "handed_on": 2}, "the second layer has room for no more than four"
    torch.testing.assert_close(outputs(adaptation, network), before, rtol=0, atol=1e-10)
    gate = adaptation.gates()["2"]
    assert gate[3:].tolist() == [1.0]
    assert (adaptation.layers["2"].lora_B["default"].weight[:, 3:] == 0).all()
    assert float(adaptation.layers["2"].lora_A["default"].weight[3:].detach().norm()) > 0.1
    assert not adaptation.optimizer.state, "the optimizer begins anew"
    inputs = torch.randn(*NETWORKS[network][1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    adaptation.optimizer.zero_grad()
    adaptation.model(inputs).square().mean().backward()
    adaptation.optimizer.step()
    assert (adaptation.layers["2"].lora_B["default"].weight[:, 3:] != 0).any(), "a new component trains"


def test_where_nothing_is_lost_nothing_begins_anew():
    adaptation = with_gates("linear", [[0.1, 0.6, 0.2], [0.9, 0.5, 1.0]])
    moments = {p: dict(values) for p, values in adaptation.optimizer.state.items()}
    assert adaptation.after_step(step_of(5))["handed_on"] == 0
    assert {p: dict(values) for p, values in adaptation.optimizer.state.items()} == moments


def test_where_every_layer_lost_one_no_rank_is_lost():
    """The authors' code has no layer left to give them to, and drops them."""
    adaptation = with_gates("linear", [[0.0, 0.6, 0.0], [0.9, 0.0, 0.7]])
    assert adaptation.after_step(step_of(5))["ranks"] == [2, 4]
    adaptation = with_gates("linear", [[0.0, 0.6, 0.0], [0.5, 0.0, 0.7]])
    assert adaptation.after_step(step_of(5))["ranks"] == [3, 3]


def test_each_layer_keeps_its_largest():
    adaptation = with_gates("linear", [[0.1, 0.2, 0.05], [1.0, 1.0, 1.0]], prune_below=0.5, reassign=False)
    row = adaptation.after_step(step_of(5))
    assert row == {"rank": 4, "ranks": [1, 3], "handed_on": 0}
    assert adaptation.gates()["0"].tolist() == [pytest.approx(0.2)]


@pytest.mark.parametrize("number", [0, 1, 5, 9, 20])
@pytest.mark.parametrize("room", [{"a": 3, "b": 0, "c": 9, "d": 2}, {"a": 0, "b": 0, "c": 1, "d": 4}])
def test_they_are_handed_out_in_turn(room, number):
    """One after the other, as dealt cards."""
    expected, left = dict.fromkeys(room, 0), number
    for names in (["c", "a"], ["c", "a", "d", "b"]):
        places = iter(names * 100)
        while left and any(expected[name] < room[name] for name in names):
            name = next(places)
            if expected[name] < room[name]:
                expected[name], left = expected[name] + 1, left - 1
    assert handed_out(number, (["c", "a"], ["c", "a", "d", "b"]), room) == expected
    assert sum(expected.values()) == min(number, sum(room.values()))


@pytest.mark.parametrize("reassign", [True, False])
def test_the_number_of_components_is_kept_while_it_trains(reassign, tmp_path):
    """And what is handed on changes the run. In the end only those with a gate are left."""
    started = trained(f"{HANDS_ON[:-1]},reassign={str(reassign).lower()}]", tmp_path)
    rows = [row for row in started.training.history if "rank" in row]
    assert [row["update"] + 1 for row in rows] == [4, 8, 12, 16, 20]
    totals = [sum(row["ranks"]) for row in rows]
    if reassign:
        assert totals == 5 * [36]
        assert sum(row["handed_on"] for row in rows) > 10
        assert len({tuple(row["ranks"]) for row in rows}) > 1
    else:
        assert totals[0] == 36 > totals[1] > totals[-1]
    count, ranks = started.training.sizes.parameters(), started.adaptation.ranks()
    assert count.adapter_final == sum(rank * sum(started.before.shape(name)) for name, rank in ranks.items())
    assert all((gate > 0).all() for gate in started.adaptation.gates().values())


@pytest.mark.parametrize("name", [HANDS_ON, NONE_LEFT])
def test_an_export_is_the_stock_lora_of_what_is_left(name, tmp_path):
    started = trained(name, tmp_path)
    total = sum(started.adaptation.ranks().values())
    assert total == 0 if name == NONE_LEFT else 0 < total < 36
    assert_export_is_stock_lora(started, tmp_path / "export")


def test_a_number_of_components_is_spread_evenly(tmp_path):
    started = start(Subject("l1ra[components=29]", tmp_path))
    assert list(started.adaptation.ranks().values()) == 5 * [3] + 7 * [2]
    for layer in started.adaptation.layers.values():
        assert layer.scaling["default"] == 2.0
        A = layer.lora_A["default"].weight.detach()
        assert float(A.std()) == pytest.approx(1 / 8, rel=0.5)


def notes(method, batches):
    backbone = Backbone(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), (), ("0", "1"))
    return method.notes(backbone, TrainSpec(batches=batches), 100)


def test_a_dry_run_says_how_often():
    told = "16 components in 2 layers; those whose gate is 0 are handed on every 3 of 30 batches, 9 times"
    assert notes(method_of("l1ra"), 30) == [told]
    assert (
        "5 components in 2 layers; those whose gate is 0 are removed every 7 of 23"
        in notes(method_of("l1ra[components=5,reassign=false,every=0.33]"), 23)[0]
    )


@pytest.mark.parametrize("every", [0.07, 0.1, 0.3, 0.5, 0.99])
def test_the_least_budget_that_is_named_does(every):
    method = method_of(f"l1ra[every={every}]")
    least = math.ceil(1 / every)
    notes(method, least)
    with pytest.raises(InputError, match=f"takes at least {least}$"):
        notes(method, least - 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("rank=17", "rank = 17 is above the smaller side of layer"),
        ("components=11", "components = 11 should be 12 to 192: one to 16 in each of 12 layers"),
        ("components=193", "components = 193 should be 12 to 192: one to 16 in each of 12 layers"),
        ("every=1", "l1ra.every = 1 is not allowed"),
        ("l1=-1", "l1ra.l1 = -1 is not allowed"),
        ("prune_below=1.5", "l1ra.prune_below = 1.5 is not allowed"),
        ("every=0.1", "every = 0.1 does not fit into 9 batches: it takes at least 10"),
    ],
)
def test_bad_settings_are_one_line(settings, message, tmp_path, capsys):
    assert_refused(f"l1ra[{settings}]", message, tmp_path, capsys, "--batches", "9")
