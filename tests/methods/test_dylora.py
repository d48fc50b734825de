"""DyLoRA: one rank drawn for an update, what of the adapter then moves, where it is LoRA."""

import collections
import copy
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from harness import registry
from harness.contracts import Subject, start
from harness.method import Backbone


def pairs(adaptation):
    return {name: (B.clone(), A.clone()) for name, (B, A) in adaptation.scaled_pairs().items()}


def drawn(started):
    return [row["drawn_rank"] for row in started.training.history]


@pytest.mark.parametrize("frozen", ["true", "false"])
def test_with_the_full_rank_alone_it_is_lora(frozen, tmp_path):
    """With alpha / R, bit for bit."""
    assert_same_run(f"dylora[rank=4,train_ranks=[4],frozen={frozen},alpha=6]", "lora[rank=4,alpha=6,{}]", tmp_path)


@pytest.mark.parametrize("frozen", ["true", "false"])
def test_at_rank_1_it_is_lora(frozen, tmp_path):
    assert_same_run(f"dylora[rank=1,frozen={frozen}]", "lora[rank=1,{}]", tmp_path)


def assert_same_run(one, other, folder):
    same = "learning_rate=1e-3,weight_decay=0.1"
    one, other = (start(Subject(name, folder)) for name in (one, other.format(same)))
    for started in (one, other):
        torch.manual_seed(7)  # of dropout
        started.training.run(lambda training: None)
    assert [row["loss"] for row in one.training.history] == [row["loss"] for row in other.training.history]
    assert set(drawn(one)) == set(one.adaptation.ranks().values())
    for name, (B, A) in pairs(other.adaptation).items():
        assert torch.equal(A, pairs(one.adaptation)[name][1])
        assert torch.equal(B, pairs(one.adaptation)[name][0])
        assert B.abs().max() > 0


@dataclass
class FakeStep:
    """Whose draws are those of a seed."""

    rng: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(5))


NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), (7, 6)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 1)), (2, 3, 5, 5)),
}


def adapted(network, settings):
    """Two layers in float64 whose B is not 0, so that every component has a gradient from the start."""
    torch.manual_seed(0)
    method = registry.make_method("dylora", {"rank": 4, "learning_rate": 1e-2} | settings)
    backbone = Backbone(NETWORKS[network][0]().double(), (), ("0", "2"))
    adaptation = method.start(backbone, None, None, torch.Generator())
    for layer in adaptation.layers.values():
        nn.init.normal_(layer.lora_B["default"].weight)
    return adaptation


def factors(adaptation):
    """(A, B) of each layer."""
    return [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in adaptation.layers.values()]


def played(adaptation, network, updates):
    """Updates with their hooks. Yields the rank drawn, and the factors' gradients as the optimizer got them."""
    step, inputs = FakeStep(), torch.Generator().manual_seed(3)
    for _ in range(updates):
        x = torch.randn(*NETWORKS[network][1], generator=inputs, dtype=torch.float64)
        adaptation.optimizer.zero_grad()
        with adaptation.for_batch(step):
            adaptation.model(x).sin().square().mean().backward()
        adaptation.before_step(step)
        gradients = [(A.grad.clone(), B.grad.clone()) for A, B in factors(adaptation)]
        adaptation.optimizer.step()
        yield adaptation.after_step(step)["drawn_rank"], gradients, x


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("settings", "blocks"),
    [
        ({}, {1: (0, 1), 2: (1, 2), 3: (2, 3), 4: (3, 4)}),
        ({"train_ranks": [2, 4]}, {2: (0, 2), 4: (2, 4)}),
    ],
)
def test_frozen_components_have_no_gradient_and_do_not_move(settings, blocks, network):
    """Nor do their moments. By default a block is component b alone."""
    adaptation = adapted(network, settings)
    before = [(A.detach().clone(), B.detach().clone()) for A, B in factors(adaptation)]
    moments = {}
    seen = set()
    for b, gradients, _ in played(adaptation, network, 24):
        seen.add(b)
        live = slice(*blocks[b])
        still = [i for i in range(4) if not blocks[b][0] <= i < blocks[b][1]]
        for (A, B), (grad_A, grad_B), (was_A, was_B) in zip(factors(adaptation), gradients, before, strict=True):
            assert (grad_A[still] == 0).all()
            assert (grad_B[:, still] == 0).all()
            assert (grad_A[live].flatten(1).norm(dim=1) > 0).all()
            assert torch.equal(A[still], was_A[still])
            assert torch.equal(B[:, still], was_B[:, still])
            assert (A[live] != was_A[live]).all()
            assert (B[:, live] != was_B[:, live]).all()
            for name in ("exp_avg", "exp_avg_sq"):
                value = adaptation.optimizer.state[A][name]
                assert torch.equal(value[still], moments.get((A, name), torch.zeros_like(value))[still])
                moments[A, name] = value.clone()
        before = [(A.detach().clone(), B.detach().clone()) for A, B in factors(adaptation)]
    assert seen == blocks.keys()


