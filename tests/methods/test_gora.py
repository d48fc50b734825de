"""GoRA: ranks by importance, the step that B is, LoRA as its limit, exact resume, export."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn

from harness import registry
from harness.contracts import METHOD_CONTRACTS, Subject, start
from harness.errors import Diverged
from harness.method import Backbone
from harness.run import checkpoint
from harness.spec import TrainSpec
from methods.gora import compressed
from tests.support.network import KINDS, Network, mean_gradients, method_training, weights_of
from tests.support.refusals import assert_refused

SETTINGS = (
    "learning_rate=1e-3,rank=4,rank_min=1,rank_max=12,cost=sum,dropout=0.1,gamma=2,learning_rate_ratio=1,batches=2"
)


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
def test_contracts(contract, tmp_path):
    """With other settings than those that every method is tried with."""
    contract(Subject(f"gora[{SETTINGS}]", tmp_path))


def gora(**settings):
    return registry.make_method("gora", settings)


def on_network(layers=KINDS, **settings):
    """A run on a network with a convolution, a linear and a transposed layer in float64, prepared by 2 batches."""
    training = method_training(gora(**{"rank": 2, "rank_max": 4, "batches": 2} | settings), layers)
    training.prepare()
    return training


def pairs(adaptation):
    """(B, A) of each layer as matrices, the scale in B."""
    return {name: (B.flatten(1), A.flatten(1)) for name, (B, A) in adaptation.scaled_pairs().items()}


class TestAllocation:
    SHAPES = {"a": (10, 6), "b": (32, 112), "c": (200, 200), "d": (48, 16)}

    @pytest.mark.parametrize("cost", ["sum", "root"])
    def test_importance_in_proportion_to_the_cost_gives_every_layer_the_rank(self, cost):
        shapes = {name: shape for name, shape in self.SHAPES.items() if name != "a"}
        sums = {name: sum(shape) for name, shape in shapes.items()}  # squares, so that roots are whole
        importance = {name: 0.37 * (value if cost == "sum" else math.sqrt(value)) for name, value in sums.items()}
        for rank in (1, 3, 8):
            assert gora(rank=rank, cost=cost).allocate(importance, shapes) == dict.fromkeys(shapes, rank)

    @pytest.mark.parametrize(
        ("cost", "ranks"),
        [
            ("sum", {"a": 9, "b": 7}),  # shares 340.7 and 459.3 of 8 (36 + 64) = 800, of which a rank takes 36 and 64
            ("root", {"a": 8, "b": 8}),  # shares 47.7 and 64.3 of 8 (6 + 8) = 112, of which a rank takes 6 and 8
        ],
    )
    def test_shares_are_rounded_and_ranks_are_whole(self, cost, ranks):
        shapes, importance = {"a": (16, 20), "b": (40, 24)}, {"a": 0.477, "b": 0.643}
        assert gora(cost=cost).allocate(importance, shapes) == ranks

    def test_ranks_stay_within_the_limits_and_the_layers_sides(self):
        importance = {"a": 1e-9, "b": 0.0, "c": 1.0, "d": 0.02}
        assert gora().allocate(importance, self.SHAPES) == {"a": 4, "b": 4, "c": 17, "d": 4}
        assert gora(rank_max=10, rank_min=1).allocate(importance, self.SHAPES) == {"a": 1, "b": 1, "c": 10, "d": 1}
        nothing = dict.fromkeys(self.SHAPES, 0.0)
        for layer, side in (("a", 6), ("d", 16)):
            assert gora(rank_max=300).allocate(nothing | {layer: 1.0}, self.SHAPES)[layer] == side
        assert gora().limits == (4, 32)
        assert gora(rank=1).limits == (1, 4)

    @pytest.mark.parametrize("cost", ["sum", "root"])
    def test_within_the_limits_the_budget_is_used_but_for_less_than_a_rank_of_each_layer(self, cost):
        generator = np.random.default_rng(0)
        for _ in range(50):
            shapes = {str(i): tuple(generator.integers(60, 900, 2).tolist()) for i in range(12)}
            costs = {name: sum(shape) if cost == "sum" else math.sqrt(sum(shape)) for name, shape in shapes.items()}
            importance = {name: value * float(generator.uniform(0.5, 2)) for name, value in costs.items()}
            ranks = gora(cost=cost, rank_min=1, rank_max=60).allocate(importance, shapes)
            assert all(1 < rank < 60 for rank in ranks.values())
            left = sum((8 - ranks[name]) * costs[name] for name in shapes)
            assert -len(shapes) / 2 <= left < sum(costs.values()) + len(shapes) / 2

    def test_without_any_importance_every_layer_has_the_rank(self):
        shapes = {name: shape for name, shape in self.SHAPES.items() if name != "a"}
        assert set(gora(cost="sum").allocate(dict.fromkeys(shapes, 0.0), shapes).values()) == {8}

    def test_importance_is_the_mean_of_weight_times_gradient(self):
        """The history of the first update has each layer's share."""
        training = on_network()
        training.update()
        training.update()
        training.fetch()
        first, second = training.history
        found = {name: (weight * mean_gradients(2)[name]).abs().mean() for name, weight in weights_of().items()}
        total = float(sum(found.values()))
        assert first["importance"] == pytest.approx([float(value) / total for value in found.values()], rel=1e-9)
        assert first["rank"] == sum(training.adaptation.ranks().values())
        assert "importance" not in second

    def test_the_run_has_the_ranks_of_its_importance(self):
        training = on_network(rank_min=1)
        weights = weights_of()
        importance = {name: float((weights[name] * G).abs().mean()) for name, G in mean_gradients(2).items()}
        expected = gora(rank=2, rank_min=1, rank_max=4).allocate(
            importance, {n: tuple(w.shape) for n, w in weights.items()}
        )
        assert training.adaptation.ranks() == expected
        assert len(set(expected.values())) > 1
        assert training.adaptation.adapter_parameters() == sum(
            rank * sum(weights[name].shape) for name, rank in expected.items()
        )


