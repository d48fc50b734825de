"""SaRA: which weights train, full fine-tuning as its limit, the nuclear norm, re-selection, exact resume, export."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from harness import registry
from harness.contracts import METHOD_CONTRACTS, Subject, start
from harness.errors import Diverged, InputError
from harness.method import Adaptation, Backbone
from harness.run import checkpoint
from harness.spec import TrainSpec
from methods.sara import load
from methods.shared.sparse_weights import nuclear_norm, smallest
from tests.support.network import KINDS, Network, layers_of, method_training, weights_of
from tests.support.refusals import assert_refused, least_that_does

SETTINGS = "parameters=700,learning_rate=2e-2,reselect_at=5,penalised=update,low_rank=1e-2,weight_decay=0.1"


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
def test_contracts(contract, tmp_path):
    """With other settings than those that every method is tried with."""
    contract(Subject(f"sara[{SETTINGS}]", tmp_path, batches=9))


def sara(**settings):
    return registry.make_method("sara", settings)


def on_network(**settings):
    """A run on a convolution and linear layers, one transposed, in float64."""
    return method_training(sara(**{"learning_rate": 2e-2} | settings))


def in_effect(training):
    """The weight that each layer uses now, as it is stored."""
    return {name: layer.weight.detach().clone() for name, layer in layers_of(training).items()}


def moved(training, before):
    return {name: now != before[name] for name, now in in_effect(training).items()}


def all_magnitudes():
    return np.sort(np.concatenate([weight.abs().flatten().numpy() for weight in weights_of().values()]))


class TestChoice:
    def test_the_smallest_of_all_layers_train_and_no_other_entry_moves(self):
        training = on_network(parameters=123)
        before = in_effect(training)
        limit = all_magnitudes()[123]
        training.run(lambda training: None)
        for name, changed in moved(training, before).items():
            assert torch.equal(changed, before[name].abs() < limit), name
        assert training.adaptation.adapter_parameters() == 123

    @pytest.mark.parametrize(
        ("settings", "number"),
        [
            ({"share": 0.25}, 128),  # of 4 * 2 * 9 + 36 * 10 + 10 * 8 = 512
            ({"parameters": 1}, 1),
            ({"parameters": 512}, 512),
            ({"threshold": 0.05}, int((all_magnitudes() < 0.05).sum())),
        ],
    )
    def test_how_many(self, settings, number):
        training = on_network(**settings)
        count = training.sizes.parameters()
        assert count.adapter_initial == count.adapter_final == number
        assert count.total == sum(p.numel() for p in Network().parameters())
        assert count.stored_bytes == 8 * count.head + (8 + 4) * number
        training.update()
        assert training.adaptation.optimizer_bytes() < 2 * 8 * (number + count.head) + 200

    def test_equal_magnitudes_are_taken_in_order(self):
        weights = {"a": torch.tensor([[1.0, -2.0], [2.0, 0.5]]), "b": torch.tensor([2.0, 3.0])}
        for number, places, limit in ((2, ([0, 3], []), 2), (3, ([0, 1, 3], []), 2), (5, ([0, 1, 2, 3], [0]), 3)):
            chosen, found = smallest(weights, number)
            assert tuple(own.tolist() for own in chosen.values()) == places
            assert found == limit
        assert smallest(weights, 6)[1] == float("inf")

    def test_the_start_keeps_every_sign(self):
        """The authors' optimizer starts from magnitudes."""
        weights = weights_of()
        for name, weight in in_effect(on_network(share=1.0)).items():
            assert torch.equal(weight.T if name == "transposed" else weight.flatten(1), weights[name])
            assert (weight < 0).any()


