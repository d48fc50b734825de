"""DiffoRA's style: gates on modules, the choice of the largest, LoRA as its limit and its end, exact resume, export."""

import pytest
import torch
from torch import nn

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

ROWS = tuple(range(8))
FOUND = "rank=2,upper_learning_rate=0.1"  # a few steps bring the gates apart
CONTRACTS = [  # the others see nothing of how gates are trained; the default is tried with the other methods
    contract
    for contract in METHOD_CONTRACTS
    if contract.__name__ in ("the_budget_is_used_exactly", "the_history_holds_what_is_declared", "counts_are_right")
]


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.__name__)
def test_contracts_with_joint_gates(contract, tmp_path):
    contract(Subject(f"diffora[{FOUND},gates=joint,weights=kept,components=6]", tmp_path))


def run_of(settings, batches=12, layers=KINDS):
    """On a convolution, a linear and a transposed layer, in float64 and without dropout."""
    return method_training(method_of(f"diffora[{settings}]"), layers, batches)


def update_until(training, batches):
    while training.used < batches:
        training.update()
    training.fetch()
    return training


def losses(training):
    return [row["loss"] for row in training.history]


def gates(training):
    """Of the last step of the gates."""
    return [row["gates"] for row in training.history if "gates" in row][-1]


class TestGates:
    def gradients(self, training):
        """Of the first step that had one: Adam's first average with a beta of 0.5."""
        return [2 * training.adaptation.upper.state[own]["exp_avg"] for own in training.adaptation.values()]

    def loss(self, training, batch):
        inputs = training.task.collate(training.encoded, batch, None)
        return training.task.loss(training.adaptation.model, inputs, None)

    def test_the_first_step_is_against_the_derivative_through_the_update(self):
        """By autograd: d_a f1(w') - 20 d_a (d_w f2(w') . v) with v = d_w f1(w'). Ours is a difference over 0.01."""
        training = run_of("rank=2,learning_rate=0.05,search_fraction=0.9,unrolled_step=20")
        training.update()
        found, data, values = self.gradients(training), TrainingData(24, 8, 0), training.adaptation.values()
        with torch.no_grad():
            for own in values:
                own.zero_()
        data.draw("lower")
        trained = [p for p in training.adaptation.model.parameters() if p.requires_grad]
        weights = [p for p in trained if not any(p is own for own in values)]
        f1 = self.loss(training, data.draw("upper"))
        direct = torch.autograd.grad(f1, values, retain_graph=True)
        v = torch.autograd.grad(f1, weights)
        of_f2 = torch.autograd.grad(self.loss(training, data.draw("lower")), weights, create_graph=True)
        mixed = torch.autograd.grad(sum((g * own).sum() for g, own in zip(of_f2, v, strict=True)), values)
        for own, first, second in zip(found, direct, mixed, strict=True):
            torch.testing.assert_close(own, first - 20 * second, rtol=5e-3, atol=1e-9)
            assert not torch.allclose(own, first, rtol=0.1)

    def test_joint_ones_follow_the_batch_of_the_update(self):
        """The first update has none, since B = 0."""
        training, data = run_of("rank=2,gates=joint,learning_rate=0.05"), TrainingData(24, 8, 0)
        training.update()
        values = training.adaptation.values()
        assert all(torch.equal(own, torch.zeros_like(own)) for own in values)
        data.draw("all")
        expected = torch.autograd.grad(self.loss(training, data.draw("all")), values)
        training.update()
        for own, gradient in zip(self.gradients(training), expected, strict=True):
            torch.testing.assert_close(own, gradient, rtol=1e-9, atol=0)
            assert gradient.abs() > 0
        assert training.data.drawn == {"all": 2, "lower": 0, "upper": 0}

    def test_one_gate_multiplies_a_module_s_whole_update(self):
        training = update_until(run_of("rank=2,learning_rate=0.05,upper_learning_rate=0.5"), 4)
        adaptation = training.adaptation
        layer = adaptation.layers["linear"]
        B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        (value,) = [own for own, name in zip(adaptation.values(), adaptation.targets, strict=True) if name == "linear"]
        x = torch.randn(5, 36, dtype=torch.float64)
        with torch.no_grad():
            update = layer(x) - layer.base_layer(x)
            torch.testing.assert_close(update, torch.sigmoid(value) * 8 * x @ A.T @ B.T, rtol=1e-9, atol=1e-12)
        assert value.shape == (1,)
        assert value.item() != 0
        pair = adaptation.scaled_pairs()["linear"]
        torch.testing.assert_close(x @ (pair[0] @ pair[1]).T, update, rtol=1e-9, atol=1e-12)

    def test_a_module_without_inputs_keeps_its_gate_and_goes_first(self):
        training = run_of(
            "rank=2,gates=joint,learning_rate=0.02,upper_learning_rate=0.05,keep=0.75", 12, (*KINDS, "unused")
        )
        update_until(training, 6)
        assert gates(training)[3] == 0.5
        assert min(gates(training)[:3]) > 0.5
        assert training.adaptation.ranks() == dict.fromkeys(KINDS, 2) | {"unused": 0}