class TestStep:
    def test_b_is_the_least_squares_solution(self):
        generator = torch.Generator().manual_seed(0)
        G, A = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((9, 14), (5, 14)))
        expected, *_ = np.linalg.lstsq(A.numpy().T, G.numpy().T, rcond=None)
        np.testing.assert_allclose(compressed(G, A).numpy(), expected.T, rtol=0, atol=1e-12)
        single = compressed(G.float(), A.float())
        np.testing.assert_allclose(single.numpy(), expected.T, rtol=0, atol=1e-5)

    def test_every_layer_starts_with_a_step_against_the_gradient(self):
        training = on_network(gamma=0.3, alpha=5.0, rank_min=1)
        gradients = mean_gradients(2)
        for name, (B, A) in pairs(training.adaptation).items():
            G, (rank, inputs) = gradients[name], A.shape
            update = B @ A
            seen = G @ torch.linalg.pinv(A) @ A
            torch.testing.assert_close(update, -0.3 * math.sqrt(inputs / rank) * seen, rtol=1e-6, atol=1e-12)
            assert (G * update).sum() < 0
            assert training.adaptation.layers[name].scaling["default"] == pytest.approx(5.0 / math.sqrt(rank))

    def test_the_frozen_weights_stay(self):
        training = on_network()
        for name, weight in weights_of().items():
            layer = training.adaptation.layers[name].get_base_layer()
            assert torch.equal(weight, layer.weight.T if name == "transposed" else layer.weight.flatten(1))

    def test_at_full_rank_the_update_is_the_gradient_itself(self):
        """A layer of 3 inputs, whose rank can be 3."""
        method = gora(rank=3, rank_min=3, rank_max=3, gamma=0.7, batches=2)
        layers = ("wide",)
        training = method_training(method, layers, module=Wide)
        training.prepare()
        B, A = pairs(training.adaptation)["wide"]
        G = mean_gradients(2, layers, module=Wide)["wide"]
        torch.testing.assert_close(B @ A, -0.7 * G, rtol=1e-5, atol=1e-10)

    def test_the_step_is_on_average_gamma_times_the_gradient_long(self):
        """Over draws of A, the mean square; its standard error is about 1 %."""
        generator, (m, n, r) = torch.Generator().manual_seed(0), (6, 24, 3)
        G = torch.randn(m, n, generator=generator, dtype=torch.float64)
        draws = [2 * torch.rand(r, n, generator=generator, dtype=torch.float64) - 1 for _ in range(1000)]
        squares = [float((math.sqrt(n / r) * compressed(G, A) @ A).square().sum()) for A in draws]
        assert np.mean(squares) == pytest.approx(float(G.square().sum()), rel=0.05)

    def test_a_is_that_of_lora_with_rows_cut_or_drawn_alike(self):
        method = gora(rank=4, rank_min=1, rank_max=12, batches=2)
        run = start(Subject("gora[rank=4,rank_min=1,rank_max=12,batches=2]", Path()))
        before = {name: A.clone() for name, (_, A) in run.adaptation.scaled_pairs().items()}
        run.training.prepare()
        ranks = run.adaptation.ranks()
        assert min(ranks.values()) < method.rank < max(ranks.values())
        for name, (_, A) in run.adaptation.scaled_pairs().items():
            kept = min(4, ranks[name])
            assert torch.equal(A[:kept], before[name][:kept])
            new = A[4:] * math.sqrt(A.shape[1])
            assert new.numel() == 0 or (0.9 < new.abs().max() <= 1 and new.std() == pytest.approx(3**-0.5, rel=0.15))