class TestLimits:
    @pytest.mark.parametrize("decay", [0.0, 0.3])
    def test_with_all_weights_it_is_full_fine_tuning_of_the_layers(self, decay):
        run = on_network(share=1.0, low_rank=0.0, reselect_at=0, weight_decay=decay)
        before = in_effect(run)
        full = method_training(LayersAlone(learning_rate=2e-2, weight_decay=decay))
        for training in (run, full):
            training.run(lambda training: None)
        losses = [[row["loss"] for row in each.history] for each in (run, full)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        for name, weight in in_effect(run).items():
            assert (weight - before[name]).abs().max() > 0.05
            torch.testing.assert_close(weight, in_effect(full)[name], rtol=0, atol=1e-9)


class LayersAlone(registry.method_class("head")):
    """The layers' weights and the head, whole."""

    def start(self, backbone, train, data, rng):
        for name in KINDS:
            backbone.module.get_submodule(name).weight.requires_grad_(True)
        own = {f"{name}.weight" for name in KINDS} | {name for name, _ in backbone.head_parameters()}
        for name, parameter in backbone.module.named_parameters():
            parameter.requires_grad_(name in own)
        groups = [p for p in backbone.module.parameters() if p.requires_grad]
        matrices = {"params": [p for p in groups if p.dim() > 1], "weight_decay": self.weight_decay}
        vectors = {"params": [p for p in groups if p.dim() == 1], "weight_decay": 0.0}
        return Adaptation(
            backbone.module, torch.optim.AdamW([matrices, vectors], lr=self.learning_rate, fused=True), backbone
        )


class TestNuclearNorm:
    @pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
    def test_value_and_gradient_are_those_of_an_svd(self, shape):
        matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        matrix.requires_grad_(True)
        (found,) = torch.autograd.grad(nuclear_norm(matrix), matrix)
        (wanted,) = torch.autograd.grad(torch.linalg.svdvals(matrix).sum(), matrix)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
        sigma = np.linalg.svd(matrix.detach().numpy(), compute_uv=False)
        assert float(nuclear_norm(matrix).detach()) == pytest.approx(sigma.sum(), rel=1e-12)

    def test_of_a_lower_rank_the_gradient_has_that_rank(self):
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.randn(6, 2, generator=generator, dtype=torch.float64) for _ in range(2))
        for matrix, rank in ((left @ right.T, 2), (torch.zeros(4, 3), 0)):
            matrix.requires_grad_(True)
            nuclear_norm(matrix).backward()
            assert torch.linalg.matrix_rank(matrix.grad) == rank

    @pytest.mark.parametrize("penalised", ["weights", "update"])
    def test_the_penalty_reaches_what_trains_in_one_layer(self, penalised):
        """The layer is drawn in every update; its gradient is that of the dense matrix, in the places that train."""
        training = on_network(share=0.4, low_rank=0.5, penalised=penalised)
        start, seen = in_effect(training), set()
        for _ in range(8):
            training.update()
            penalty = training.adaptation.penalty()
            values = {name: p for name, p in training.adaptation.model.named_parameters() if name.endswith("values")}
            found = torch.autograd.grad(penalty, list(values.values()), allow_unused=True)
            (drawn,) = [i for i, gradient in enumerate(found) if gradient is not None]
            name = KINDS[drawn]
            weight, places = in_effect(training)[name], training.adaptation.parts[name].places
            dense = torch.zeros_like(weight).flatten()
            dense[places] = (weight - start[name] * (penalised == "update")).flatten()[places]
            matrix = dense.view(weight.shape).flatten(1).numpy()
            U, sigma, Vh = np.linalg.svd(matrix, full_matrices=False)
            assert float(penalty.detach()) == pytest.approx(0.5 * sigma.sum(), rel=1e-9)
            rank = np.linalg.matrix_rank(matrix)
            wanted = torch.from_numpy(0.5 * U[:, :rank] @ Vh[:rank]).flatten()[places]
            torch.testing.assert_close(found[drawn], wanted, rtol=0, atol=1e-6)
            seen.add(name)
        assert seen == set(KINDS)

    def test_it_lowers_the_norm(self):
        sums = []
        for weight in (0.0, 1.0):
            training = on_network(share=0.5, low_rank=weight, reselect_at=0)
            training.run(lambda training: None)
            parts, layers = training.adaptation.parts, layers_of(training)
            sums.append(sum(float(nuclear_norm(p.trained_alone(layers[n])).detach()) for n, p in parts.items()))
        assert sums[1] < 0.9 * sums[0]

    def test_weights_that_are_no_longer_finite_are_a_divergence(self):
        """Of which the loss is told later, every ten updates: an SVD would fail first."""
        training = on_network(share=1.0, low_rank=0.5)
        with torch.no_grad():
            for part in training.adaptation.parts.values():
                part.values.fill_(float("nan"))
        with pytest.raises(Diverged, match="weights in training are not finite"):
            training.run(lambda training: None)