class TestMechanism:
    """What the method is named for changes what comes out."""

    def searched(self, settings):
        started = start(Subject(f"diffora[{settings}]", None), batches=48)
        return update_until(started.training, 36)

    def test_gates_choose_otherwise_than_none_and_two_levels_otherwise_than_one(self):
        shared = "rank=4,search_fraction=0.75,learning_rate=5e-3,keep=0.25"
        trained, joint, none = (
            self.searched(f"{shared},{more}")
            for more in (
                "upper_learning_rate=0.05",
                "upper_learning_rate=0.05,gates=joint",
                "upper_learning_rate=0",
            )
        )
        ranks = [run.adaptation.ranks() for run in (trained, joint, none)]
        assert [sum(own.values()) for own in ranks] == [12, 12, 12]
        assert list(ranks[2].values()) == 3 * [4] + 9 * [0]  # of equals the first
        assert len(set(map(str, ranks))) == 3
        for run, own in ((trained, ranks[0]), (joint, ranks[1])):
            order = sorted(range(12), key=lambda place: -gates(run)[place])
            assert {place for place, rank in enumerate(own.values()) if rank} == set(order[:3])


class TestEnd:
    @pytest.mark.parametrize("more", ["", ",gates=joint"])
    def test_all_modules_are_a_lora_bit_for_bit(self, more):
        """The rest of the budget is a LoRA's whole run. Joint gates have drawn its first batches already."""
        ours = run_of(f"{FOUND},keep=1{more}")
        update_until(ours, 6)
        lora = method_training(method_of("lora[rank=2]"), KINDS, 6)
        for _ in range(ours.data.drawn["all"]):
            lora.data.draw("all")
        for training in (ours, lora):
            training.run(lambda training: None)
        assert losses(ours)[-6:] == losses(lora)
        found, expected = ours.adaptation.model.state_dict(), lora.adaptation.model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, found[name]) for name, value in expected.items())

    @pytest.mark.parametrize("weights", ["anew", "kept"])
    def test_a_choice_is_a_lora_in_these_modules_bit_for_bit(self, weights):
        ours = update_until(run_of(f"{FOUND},keep=0.3,weights={weights}"), 6)
        ranks = ours.adaptation.ranks()
        assert sorted(ranks.values()) == [0, 0, 2]
        pattern = ",".join(f'"{name}"={rank}' for name, rank in ranks.items())
        lora = method_training(method_of(f"lora[rank=2,rank_pattern={{{pattern}}}]"), KINDS, 6)
        found = ours.adaptation.model.state_dict()
        with torch.no_grad():
            for name, value in lora.adaptation.model.state_dict().items():
                value.copy_(found.get(name, found.get(name.replace(".weight", ".base_layer.weight"), value)))
        for training in (ours, lora):
            training.run(lambda training: None)
        assert losses(ours)[-6:] == losses(lora)

    def test_what_is_kept_computes_what_it_did(self):
        """Of all modules, with the gates in B; without, it begins with the backbone."""
        images = run_of(FOUND).encoded.inputs["images"]
        kept, anew = (run_of(f"{FOUND},keep=1,gates=joint,weights={weights}") for weights in ("kept", "anew"))
        update_until(kept, 5)
        update_until(anew, 6)
        before = kept.adaptation.scaled_pairs()
        kept.adaptation.search_step = lambda step, end: {}
        kept.adaptation.optimizer.param_groups[0]["initial_lr"] = 0.0
        kept.update()
        assert not kept.adaptation.searching
        for name, (B, A) in kept.adaptation.scaled_pairs().items():
            torch.testing.assert_close(B, before[name][0], rtol=1e-12, atol=0)
            assert torch.equal(A, before[name][1])
        with torch.no_grad():
            start_of = method_training(method_of("lora[rank=2]"), KINDS, 6).adaptation.model(images)
            assert torch.equal(anew.adaptation.model(images), start_of)

    def test_gates_that_stay_search_with_half_of_the_scale(self):
        found = []
        for name in (
            "diffora[rank=2,upper_learning_rate=0,search_fraction=0.9,unrolled_step=0]",
            "lora[rank=2,alpha=8]",
        ):
            training = method_training(method_of(name))
            training.data.draw = lambda stream: ROWS
            for _ in range(5):
                training.update()
            training.fetch()
            found.append(losses(training))
        assert found[0] == pytest.approx(found[1], rel=1e-12)

    @pytest.mark.parametrize("settings", ["gates=joint,weights=kept", "weights=kept", "keep=0.3"])
    def test_a_resume_is_exact_at_every_update(self, settings, tmp_path):
        whole = run_of(f"{FOUND},{settings},dropout=0.1")
        whole.run(lambda training: None)
        resumed = run_of(f"{FOUND},{settings},dropout=0.1")
        while resumed.used < 12:
            resumed.update()
            checkpoint.save(tmp_path, resumed.used, resumed.state_dict())
            resumed = run_of(f"{FOUND},{settings},dropout=0.1")
            resumed.load_state_dict(checkpoint.load_newest(tmp_path).state)
        resumed.fetch()
        assert resumed.history == whole.history
        found = resumed.adaptation.model.state_dict()
        assert all(torch.equal(value, found[name]) for name, value in whole.adaptation.model.state_dict().items())

    def test_sizes_over_the_run(self):
        training = run_of(f"{FOUND},components=4")
        sides = {"convolution": 4 + 2 * 9, "linear": 10 + 36, "transposed": 8 + 10}
        training.run(lambda training: None)
        ranks = training.adaptation.ranks()
        assert sorted(ranks.values()) == [0, 2, 2]
        final = sum(rank * sides[name] for name, rank in ranks.items())
        sizes = [(size.batches, size.adapter_parameters, size.rank) for size in training.sizes.trajectory]
        assert sizes == [(0, 2 * sum(sides.values()) + 3, 6), (6, final, 4)]

    def test_an_export_is_a_stock_lora_of_the_modules_that_stay(self, tmp_path):
        started = start(Subject("diffora[rank=4,upper_learning_rate=0.1,components=8]", tmp_path))
        started.training.run(lambda training: None)
        assert_export_is_stock_lora(started, tmp_path / "export")
        assert sorted(started.adaptation.ranks().values()) == 10 * [0] + 2 * [4]

    def test_stock_peft_trains_it_in_its_place(self):
        form = method_of("diffora[rank=4,alpha=8]").peft_form({"a": 4, "b": 0})
        assert (form.config["r"], form.config["lora_alpha"], form.config["target_modules"]) == (4, 8.0, "a")