class Wide(nn.Module):
    """Images (rows, 2, 6, 6), of which a layer sees three numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(3, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, images):
        return self.head(torch.tanh(self.wide(images.flatten(1)[:, :3])))


def test_without_a_step_at_one_rank_it_is_lora(tmp_path):
    """Bit for bit, on the batches that are left."""
    run = start(
        Subject(
            "gora[rank=4,rank_min=4,rank_max=4,gamma=0,learning_rate=1e-3,learning_rate_ratio=1,batches=5]", tmp_path
        ),
        batches=17,
    )
    run.training.prepare()
    lora = start(Subject("lora[rank=4,rslora=true]", tmp_path), batches=12)
    for _ in range(5):
        lora.training.data.draw("all")
    for training in (run.training, lora.training):
        torch.manual_seed(1)
        training.run(lambda training: None)
    losses = [[row["loss"] for row in each.training.history] for each in (run, lora)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12


def test_b_learns_faster(tmp_path):
    run = start(Subject("gora[rank=4,batches=1,learning_rate=1e-3]", tmp_path))
    run.training.prepare()
    rates = {id(p): group["lr"] for group in run.adaptation.optimizer.param_groups for p in group["params"]}
    for name, parameter in run.adaptation.model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(16e-3 if ".lora_B." in name else 1e-3), name


def test_the_start_counts_and_so_do_its_sizes(tmp_path):
    run = start(Subject("gora[rank=4,rank_min=1,batches=3]", tmp_path))
    run.training.prepare()
    assert run.training.used == run.training.data.drawn["all"] == 3
    count = run.training.sizes.parameters()
    shapes = {name: run.before.shape(name) for name in run.before.layers}
    assert count.adapter_initial == 4 * sum(map(sum, shapes.values()))
    assert count.adapter_final == sum(rank * sum(shapes[name]) for name, rank in run.adaptation.ranks().items())
    assert [size.batches for size in run.training.sizes.trajectory] == [0, 3]


@pytest.mark.parametrize(
    "limits", [{"rank": 2, "rank_max": 4, "rank_min": 1}, {"rank": 5, "rank_max": 5, "rank_min": 5}]
)
def test_a_state_from_before_the_first_update_is_exact(limits, tmp_path):
    """Also where every layer has the rank of the start, at which PEFT's alpha / r has another last digit."""
    layers = ("linear", "transposed")
    whole, resumed = (method_training(gora(**limits, batches=2), layers) for _ in range(2))
    whole.prepare()
    checkpoint.save(tmp_path, 2, whole.state_dict())
    resumed.load_state_dict(checkpoint.load_newest(tmp_path).state)
    for training in (whole, resumed):
        training.run(lambda training: None)
    assert whole.history == resumed.history
    assert whole.adaptation.ranks() == resumed.adaptation.ranks()
    assert [layer.scaling for layer in whole.adaptation.layers.values()] == [
        layer.scaling for layer in resumed.adaptation.layers.values()
    ]
    for name, (B, A) in whole.adaptation.scaled_pairs().items():
        other_B, other_A = resumed.adaptation.scaled_pairs()[name]
        assert torch.equal(B, other_B)
        assert torch.equal(A, other_A)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # of layers of both kinds
