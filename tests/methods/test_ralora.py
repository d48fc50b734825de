"""RaLoRA: effective rank, blocks, LoRA as its limit, cuts, exact resume, export."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from harness import registry
from harness.contracts import METHOD_CONTRACTS, Subject, start
from harness.method import Backbone
from harness.run import checkpoint
from harness.spec import TrainSpec
from methods.ralora import effective_rank
from methods.shared.block_lora import best_in_blocks, use_in_blocks, whole_pair
from methods.shared.gradient_start import allocate
from tests.support.network import mean_gradients, method_training, weights_of
from tests.support.refusals import assert_refused
from tests.support.small_lora import assert_export_is_stock_lora, truncated

SETTINGS = "rank=3,allocation=importance,rank_max=5,dropout=0.1,blocks_max=2,batches=2"
LAYERS = ("linear", "transposed")  # (10, 36) and (8, 10)


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
def test_contracts(contract, tmp_path):
    """With other settings than those that every method is tried with."""
    contract(Subject(f"ralora[{SETTINGS}]", tmp_path))


def ralora(**settings):
    return registry.make_method("ralora", settings)


def on_network(**settings):
    """A run on linear layers, one transposed, in float64, prepared by 2 batches."""
    training = method_training(ralora(**{"rank": 1, "batches": 2} | settings), LAYERS)
    training.prepare()
    return training


def by_numpy(matrix):
    """The effective rank."""
    sigma = np.linalg.svd(np.asarray(matrix), compute_uv=False)
    p = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def block_mask(m, n, blocks):
    """1 where an output and an input are of one block."""
    return (torch.arange(m)[:, None] * blocks // m == torch.arange(n) * blocks // n).double()


def random_pair(m=12, n=8, r=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((m, r), (r, n))]


class TestEffectiveRank:
    def test_equal_singular_values_count_and_others_do_not(self):
        Q = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
        for number in (1, 4, 9):
            assert effective_rank(Q[:, :number] @ Q[:number]) == pytest.approx(number, rel=1e-9)

    def test_it_is_the_entropys_exponential_whatever_the_scale(self):
        matrix = random_pair(7, 5, 4)[0] @ random_pair(7, 5, 4)[1]
        for factor in (1.0, 1e-6, -3.0):
            assert effective_rank(factor * matrix) == pytest.approx(by_numpy(matrix), rel=1e-9)
        assert effective_rank(matrix.float()) == pytest.approx(by_numpy(matrix), rel=1e-5)
        assert 1 < by_numpy(matrix) < 4

    def test_without_a_gradient_it_is_one(self):
        assert effective_rank(torch.zeros(3, 4)) == 1.0


class TestBlocks:
    @pytest.mark.parametrize(
        ("effective", "rank", "shape", "expected"),
        [
            (31.9, 2, (64, 64), 8),
            (32.0, 2, (64, 64), 16),
            (1.0, 8, (64, 64), 1),
            (15.9, 8, (64, 64), 1),
            (60.0, 1, (64, 24), 8),  # 16 does not divide 24
            (60.0, 1, (64, 63), 1),
        ],
    )
    def test_their_number_is_a_power_of_two_that_fits(self, effective, rank, shape, expected):
        assert ralora().blocks(effective, rank, shape) == ralora().blocks(effective, rank, shape[::-1]) == expected
        assert ralora(blocks_max=6).blocks(effective, rank, shape) == min(expected, 4)
        assert expected * rank <= max(effective, rank)

    @pytest.mark.parametrize("blocks", [1, 2, 4])
    def test_a_layer_computes_the_block_diagonal_and_its_gradients(self, blocks):
        """Against a dense product with everything outside the blocks set to 0."""
        training = method_training(ralora(rank=2), ("square",), module=Square)
        layer = training.adaptation.layers["square"]
        use_in_blocks(layer, blocks)
        B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        with torch.no_grad():
            B.normal_()
        x = torch.randn(5, 3, 8, dtype=torch.float64)
        dense = x @ (layer.scaling["default"] * (B @ A) * block_mask(12, 8, blocks)).T
        found = layer(x) - layer.get_base_layer()(x)
        torch.testing.assert_close(found, dense, rtol=0, atol=1e-12)
        wanted = torch.autograd.grad((dense**3).sum(), (B, A), retain_graph=True)
        for one, two in zip(torch.autograd.grad((found**3).sum(), (B, A)), wanted, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-9)

    @pytest.mark.parametrize("blocks", [1, 2, 4])
    def test_the_update_has_their_rank_and_a_plain_pair_makes_it(self, blocks):
        B, A = random_pair()
        left, right = whole_pair(B, A, blocks)
        update = left @ right
        torch.testing.assert_close(update, (B @ A) * block_mask(12, 8, blocks), rtol=0, atol=1e-14)
        assert torch.linalg.matrix_rank(update) == left.shape[1] == right.shape[0] == 2 * blocks

    @pytest.mark.parametrize("blocks", [1, 2, 4])
    def test_a_cut_is_the_best_approximation(self, blocks):
        B, A = random_pair()
        whole = ((B @ A) * block_mask(12, 8, blocks)).numpy()
        for rank in range(2 * blocks + 2):
            cut_B, cut_A = best_in_blocks(B, A, blocks, rank)
            assert (cut_B.shape, cut_A.shape) == (B.shape, A.shape)
            found = (cut_B @ cut_A * block_mask(12, 8, blocks)).numpy()
            np.testing.assert_allclose(found, truncated(whole, rank), rtol=0, atol=1e-12)


class Square(nn.Module):
    """Images (rows, 2, 6, 6), of which a layer sees eight numbers."""

    def __init__(self):
        super().__init__()
        self.square = nn.Linear(8, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, images):
        return self.head(torch.tanh(self.square(images.flatten(1)[:, :8])))


class TestStart:
    def test_blocks_come_from_the_effective_rank_of_the_mean_gradient(self):
        training = on_network()
        training.update()
        training.update()
        training.fetch()
        first, second = training.history
        gradients = mean_gradients(2, LAYERS)
        expected = [by_numpy(gradients[name]) for name in LAYERS]
        assert first["effective_rank"] == pytest.approx(expected, rel=1e-6)
        assert min(expected) > 2.1
        assert first["blocks"] == [2, 2]  # which divides 10, 36 and 8
        assert list(training.adaptation.ranks().values()) == first["ranks"] == [2, 2]
        assert first["rank"] == 4
        assert "blocks" not in second

    def test_parameters_are_those_of_lora_whatever_the_blocks(self):
        for most, rank in ((None, 2), (1, 1)):
            training = on_network(blocks_max=most)
            assert set(training.adaptation.ranks().values()) == {rank}
            assert training.adaptation.adapter_parameters() == (10 + 36) + (8 + 10)
            count = training.sizes.parameters()
            assert count.stored_bytes == 8 * (rank * count.adapter_final + count.head)
            assert count.adapter_initial == count.adapter_peak == count.adapter_final

    def test_a_is_that_of_a_lora_for_the_inputs_of_a_block(self):
        whole, blocks = on_network(blocks_max=1), on_network()
        for name, layer in blocks.adaptation.layers.items():
            A = layer.lora_A["default"].weight
            bound = 1 / math.sqrt(A.shape[1] / 2)
            assert 0.8 * bound < A.abs().max() <= bound
            other = whole.adaptation.layers[name].lora_A["default"].weight
            torch.testing.assert_close(A, math.sqrt(2) * other, rtol=0, atol=1e-14)

    def test_ranks_of_the_blocks_may_come_from_importance(self):
        settings = {"rank": 2, "allocation": "importance", "rank_max": 4}
        training = on_network(**settings)
        weights, gradients = weights_of(LAYERS), mean_gradients(2, LAYERS)
        importance = {name: float((weights[name] * gradients[name]).abs().mean()) for name in LAYERS}
        shapes = {name: tuple(weights[name].shape) for name in LAYERS}
        ranks = allocate(importance, shapes, 2, (1, 4), "sum")
        blocks = {n: ralora().blocks(by_numpy(gradients[n]), ranks[n], shapes[n]) for n in LAYERS}
        assert training.adaptation.ranks() == {name: ranks[name] * blocks[name] for name in LAYERS}
        assert len(set(ranks.values())) > 1
        assert training.adaptation.adapter_parameters() == sum(ranks[name] * sum(shapes[name]) for name in LAYERS)


def test_with_one_block_it_is_lora(tmp_path):
    """Bit for bit, on the batches that are left."""
    run = start(Subject("ralora[rank=4,blocks_max=1,batches=5]", tmp_path), batches=17)
    run.training.prepare()
    lora = start(Subject("lora[rank=4]", tmp_path), batches=12)
    for _ in range(5):
        lora.training.data.draw("all")
    for training in (run.training, lora.training):
        torch.manual_seed(1)
        training.run(lambda training: None)
    losses = [[row["loss"] for row in each.training.history] for each in (run, lora)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12


def test_blocks_stay_blocks_in_training():
    training = on_network()
    training.run(lambda training: None)
    for name, (B, A) in training.adaptation.scaled_pairs().items():
        layer, update = training.adaptation.layers[name], B @ A
        inputs = torch.eye(update.shape[1], dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close((layer(inputs) - layer.get_base_layer()(inputs)).T, update, rtol=0, atol=1e-12)
        assert not update[block_mask(*update.shape, 2) == 0].any()
        assert torch.linalg.matrix_rank(update) == 2


@pytest.mark.parametrize("settings", [{}, {"rank": 2, "allocation": "importance"}])
def test_a_state_from_before_the_first_update_is_exact(settings, tmp_path):
    whole, resumed = (method_training(ralora(**{"rank": 1, "batches": 2} | settings), LAYERS) for _ in range(2))
    whole.prepare()
    checkpoint.save(tmp_path, 2, whole.state_dict())
    resumed.load_state_dict(checkpoint.load_newest(tmp_path).state)
    for training in (whole, resumed):
        training.run(lambda training: None)
    assert whole.history == resumed.history
    assert whole.adaptation.ranks() == resumed.adaptation.ranks()
    for name, pair in whole.adaptation.scaled_pairs().items():
        assert all(map(torch.equal, pair, resumed.adaptation.scaled_pairs()[name]))


def test_an_export_is_a_stock_lora_of_the_updates_rank(tmp_path):
    run = start(Subject("ralora[rank=2,batches=3]", tmp_path))
    run.training.run(lambda training: None)
    assert max(run.adaptation.ranks().values()) > 2
    assert_export_is_stock_lora(run, tmp_path / "export")


def test_no_lora_of_these_ranks_has_its_parameters():
    assert ralora().peft_form({"a": 16}) is None


def test_a_dry_run_tells_what_the_start_costs():
    backbone = Backbone(nn.Sequential(nn.Linear(512, 256), nn.Linear(256, 24)), (), ("0", "1"))
    spent, ranks = ralora(rank=8, batches=5).notes(backbone, TrainSpec(batches=40), 100)
    assert spent.startswith("5 of 40 batches go before the first update, for the mean gradient of 2 layers")
    assert ranks == (
        "up to 32 blocks of rank 8 a layer then come from it: 16 to 272 components in 2 layers, at the 8,384 "
        "parameters of LoRA"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("batches=6", "batches = 6 before the first update leave none of the budget of 6 to train with"),
        ("rank=17,batches=1", "rank = 17 is above the smaller side of layer"),
        ("blocks_max=0", "ralora.blocks_max = 0 is not allowed"),
        ("rank_max=4", "rank_max = 4 needs allocation = importance"),
        ("rank=2,rank_min=3,allocation=importance", "rank = 2 is below rank_min = 3"),
        ("rank=2,rank_max=1,allocation=importance", "rank = 2 is above rank_max = 1"),
    ],
)
def test_bad_settings_are_one_line_and_nothing_is_written(settings, message, tmp_path, capsys):
    assert_refused(f"ralora[{settings}]", message, tmp_path, capsys, "--batches", "6")


def test_what_does_not_fit_a_backbone_is_a_reason():
    convolution = nn.Sequential(nn.Conv2d(4, 4, 3))
    told = ralora(rank=2).unsupported(Backbone(convolution, (), ("0",)))
    assert told == "ralora is for linear layers, and layer '0' is a convolution"
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    layers[1].weight = layers[0].weight
    assert "layers '0' and '1' share their weight" in ralora(rank=2).unsupported(Backbone(layers, (), ("0", "1")))