@pytest.mark.parametrize(
    ("settings", "values", "ranks"),
    [
        ("keep=0.5", [0.1, 0.3, -0.2, 0.2], [0, 4, 0, 4]),
        ("keep=0.5", [0.0, 0.0, 0.0, 0.0], [4, 4, 0, 0]),
        ("keep=0.1", [-3.0, -1.0, -2.0], [0, 4, 0]),
        ("components=12", [0.1, 0.3, -0.2, 0.2], [4, 4, 0, 4]),
        ("", [0.1, 0.3, 0.2], [0, 4, 4]),
    ],
)
def test_the_modules_of_the_largest_gates_stay(settings, values, ranks):
    assert method_of(f"diffora[rank=4,{settings}]" if settings else "diffora[rank=4]").kept(values) == ranks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("rank=17", "rank = 17 is above the smaller side of layer"),
        ("rank=2,components=26", "components = 26 is above the 24 that there are"),
        ("rank=2,components=3", "components = 3 should be a multiple of rank = 2: whole modules stay"),
        ("components=8,keep=0.5", "components = 8 and keep = 0.5 are both set; give one of them"),
        ("keep=0", "diffora.keep = 0"),
        ("gates=joint,held_out=0.2", "held_out = 0.2 is for gates = upper, not for joint"),
        ("gates=both", "diffora.gates = 'both' is not allowed: it should be 'upper' or 'joint'"),
        (
            "search_fraction=0.3",
            "search_fraction = 0.3 does not fit into 9 batches, with 4 before the end of that share",
        ),
        ("gates=joint,search_fraction=0.95", "it takes at least 20"),
        ("held_out=0.001", "each level needs at least 2"),
    ],
)
def test_bad_settings_are_one_line(settings, message, tmp_path, capsys):
    assert_refused(f"diffora[{settings}]", message, tmp_path, capsys, "--batches", "9")


def test_one_row_of_a_level_is_one_line(tmp_path, capsys):
    message = "held_out = 0.3 of 3 training rows leaves 2 and 1: each level needs at least 2"
    assert_refused("diffora[rank=4]", message, tmp_path, capsys, "--batches", "9", "--limit", "4")


BACKBONE = Backbone(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), (), ("0", "1"))


def test_a_dry_run_tells_what_the_search_spends():
    end = "then a LoRA in 1 of 2 modules, 8 components, trains to the end"
    assert method_of("diffora").notes(BACKBONE, TrainSpec(batches=30), 100) == [
        "3 steps of the upper level, 3 batches each, in the first 15 of 30 batches, 6 of which are updates",
        end,
    ]
    joint = "gates are trained with everything else, in the first 15 of 30 batches"
    assert method_of("diffora[gates=joint]").notes(BACKBONE, TrainSpec(batches=30), 100) == [joint, end]


@pytest.mark.parametrize("settings", ["gates=joint", "unrolled_step=0", "upper_every=3"])
def test_the_least_budget_that_is_named_does(settings):
    method = method_of(f"diffora[search_fraction=0.9,{settings}]")
    with pytest.raises(InputError, match="takes at least") as raised:
        method.end_of("search_fraction", 1)
    least = int(str(raised.value).split()[-1])
    assert method.batches_a_round <= method.end_of("search_fraction", least) < least