class TestReselection:
    def test_what_has_grown_keeps_its_value_and_the_rest_trains_on(self):
        training = on_network(parameters=200, reselect_at=4)
        limit, start = all_magnitudes()[200], in_effect(training)
        for _ in range(4):
            training.update()
        settled = in_effect(training)
        training.run(lambda training: None)
        training.fetch()
        small = 0
        for name, changed in moved(training, settled).items():
            trains = (start[name].abs() < limit) & (settled[name].abs() < limit)
            assert torch.equal(changed, trains), name
            small += int(trains.sum())
        assert 20 < small < 180
        assert {row["update"]: row["trained"] for row in training.history if "trained" in row} == {0: 200, 3: small}
        assert training.adaptation.adapter_parameters() == 200

    def test_moments_go_on(self):
        one, other = on_network(parameters=200, reselect_at=4), on_network(parameters=200, reselect_at=0)
        for training in (one, other):
            for _ in range(4):
                training.update()
        for name, part in one.adaptation.parts.items():
            whole = other.adaptation.parts[name]
            stays = torch.isin(whole.places, part.places)
            for key in ("exp_avg", "exp_avg_sq"):
                kept = one.adaptation.optimizer.state[part.values][key]
                assert torch.equal(kept, other.adaptation.optimizer.state[whole.values][key][stays])

    def test_all_may_have_grown(self, tmp_path):
        """Nothing is left to train but the head: the run goes on, and its export is whole."""
        training = on_network(parameters=3, learning_rate=0.5, low_rank=1.0, reselect_at=2)
        training.run(lambda training: None)
        assert [len(part.values) for part in training.adaptation.parts.values()] == [0] * len(training.adaptation.parts)
        assert training.adaptation.adapter_parameters() == 3
        assert_loads_the_same(training, tmp_path)

    @pytest.mark.parametrize("stop", [1, 4, 5, 9])
    def test_a_resume_is_exact_on_both_sides_of_it(self, stop, tmp_path):
        settings = {"parameters": 200, "reselect_at": 4, "penalised": "update", "low_rank": 0.1}
        whole, first, resumed = (on_network(**settings) for _ in range(3))
        for _ in range(stop):
            first.update()
        checkpoint.save(tmp_path, stop, first.state_dict())
        resumed.load_state_dict(checkpoint.load_newest(tmp_path).state)
        for training in (whole, resumed):
            training.run(lambda training: None)
        assert whole.history == resumed.history
        for name, weight in in_effect(whole).items():
            assert torch.equal(weight, in_effect(resumed)[name])


def assert_loads_the_same(training, folder):
    training.adaptation.export(folder)
    torch.manual_seed(0)
    fresh = Network().eval().double()  # as the run began
    load(fresh, folder)
    images = training.encoded.inputs["images"]
    with torch.no_grad():
        assert torch.equal(fresh(images), training.adaptation.model(images))


class TestExport:
    def test_a_plain_model_gives_the_same_outputs(self, tmp_path):
        training = on_network(parameters=200, reselect_at=4)
        training.run(lambda training: None)
        assert_loads_the_same(training, tmp_path)
        kept = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
        assert training.adaptation.stored_bytes() < kept < training.adaptation.stored_bytes() + 1000

    def test_in_a_fresh_process(self, tmp_path):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 4))
        method = sara(share=0.5)
        run = method.start(Backbone(model, ("2",), ("0",)), None, None, torch.Generator())
        with torch.no_grad():
            for parameter in run.optimizer.param_groups[0]["params"] + [model[2].weight]:
                parameter.normal_()
            wanted = model(torch.ones(9)).tolist()
        run.export(tmp_path)
        code = (
            "import sys, torch; from pathlib import Path; from torch import nn; from methods.sara import load\n"
            "torch.manual_seed(0); model = nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 4))\n"
            "load(model, Path(sys.argv[1])); print(model(torch.ones(9)).tolist())"
        )
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
        assert done.stdout.strip() == str(wanted)

    @pytest.mark.parametrize("file", ["trained.safetensors", "sara.json"])
    def test_no_flipped_bit_is_loaded(self, file, tmp_path):
        on_network(parameters=9).adaptation.export(tmp_path)
        whole = (tmp_path / file).read_bytes()
        for bit in range(0, 8 * len(whole), 8 * len(whole) // 23):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            (tmp_path / file).write_bytes(flipped)
            with pytest.raises(InputError, match="no exported sara adapter that can be read") as error:
                load(Network().double(), tmp_path)
            assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda model: setattr(model, "linear", nn.Identity()), "it has no layer 'linear'"),
            (lambda model: setattr(model, "linear", nn.Linear(3, 10)), r"'linear.weight' is \(10, 3\) there"),
            (lambda model: setattr(model, "linear", nn.Linear(36, 20)), r"'linear.weight' is \(20, 36\) there"),
            (lambda model: setattr(model, "head", nn.Linear(8, 2)), r"'head.bias' is \(2,\) there and \(3,\) here"),
        ],
    )
    def test_another_model_is_told(self, change, reason, tmp_path):
        on_network(share=1.0).adaptation.export(tmp_path)
        model = Network().double()
        change(model)
        with pytest.raises(InputError, match=f"does not fit the model: {reason}"):
            load(model, tmp_path)

    def test_there_is_no_lora_in_it(self):
        assert sara().peft_form({}) is None
        assert on_network().adaptation.ranks() == {}


