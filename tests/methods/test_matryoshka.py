"""MatryoshkaLoRA: its diagonal, the sum that it stands for, where it is LoRA, what training alone sees."""

import itertools

import pytest
import torch
from torch import nn

from harness import registry
from harness.contracts import Subject, start
from harness.method import Backbone

SCALES = {"none": lambda q: 1.0, "rank": lambda q: 1 / q, "sqrt": lambda q: q**-0.5}
# Every set of ranks up to 6 that ends with 6.
SETS = [(*some, 6) for count in range(6) for some in itertools.combinations(range(1, 6), count)]


@pytest.mark.parametrize("scaling", SCALES)
def test_the_diagonal(scaling):
    s = SCALES[scaling]
    for ranks in SETS:
        settings = {"rank": 6, "train_ranks": ranks, "scaling": scaling}
        p = registry.make_method("matryoshka", settings).diagonal
        mean = registry.make_method("matryoshka", settings | {"combine": "mean"}).diagonal
        assert [len(ranks) * value for value in mean] == pytest.approx(p)
        assert len(p) == 6
        assert p == pytest.approx([sum(s(q) for q in ranks if q >= i) for i in range(1, 7)])
        assert all(one >= other for one, other in itertools.pairwise(p))
        assert p[0] - p[1] == pytest.approx(s(1) if 1 in ranks else 0, abs=1e-12)
        assert p[-1] == pytest.approx(s(6))


@pytest.mark.parametrize(
    ("rank", "ranks"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8)), (9, (1, 2, 4, 8, 9))]
)
def test_the_train_ranks_by_default(rank, ranks):
    assert registry.make_method("matryoshka", {"rank": rank}).nested_ranks == ranks


NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), (7, 6)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 1)), (2, 3, 5, 5)),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("scaling", "combine"), [("none", "sum"), ("rank", "sum"), ("sqrt", "sum"), ("sqrt", "mean")])
def test_a_batch_sees_the_sum_over_the_train_ranks(scaling, combine, network):
    """Loss and gradients, in float64, against the frozen weights plus sum_q s_q B[:, :q] A[:q, :], or a third of it for
    three train ranks; without the batch it is s_R B A."""
    torch.manual_seed(0)
    make, shape = NETWORKS[network]
    module = make().double()
    weights = [module[0].weight.detach().clone(), module[2].weight.detach().clone()]
    settings = {"rank": 4, "train_ranks": [1, 3, 4], "scaling": scaling, "combine": combine}
    method = registry.make_method("matryoshka", settings)
    adaptation = method.start(Backbone(module, (), ("0", "2")), None, None, torch.Generator())
    factors = [(layer.lora_B["default"].weight, layer.lora_A["default"].weight) for layer in adaptation.layers.values()]
    x = torch.randn(*shape, dtype=torch.float64)
    for B, _ in factors:
        nn.init.normal_(B)
    with adaptation.for_batch(None):
        found = adaptation.model(x)
        gradients = torch.autograd.grad(found.sin().sum(), [factor for pair in factors for factor in pair])
    evaluated = adaptation.model(x)

    def slow(terms):
        plain = make().double()
        plain.load_state_dict(dict(zip(plain.state_dict(), biased(module), strict=True)))
        own = [
            weight + sum(s * (B.flatten(1)[:, :q] @ A.flatten(1)[:q]).view_as(weight) for q, s in terms)
            for weight, (B, A) in zip(weights, factors, strict=True)
        ]
        return torch.func.functional_call(plain, {"0.weight": own[0], "2.weight": own[1]}, x)

    s = SCALES[scaling]
    expected = slow([(q, s(q) / (3 if combine == "mean" else 1)) for q in (1, 3, 4)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(expected.sin().sum(), [factor for pair in factors for factor in pair])
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(evaluated, slow([(4, s(4))]), rtol=1e-12, atol=1e-12)
    assert (evaluated - expected).abs().max() > 1e-3


def biased(module):
    """The frozen values of an adapted network, in the order of the plain one's."""
    return [layer for part in (module[0], module[2]) for layer in (part.base_layer.weight, part.base_layer.bias)]


@pytest.mark.parametrize("scaling", SCALES)
def test_with_the_full_rank_alone_it_is_lora(scaling, tmp_path):
    """Bit for bit, from the same A: the diagonal is 1 relative to the scale."""
    alpha = 4 * SCALES[scaling](4)
    one = start(Subject(f"matryoshka[rank=4,train_ranks=[4],scaling={scaling}]", tmp_path))
    other = start(Subject(f"lora[rank=4,alpha={alpha}]", tmp_path))
    for name, layer in other.adaptation.layers.items():
        layer.lora_A["default"].weight.data.copy_(one.adaptation.layers[name].lora_A["default"].weight)
    for started in (one, other):
        torch.manual_seed(7)  # of dropout
        started.training.run(lambda training: None)
    losses = [row["loss"] for row in one.training.history]
    assert losses == [row["loss"] for row in other.training.history]
    assert losses[-1] != losses[0]
    for name, (B, A) in other.adaptation.scaled_pairs().items():
        own_B, own_A = one.adaptation.scaled_pairs()[name]
        assert torch.equal(A, own_A)
        torch.testing.assert_close(B, own_B, rtol=1e-6, atol=0)
        assert B.abs().max() > 0


def test_a_is_drawn_within_one_over_the_root_of_the_rank(tmp_path):
    """As the authors' code does, which has A the other way round; PEFT's LoRA draws within 1 / sqrt(inputs)."""
    ours = start(Subject("matryoshka[rank=4]", tmp_path)).adaptation.layers
    for name, layer in start(Subject("lora[rank=4]", tmp_path)).adaptation.layers.items():
        A, stock = ours[name].lora_A["default"].weight, layer.lora_A["default"].weight
        assert 0.45 < A.abs().max() <= 0.5
        assert stock.abs().max() <= A.shape[1] ** -0.5
        torch.testing.assert_close(A, stock * (A.shape[1] / 4) ** 0.5)
        assert abs(A.mean()) < 0.15


def test_the_first_components_learn_most(tmp_path):
    """At the first update B's gradient is that of p times A x: the weights show in it."""
    started = start(Subject("matryoshka[rank=4,scaling=none]", tmp_path))
    plain = start(Subject("matryoshka[rank=4,scaling=none,train_ranks=[4]]", tmp_path))
    for each in (started, plain):
        with each.adaptation.for_batch(each.training):
            torch.manual_seed(7)  # of dropout
            each.training.backward(tuple(range(8)))
    for name, layer in plain.adaptation.layers.items():
        found = started.adaptation.layers[name].lora_B["default"].weight.grad
        expected = layer.lora_B["default"].weight.grad * torch.tensor([3.0, 2.0, 1.0, 1.0])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
        assert expected.abs().max() > 0