@pytest.mark.parametrize("network", NETWORKS)
def test_frozen_it_trains_every_component_as_a_parameter_of_its_own(network):
    """Against torch's AdamW on rank-one pairs, of which all but the last one of a batch are detached: values, moments
    and the correction of their bias are each component's own."""
    adaptation = adapted(network, {"alpha": 3.0, "weight_decay": 0.1})
    plain = NETWORKS[network][0]().double()
    plain.load_state_dict(
        {
            f"{name}.{key}": getattr(adaptation.layers[name].base_layer, key)
            for name in "02"
            for key in ("weight", "bias")
        }
    )
    weights = {name: plain.get_parameter(f"{name}.weight").detach() for name in "02"}
    own = {
        name: [
            (nn.Parameter(B.detach().flatten(1)[:, i].clone()), nn.Parameter(A.detach().flatten(1)[i].clone()))
            for i in range(4)
        ]
        for name, (A, B) in zip("02", factors(adaptation), strict=True)
    }
    optimizer = torch.optim.AdamW(
        [factor for each in own.values() for pair in each for factor in pair], lr=1e-2, weight_decay=0.1
    )
    for b, _, x in played(adaptation, network, 30):
        values = {}
        for name, weight in weights.items():
            update = sum(torch.outer(*(f if i == b - 1 else f.detach() for f in own[name][i])) for i in range(b))
            values[f"{name}.weight"] = weight + 3.0 / b * update.view_as(weight)
        optimizer.zero_grad()
        torch.func.functional_call(plain, values, x).sin().square().mean().backward()
        optimizer.step()
        for name, (A, B) in zip("02", factors(adaptation), strict=True):
            for i, (column, row) in enumerate(own[name]):
                torch.testing.assert_close(B.flatten(1)[:, i], column, rtol=1e-9, atol=1e-11)
                torch.testing.assert_close(A.flatten(1)[i], row, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("network", NETWORKS)
def test_not_frozen_every_component_up_to_the_drawn_rank_has_its_gradient(network):
    """Against autograd through the slices."""
    adaptation = adapted(network, {"frozen": False, "alpha": 3.0})
    plain = copy.deepcopy(adaptation)
    for b, gradients, x in played(adaptation, network, 6):
        for layer in plain.layers.values():
            layer.scaling["default"] = 3.0 / b
        with torch.no_grad():
            for A, B in factors(plain):
                A[b:], B[:, b:] = 0, 0
        plain.optimizer.zero_grad()
        plain.model(x).sin().square().mean().backward()
        for (A, B), (grad_A, grad_B) in zip(factors(plain), gradients, strict=True):
            torch.testing.assert_close(grad_A[:b], A.grad[:b], rtol=1e-10, atol=1e-13)
            torch.testing.assert_close(grad_B[:, :b], B.grad[:, :b], rtol=1e-10, atol=1e-13)
            assert (grad_A[b:] == 0).all()
            assert (grad_B[:, b:] == 0).all()
            assert (grad_A[:b].flatten(1).norm(dim=1) > 0).all()
        for own, other in zip(factors(plain), factors(adaptation), strict=True):
            for one, two in zip(own, other, strict=True):
                one.data.copy_(two)


def test_not_frozen_it_is_matryoshka_with_the_drawn_rank_alone(tmp_path):
    """P = s_b diag(1 for i <= b), update after update, bit for bit."""
    one = start(Subject("dylora[rank=4,alpha=1,frozen=false]", tmp_path))
    other = start(Subject("matryoshka[rank=4,scaling=rank,learning_rate=1e-3,weight_decay=0.1]", tmp_path))
    for name, layer in other.adaptation.layers.items():
        layer.lora_A["default"].weight.data.copy_(one.adaptation.layers[name].lora_A["default"].weight)
    for number in range(24):
        torch.manual_seed(number)  # of dropout
        one.training.update()
        one.training.fetch()
        b = drawn(one)[-1]
        other.adaptation.p = torch.tensor([4 / b] * b + [0.0] * (4 - b))  # as a multiple of s_4 = 1 / 4
        torch.manual_seed(number)
        other.training.update()
    other.training.fetch()
    assert [row["loss"] for row in one.training.history] == [row["loss"] for row in other.training.history]
    assert len(set(drawn(one))) == 4
    for name, (B, A) in pairs(one.adaptation).items():
        assert torch.equal(A, pairs(other.adaptation)[name][1])
        assert torch.equal(B, pairs(other.adaptation)[name][0])


def test_the_ranks_drawn_are_the_seeds_alone(tmp_path):
    def ranks(settings, seed=0):
        started = start(Subject(f"dylora[rank=4{settings}]", tmp_path), seed=seed)
        started.training.run(lambda training: None)
        return drawn(started)

    assert ranks("") == ranks(",learning_rate=1e-2,frozen=false,dropout=0.1") != ranks("", seed=1)


def test_ranks_are_drawn_alike():
    counts = collections.Counter(b for b, _, _ in played(adapted("linear", {"train_ranks": [1, 2, 4]}), "linear", 300))
    assert counts.keys() == {1, 2, 4}
    assert all(75 < count < 125 for count in counts.values())