def test_a_dry_run_tells_what_trains():
    backbone = Backbone(nn.Sequential(nn.Linear(50, 20), nn.Linear(20, 5)), (), ("0", "1"))
    (told,) = sara().notes(backbone, TrainSpec(batches=40), 100)
    assert told == (
        "110 of 1,100 weights in 2 layers train, the smallest; after update 20 of 40 those that have grown stop"
    )
    (told,) = sara(threshold=2e-3, reselect_at=0).notes(backbone, TrainSpec(batches=40), 100)
    assert told.startswith("weights below 0.002 train, at most the 1,100 in 2 layers")


def test_the_least_budget_is_named():
    backbone = Backbone(nn.Sequential(nn.Linear(5, 2)), (), ("0",))
    method = sara(reselect_at=7)
    assert least_that_does(lambda batches: method.notes(backbone, TrainSpec(batches=batches), 100)) == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("parameters=3,threshold=0.1", "parameters = 3 sets what trains, and so does threshold: give one"),
        ("share=0.5,parameters=3", "parameters = 3 sets what trains, and so does share: give one"),
        ("share=1.5", "sara.share = 1.5 is not allowed"),
        ("threshold=0", "sara.threshold = 0 is not allowed"),
        ("parameters=99999999", "parameters = 99999999 is above the"),
        ("reselect_at=2.5", "reselect_at = 2.5 should be a share of the updates below 1, or a whole number of them"),
        ("reselect_at=6", "reselect_at = 6 does not fit into 6 batches: it takes at least 7"),
        ("penalised=rank", "sara.penalised = 'rank' is not allowed"),
        ("rank=3", "rank"),
    ],
)
def test_bad_settings_are_one_line_and_nothing_is_written(settings, message, tmp_path, capsys):
    assert_refused(f"sara[{settings}]", message, tmp_path, capsys, "--batches", "6")


def test_with_a_threshold_that_no_weight_is_below_the_head_alone_trains(tmp_path):
    training, head = on_network(threshold=1e-12, reselect_at=4), method_training(registry.make_method("head", {}))
    start, of_head = in_effect(training), head.sizes.parameters()
    training.run(lambda training: None)
    assert training.sizes.parameters() == of_head
    assert training.adaptation.remarks() == ["no weight is below the threshold: at most the head has trained"]
    assert on_network(share=1e-9).adaptation.remarks() == []
    assert not any(changed.any() for changed in moved(training, start).values())
    assert training.adaptation.model.head.weight.ne(head.adaptation.model.head.weight).any()
    assert_loads_the_same(training, tmp_path / "export")
    checkpoint.save(tmp_path / "state", 12, training.state_dict())
    on_network(threshold=1e-12, reselect_at=4).load_state_dict(checkpoint.load_newest(tmp_path / "state").state)


def test_a_weight_of_two_layers_is_a_reason():
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    layers[1].weight = layers[0].weight
    assert "layers '0' and '1' share their weight" in sara().unsupported(Backbone(layers, (), ("0", "1")))


def test_a_layer_in_bfloat16_trains_in_float32(tmp_path):
    run = start(Subject("sara[share=0.2]", tmp_path, backbone_dtype="bf16"), batches=3)
    run.training.run(lambda training: None)
    assert {part.values.dtype for part in run.adaptation.parts.values()} == {torch.float32}
    assert {layer.weight.dtype for layer in run.adaptation.layers.values()} == {torch.bfloat16}