def test_an_export_is_a_stock_lora(tmp_path):
    training = on_network(rank_min=1, gamma=1.0)
    training.run(lambda training: None)
    training.adaptation.export(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Network().eval().double(), str(tmp_path)).eval().double()
    images = training.encoded.inputs["images"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), training.adaptation.model(images), rtol=0, atol=1e-10)
    values = gora().singular_values(tmp_path)
    for name, (B, A) in pairs(training.adaptation).items():
        np.testing.assert_allclose(values[name], torch.linalg.svdvals(B @ A)[: len(A)].numpy(), atol=1e-10)


def test_a_gradient_that_is_not_finite_is_a_divergence():
    training = method_training(gora(rank=2, batches=1))
    training.encoded.inputs["images"][:] = math.inf
    with pytest.raises(Diverged, match="the gradient of layer 'convolution' is not finite"):
        training.prepare()


def test_advice_is_a_lora_of_these_ranks():
    form = gora(rank=4, alpha=8.0).peft_form({"a": 2, "b": 4, "c": 0})
    assert form.method == "lora"
    assert form.parameters["rank_pattern"] == {"a": 2, "c": 0}
    assert form.config["lora_alpha"] / form.config["r"] == 8 / math.sqrt(4)


def test_a_dry_run_tells_what_the_start_costs():
    backbone = Backbone(nn.Sequential(nn.Linear(512, 256), nn.Linear(256, 512)), (), ("0", "1"))
    notes = gora(rank=8, batches=5).notes(backbone, TrainSpec(batches=40), 100)
    assert notes == [
        "5 of 40 batches go before the first update, for the mean gradient of 2 layers, which takes 1.0 MiB beside the "
        "model meanwhile",
        "ranks from 4 to 32 then come from it: about the 12,288 parameters of rank 8 everywhere, 6,144 to 49,152",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "batches=32",
            "batches = 32 before the first update leave none of the budget of 6 to train with: the least budget is 33",
        ),
        ("batches=6", "the least budget is 7"),
        ("batches=0", "gora.batches = 0 is not allowed"),
        ("rank_min=9,rank_max=8,batches=1", "rank_min = 9 is above rank_max = 8"),
        ("rank=2,rank_min=4,batches=1", "rank = 2 is below rank_min = 4"),
        ("rank=8,rank_max=6,batches=1", "rank = 8 is above rank_max = 6"),
        ("rank=17,batches=1", "rank = 17 is above the smaller side of layer"),
        ("cost=squares,batches=1", "gora.cost = 'squares' is not allowed"),
        ("gamma=-1,batches=1", "gora.gamma = -1"),
    ],
)
def test_bad_settings_are_one_line_and_nothing_is_written(settings, message, tmp_path, capsys):
    assert_refused(f"gora[{settings}]", message, tmp_path, capsys, "--batches", "6")


def test_layers_with_one_weight_are_a_reason():
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    layers[1].weight = layers[0].weight
    assert "layers '0' and '1' share their weight" in gora(rank=2).unsupported(Backbone(layers, (), ("0", "1")))
    one = gora(rank=2).unsupported(Backbone(layers, (), ("1",)))  # the other, not to be adapted, has it all the same
    assert one == "layers '0' and '1' share their weight, and so its gradient: leave them out by target_modules"
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    assert "groups" in gora(rank=2).unsupported(Backbone(grouped, (), ("0",)))
