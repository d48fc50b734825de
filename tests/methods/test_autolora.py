"""AutoLoRA: the rule for ranks, the upper level's gradient, LoRA as its limit and its end, counts, resume, export."""

import math

import numpy as np
import pytest
import torch

from harness.contracts import METHOD_CONTRACTS, Subject, start
from harness.contracts.subject import method_of
from harness.errors import InputError
from harness.method import Backbone
from harness.run import checkpoint
from harness.run.streams import TrainingData
from harness.spec import TrainSpec
from tests.support.network import KINDS, method_training
from tests.support.refusals import assert_refused
from tests.support.small_lora import assert_export_is_stock_lora
from tests.support.trained import trained

LAYERS, EACH = 12, 448  # of the synthetic task, whose one component of each layer has 448 numbers
ROWS = tuple(range(8))
FOUND = "rank=4,upper_learning_rate=0.1"  # a few steps bring the weights apart


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
def test_contracts(contract, tmp_path):
    """Some layers have no components left. The default form is tried with the other methods."""
    contract(Subject(f"autolora[{FOUND},search_fraction=0.4,components=5,rule=sum,upper_every=2]", tmp_path))


def update_until(training, batches):
    while training.used < batches:
        training.update()


class TestRule:
    def test_it_is_the_authors_of_either_search(self):
        generator = torch.Generator().manual_seed(0)
        differ = 0
        for _ in range(20):
            values = [1 + 0.5 * torch.randn(8, generator=generator) for _ in range(5)]
            by_softmax = [int((own.softmax(0) >= 1 / 8).sum()) for own in values]
            by_sum = [int((own / own.sum() >= 1 / 8).sum()) for own in values]
            assert method_of("autolora").kept(values) == by_softmax
            assert method_of("autolora[rule=sum]").kept(values) == by_sum
            differ += by_softmax != by_sum
        assert differ

    @pytest.mark.parametrize("rule", ["softmax", "sum"])
    def test_of_equal_weights_all_stay(self, rule):
        """A tie is not a matter of rounding, at any rank."""
        for rank in range(1, 40):
            values = [torch.full((rank,), 0.1 * rank), torch.full((rank,), math.pi)]
            assert method_of(f"autolora[rank={rank},rule={rule}]").kept(values) == [rank, rank]

    @pytest.mark.parametrize("rule", ["softmax", "sum"])
    def test_the_largest_weight_of_a_layer_always_stays(self, rule):
        """Also where the sum is below 0, by which a division would turn the rule round."""
        method = method_of(f"autolora[rank=4,rule={rule}]")
        values = torch.tensor([-1.0, 0.5, -1.0, -1.0])
        assert method.kept([values]) == [1]
        assert int(method.above_mean(values).argmax()) == 1

    @pytest.mark.parametrize("components", [1, 5, 9, 12])
    def test_a_total_keeps_the_largest_of_all_layers(self, components):
        values = [torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
        weights = sorted(((float(w), layer) for layer in range(3) for w in values[layer].softmax(0)), reverse=True)
        kept = [layer for _, layer in weights[:components]]
        found = method_of(f"autolora[rank=4,components={components}]").kept(values)
        assert found == [kept.count(layer) for layer in range(3)]


class TestSearch:
    def test_the_first_step_of_the_upper_level_is_against_the_derivative_through_the_update(self):
        """By autograd, on all kinds of layers: d_a f1(w') - 20 d_a (d_w f2(w') . v) with v = d_w f1(w')."""
        settings = "rank=2,learning_rate=0.05,search_fraction=0.9,unrolled_step=20"
        training = method_training(method_of(f"autolora[{settings}]"))
        training.update()
        adaptation, data = training.adaptation, TrainingData(24, 8, 0, upper_share=0.5)
        values = adaptation.values()
        found = [adaptation.upper.state[own]["exp_avg"] / (1 - 0.5) for own in values]
        with torch.no_grad():
            for own in values:
                own.zero_()
        data.draw("lower")
        weights = [p for p in adaptation.model.parameters() if p.requires_grad and not any(p is own for own in values)]

        def loss(batch):
            inputs = training.task.collate(training.encoded, batch, None)
            return training.task.loss(adaptation.model, inputs, None)

        f1 = loss(data.draw("upper"))
        *direct, _ = torch.autograd.grad(f1, [*values, weights[0]], retain_graph=True)
        v = torch.autograd.grad(f1, weights)
        of_f2 = torch.autograd.grad(loss(data.draw("lower")), weights, create_graph=True)
        mixed = torch.autograd.grad(sum((g * own).sum() for g, own in zip(of_f2, v, strict=True)), values)
        assert len(found) == len(KINDS)
        for own, first, second in zip(found, direct, mixed, strict=True):
            torch.testing.assert_close(own, first - 20 * second, rtol=2e-3, atol=1e-9)
            assert not torch.allclose(own, first, rtol=0.1)

    def test_the_lower_level_leaves_the_values_alone(self, tmp_path):
        training = start(Subject(f"autolora[{FOUND},upper_every=3]", tmp_path)).training
        values = training.adaptation.values()
        for _ in range(2):  # of the first, whose B is 0, the values have no gradient
            training.update()
        assert all(torch.equal(own, torch.zeros(4)) for own in values)
        training.update()
        assert all(own.abs().min() > 0 for own in values)

    def test_what_it_takes_of_the_budget(self, tmp_path):
        """Rounds of an update and three batches; what is left of the share are updates."""
        training = start(Subject(f"autolora[{FOUND},search_fraction=0.6]", tmp_path), batches=24).training
        update_until(training, 15)
        training.fetch()
        assert [row["batches"] for row in training.history] == [4, 8, 12, 13, 14, 15]
        assert ["upper_loss" in row for row in training.history] == [True, True, True, False, False, False]
        assert training.data.drawn == {"all": 0, "lower": 9, "upper": 3}
        first = start(Subject(f"autolora[{FOUND},search_fraction=0.6,unrolled_step=0]", tmp_path)).training
        update_until(first, 15)
        assert first.data.drawn == {"all": 0, "lower": 8, "upper": 7}

    def test_the_levels_have_rows_of_their_own(self, tmp_path):
        data = start(Subject("autolora[rank=4]", tmp_path)).training.data
        size = data.size
        lower, upper = ({row for _ in range(size // 4) for row in data.draw(stream)} for stream in ("lower", "upper"))
        assert not lower & upper
        assert (len(lower), len(upper)) == (size - round(0.3 * size), round(0.3 * size))

    def test_with_weights_that_stay_it_is_a_lora_at_a_scale_over_the_rank(self, tmp_path):
        losses = []
        for name in ("autolora[rank=4,upper_learning_rate=0,search_fraction=0.9]", "lora[rank=4,alpha=4]"):
            started = start(Subject(name, tmp_path))
            started.adaptation.model.eval()  # without dropout, of which the upper level draws as well
            started.training.data.draw = lambda stream: ROWS
            for _ in range(5):
                started.training.update()
            started.training.fetch()
            losses.append([row["loss"] for row in started.training.history])
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


class TestEnd:
    def test_it_is_a_lora_from_the_start_bit_for_bit(self, tmp_path):
        """Where all weights stay equal all components do, and the rest of the budget is a LoRA's whole run."""
        ours = start(Subject("autolora[rank=4,upper_learning_rate=0]", tmp_path), batches=24)
        update_until(ours.training, 12)
        lora = start(Subject("lora[rank=4]", tmp_path), batches=12)
        for started in (ours, lora):
            torch.manual_seed(1)
            started.training.run(lambda training: None)
        assert [row["loss"] for row in ours.training.history[-12:]] == [row["loss"] for row in lora.training.history]
        found = ours.adaptation.model.state_dict()
        assert all(torch.equal(value, found[name]) for name, value in lora.adaptation.model.state_dict().items())
        assert found.keys() == lora.adaptation.model.state_dict().keys()

    @pytest.mark.parametrize("settings", ["", ",rule=sum", ",components=7"])
    def test_it_begins_anew_with_the_first_components(self, settings, tmp_path):
        started = start(Subject(f"autolora[{FOUND}{settings}]", tmp_path))
        adaptation, training = started.adaptation, started.training
        before = {name: p.detach().clone() for name, p in adaptation.model.named_parameters() if p.requires_grad}
        update_until(training, 12)
        ranks = adaptation.ranks()
        training.fetch()
        assert list(ranks.values()) == [row["found"] for row in training.history if "found" in row][-1]
        assert len(set(ranks.values())) > 1
        assert training.history[-1]["rank"] == sum(ranks.values())
        assert settings != ",components=7" or (sum(ranks.values()), min(ranks.values())) == (7, 0)
        for name, layer in adaptation.layers.items():
            for factor in ("lora_A", "lora_B"):
                whole = before[f"base_model.model.{name}.{factor}.default.weight"]
                kept = whole[: ranks[name]] if factor == "lora_A" else whole[:, : ranks[name]]
                assert torch.equal(getattr(layer, factor)["default"].weight, kept)
        heads = [(name, p) for name, p in adaptation.model.named_parameters() if "modules_to_save" in name]
        assert heads
        assert all(torch.equal(p, before[name]) for name, p in heads)
        assert not adaptation.optimizer.state
        training.update()
        assert {int(state["step"]) for state in adaptation.optimizer.state.values()} == {1}

    def test_the_schedule_begins_anew(self, tmp_path):
        started = start(Subject("autolora[rank=4]", tmp_path))
        started.training.train = started.training.train.model_copy(update={"schedule": "linear"})
        started.training.run(lambda training: None)
        factors = [row["learning_rate_factor"] for row in started.training.history]
        assert factors[:3] == pytest.approx([1, 20 / 24, 16 / 24])
        assert factors[3:] == pytest.approx([left / 12 for left in range(12, 0, -1)])

    def test_sizes_over_the_run(self, tmp_path):
        started = trained(f"autolora[{FOUND}]", tmp_path)
        ranks, shapes = started.adaptation.ranks(), started.before.shape
        final = sum(rank * sum(shapes(name)) for name, rank in ranks.items())
        sizes = [(size.batches, size.adapter_parameters, size.rank) for size in started.training.sizes.trajectory]
        assert sizes == [(0, 4 * (EACH + LAYERS), 4 * LAYERS), (12, final, sum(ranks.values()))]
        count = started.training.sizes.parameters()
        assert (count.adapter_initial, count.adapter_peak, count.adapter_final) == (sizes[0][1], sizes[0][1], final)

    @pytest.mark.parametrize("settings", ["", ",components=5"])
    def test_an_export_is_a_stock_lora_at_these_ranks(self, settings, tmp_path):
        assert_export_is_stock_lora(trained(f"autolora[{FOUND}{settings}]", tmp_path), tmp_path / "export")

    def test_a_threshold_that_leaves_one_component_trains_and_resumes(self, tmp_path):
        """On a convolution, a linear and a transposed layer, two of which are left without."""
        method = method_of("autolora[rank=2,components=1,upper_learning_rate=0.1,search_fraction=0.4]")
        whole, resumed = method_training(method), method_training(method)
        update_until(whole, 9)
        checkpoint.save(tmp_path, 9, whole.state_dict())
        resumed.load_state_dict(checkpoint.load_newest(tmp_path).state)
        for training in (whole, resumed):
            training.run(lambda training: None)
        assert sorted(whole.adaptation.ranks().values()) == [0, 0, 1]
        assert resumed.history == whole.history
        with torch.no_grad():
            images = whole.encoded.inputs["images"]
            assert torch.equal(whole.adaptation.model(images), resumed.adaptation.model(images))

    def test_advice_is_the_lora_that_it_ends_with(self):
        form = method_of("autolora[rank=4,alpha=8]").peft_form({"a": 2, "b": 4, "c": 0})
        assert form.parameters["rank_pattern"] == {"a": 2, "c": 0}
        assert form.config["lora_alpha"] / form.config["r"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("rank=17", "rank = 17 is above the smaller side of layer"),
        ("rank=2,components=25", "components = 25 is above the 24 that there are"),
        ("components=0", "autolora.components = 0 is not allowed"),
        ("held_out=1", "autolora.held_out = 1"),
        ("rule=max", "autolora.rule = 'max' is not allowed: it should be 'softmax' or 'sum'"),
        ("upper_every=0", "autolora.upper_every = 0 is not allowed"),
        (
            "search_fraction=0.3",
            "search_fraction = 0.3 does not fit into 9 batches, with 4 before the end of that share and 1 after it: it "
            "takes at least 11",
        ),
        ("search_fraction=0.95", "it takes at least 20"),
        ("upper_every=5", "search_fraction = 0.5 does not fit into 9 batches, with 8 before the end of that share"),
        ("held_out=0.001", "each level needs at least 2"),
    ],
)
def test_bad_settings_are_one_line(settings, message, tmp_path, capsys):
    assert_refused(f"autolora[{settings}]", message, tmp_path, capsys, "--batches", "9")


def test_one_row_of_a_level_is_one_line(tmp_path, capsys):
    message = "held_out = 0.3 of 3 training rows leaves 2 and 1: each level needs at least 2"
    assert_refused("autolora[rank=4]", message, tmp_path, capsys, "--batches", "9", "--limit", "4")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_the_least_budget_that_is_named_does(share):
    method = method_of(f"autolora[rank=4,search_fraction={share}]")
    with pytest.raises(InputError, match="takes at least") as raised:
        method.end_of("search_fraction", 4)
    least = int(str(raised.value).split()[-1])
    assert 4 <= method.end_of("search_fraction", least) < least
    with pytest.raises(InputError):
        method.end_of("search_fraction", least - 1)


def test_a_dry_run_tells_what_the_search_spends():
    backbone = Backbone(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)), (), ("0", "1"))
    assert method_of("autolora").notes(backbone, TrainSpec(batches=30), 100) == [
        "3 steps of the upper level, 3 batches each, in the first 15 of 30 batches, 6 of which are updates",
        "then a LoRA with 2 to 16 of 16 components begins anew, for 15 batches",
    ]
    assert "with 5 of 16 components" in method_of("autolora[components=5]").notes(backbone, TrainSpec(batches=30), 9)[1]


def test_singular_values_are_those_of_the_export(tmp_path):
    training = method_training(method_of("autolora[rank=2,upper_learning_rate=0.1]"), ("linear",))
    training.run(lambda training: None)
    training.adaptation.export(tmp_path)
    ((name, (B, A)),) = training.adaptation.scaled_pairs().items()
    values = method_of("autolora").singular_values(tmp_path)[name]
    np.testing.assert_allclose(values, torch.linalg.svdvals(B @ A)[: len(A)].numpy(), atol=1e-10)
