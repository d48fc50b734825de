"""BiLoRA: what the two levels change, the parametrisations, the penalties, the cut, LoRA as its limit, export."""

import numpy as np
import pytest
import torch
from torch import nn

from harness.contracts import METHOD_CONTRACTS, Subject, start
from harness.contracts.subject import method_of
from harness.method import Backbone
from harness.run import checkpoint
from harness.run.streams import TrainingData
from harness.run.training import Training
from harness.spec import TrainSpec
from harness.task import Batch
from tests.support.network import method_training
from tests.support.refusals import assert_refused
from tests.support.small_lora import assert_export_is_stock_lora
from tests.support.trained import trained

LAYERS, EACH = 12, 448  # of the synthetic task, whose one component of each layer has 448 numbers
ROWS = tuple(range(8))


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
@pytest.mark.parametrize(
    "settings",
    [
        "components=5,cut_at=0.4",
        "values=binary,levels=joint,components=7",
    ],
)
def test_contracts(settings, contract, tmp_path):
    """Some layers have no components left. The default form is tried with the other methods."""
    contract(Subject(f"bilora[rank=4,learning_rate=1e-2,{settings}]", tmp_path))


class Two(nn.Module):
    """Of a row's two numbers one goes through each layer, (rows, 2) to (rows,)."""

    def __init__(self) -> None:
        super().__init__()
        self.real, self.spurious = (nn.Linear(1, 1, bias=False) for _ in range(2))

    def forward(self, x):
        return (self.real(x[:, :1]) + self.spurious(x[:, 1:]))[:, 0]


class Labels:
    """Squared error on labels that are there."""

    def collate(self, encoded, rows, generator):
        return Batch({"x": encoded.inputs["x"][list(rows)]}, encoded.labels[list(rows)])

    def loss(self, model, batch, generator):
        return (model(**batch.inputs) - batch.labels).square().mean()


def pseudo_values(settings):
    """(real, spurious) L after training on rows of which the lower level's labels follow both numbers of a row, and the
    upper level's, and so all rows' on average less, the first alone."""
    torch.manual_seed(0)
    backbone = Backbone(Two().double(), (), ("real", "spurious"))
    for parameter in backbone.module.parameters():
        parameter.data.zero_()
    x = torch.randn(200, 2, dtype=torch.float64)
    data, spec = TrainingData(200, 20, 0, upper_share=0.5), TrainSpec(batches=400, batch_size=20)
    lower = {row for _ in range(20) for row in data.draw("lower")}
    data = TrainingData(200, 20, 0, upper_share=0.5)
    y = x[:, 0] + torch.tensor([float(row in lower) for row in range(200)]) * x[:, 1]
    method = method_of(f"bilora[rank=1,alpha=1,values=real,learning_rate=1e-2,orthogonality=0,{settings}]")
    adaptation = method.start(backbone, spec, data, torch.Generator())
    training = Training(adaptation, Labels(), Batch({"x": x}, y), data, spec, torch.device("cpu"), 400)
    training.run(lambda training: None)
    return [float(L.detach()) for L in adaptation.component_weights()]


class TestTwoLevels:
    def test_they_hold_back_what_the_held_out_rows_do_not_confirm(self):
        """What the lower level's rows alone teach loses its weight. Trained jointly, it keeps it; and so it does where
        the upper level has none of the gradient."""
        real, spurious = pseudo_values("held_out=0.5")
        assert real > 1
        assert spurious < 0.5 * real
        joint_real, joint_spurious = pseudo_values("levels=joint")
        assert joint_spurious > 0.8 * joint_real
        assert pseudo_values("held_out=0.5,upper_learning_rate=0") == [1, 1]

    def test_the_derivative_through_the_update_is_part_of_it(self):
        plain, unrolled = (pseudo_values(f"held_out=0.5,unrolled_step={size}") for size in (0, 1))
        assert abs(plain[1] - unrolled[1]) > 0.05

    def test_joint_training_takes_all_rows_and_no_other_batch(self, tmp_path):
        joint = trained("bilora[rank=4,levels=joint]", tmp_path).training
        assert joint.data.drawn == {"all": 24, "lower": 0, "upper": 0}
        assert joint.index == 24
        bilevel = trained("bilora[rank=4]", tmp_path).training
        assert bilevel.data.drawn == {"all": 0, "lower": 12, "upper": 6}
        assert bilevel.index == 6
        first, second = (training.adaptation.values()[0] for training in (joint, bilevel))
        assert not torch.equal(first, second)

    def test_the_levels_have_rows_of_their_own(self, tmp_path):
        data = start(Subject("bilora[rank=4]", tmp_path)).training.data
        lower, upper = ({row for _ in range(data.size // 4) for row in data.draw(name)} for name in ("lower", "upper"))
        assert not lower & upper
        assert (len(lower), len(upper)) == (data.size - round(0.2 * data.size), round(0.2 * data.size))

    def test_with_values_of_one_that_stay_it_is_lora_bit_for_bit(self, tmp_path):
        losses = []
        for name in ("bilora[rank=4,values=real,upper_learning_rate=0,orthogonality=0]", "lora[rank=4]"):
            started = start(Subject(name, tmp_path))
            started.adaptation.model.eval()  # without dropout, of which the upper level draws as well
            started.training.data.draw = lambda stream: ROWS
            for _ in range(6):
                started.training.update()
            started.training.fetch()
            losses.append([row["loss"] for row in started.training.history])
        assert losses[0] == losses[1]


class TestValues:
    def test_a_softmax_sums_to_one_in_every_layer(self, tmp_path):
        adaptation = trained("bilora[rank=4,upper_learning_rate=0.1]", tmp_path).adaptation
        weights = torch.stack(adaptation.component_weights()).detach()
        assert weights.min() > 0
        torch.testing.assert_close(weights.sum(1), torch.ones(LAYERS))
        assert weights.max() > 0.3

    @pytest.mark.parametrize("values", ["softmax", "real", "binary"])
    def test_the_order_of_components_is_nothing_to_the_update(self, values):
        training = method_training(method_of(f"bilora[rank=3,values={values},upper_learning_rate=0.1]"))
        training.run(lambda training: None)
        adaptation, images = training.adaptation, training.encoded.inputs["images"]
        before, order = adaptation.model(images), torch.tensor([2, 0, 1])
        with torch.no_grad():
            for (B, A), own in zip(adaptation.pairs(), adaptation.values(), strict=True):
                B.copy_(B[:, order].clone())
                A.copy_(A[order].clone())
                own.copy_(own[order].clone())
        torch.testing.assert_close(adaptation.model(images), before, rtol=0, atol=1e-12)

    def test_values_that_begin_with_zero_begin_to_move_with_the_first_upper_step(self, tmp_path):
        """P = 0 and L = 0 together would be a point that no gradient leads away from."""
        started = start(Subject("bilora[rank=4,values=real,start_from=values]", tmp_path))
        started.training.update()
        assert all(bool(own.ne(0).all()) for own in started.adaptation.values())
        assert all(bool(B.ne(0).any() and A.ne(0).any()) for B, A in started.adaptation.pairs())

    def test_a_binary_penalty_drives_values_apart(self, tmp_path):
        found = []
        for weight in (0, 50):
            name = f"bilora[rank=4,values=binary,binary_weight={weight},upper_learning_rate=0.3]"
            L = torch.cat(trained(name, tmp_path).adaptation.component_weights()).detach()
            found.append(float((L * (1 - L)).mean()))
        assert found[1] < 0.8 * found[0]

    def test_the_orthogonality_is_the_squared_distance_from_it(self):
        """Against NumPy, kernels as matrices."""
        training = method_training(method_of("bilora[rank=2,orthogonality=0.7]"))
        training.run(lambda training: None)
        squares = []
        for B, A in training.adaptation.pairs():
            P, Q = B.detach().flatten(1).numpy(), A.detach().flatten(1).numpy()
            squares += [((P.T @ P - np.eye(2)) ** 2).sum(), ((Q @ Q.T - np.eye(2)) ** 2).sum()]
        assert float(training.adaptation.penalty().detach()) == pytest.approx(0.7 * np.mean(squares), rel=1e-10)


class TestCut:
    @pytest.mark.parametrize("values", ["softmax", "real", "binary"])
    def test_the_function_loses_what_is_removed_and_nothing_else(self, values):
        """The components with the largest |L| |p| |q| stay as they are, also where a softmax has fewer to share."""
        settings = f"rank=3,values={values},components=4,cut_at=0.6,upper_learning_rate=0.1,upper_every=4"
        training = method_training(method_of(f"bilora[{settings}]"))
        adaptation = training.adaptation
        cut, states = adaptation.keep, []

        def watched(places):
            states.append(components(adaptation))
            cut(places)

        adaptation.keep = watched
        while not adaptation.was_cut:
            training.update()
        assert training.used == 8
        (before,) = states
        sizes = sorted(((np.linalg.norm(each), name) for name, own in before.items() for each in own), reverse=True)
        kept = [name for _, name in sizes[:4]]
        assert adaptation.ranks() == {name: kept.count(name) for name in before}
        for name, own in components(adaptation).items():
            largest = {size for size, _ in sizes[:4]}
            expected = [each for each in before[name] if np.linalg.norm(each) in largest]
            np.testing.assert_allclose(own, np.array(expected).reshape(np.shape(own)), atol=1e-12)

    def test_sizes_over_the_run(self, tmp_path):
        started = trained("bilora[rank=4,components=6]", tmp_path)
        ranks, shapes = started.adaptation.ranks(), started.before.shape
        final = sum(rank * (sum(shapes(name)) + 1) for name, rank in ranks.items())
        sizes = [(size.batches, size.adapter_parameters, size.rank) for size in started.training.sizes.trajectory]
        assert sizes == [(0, 4 * (EACH + LAYERS), 4 * LAYERS), (12, final, 6)]

    def test_layers_without_components_train_on_and_resume(self, tmp_path):
        """On a convolution, a linear and a transposed layer, two of which are left without."""
        method = method_of("bilora[rank=2,components=1,cut_at=0.4]")
        whole, resumed = method_training(method, batches=20), method_training(method, batches=20)
        while whole.used < 12:
            whole.update()
        checkpoint.save(tmp_path, 12, whole.state_dict())
        resumed.load_state_dict(checkpoint.load_newest(tmp_path).state)
        for training in (whole, resumed):
            training.run(lambda training: None)
        assert sorted(whole.adaptation.ranks().values()) == [0, 0, 1]
        assert resumed.history == whole.history
        assert all(
            torch.equal(one, two)
            for one, two in zip(whole.adaptation.values(), resumed.adaptation.values(), strict=True)
        )


def components(adaptation):
    """Every component of every layer as a matrix, from what is exported."""
    return {
        name: [torch.outer(b, a).numpy() for b, a in zip(B.flatten(1).T, A.flatten(1), strict=True)]
        for name, (B, A) in adaptation.scaled_pairs().items()
    }


@pytest.mark.parametrize("settings", ["", ",values=binary", ",values=real,start_from=values", ",components=5"])
def test_an_export_is_a_stock_lora_with_the_values_in_it(settings, tmp_path):
    name = f"bilora[rank=4,learning_rate=1e-2,upper_learning_rate=0.1{settings}]"
    assert_export_is_stock_lora(trained(name, tmp_path), tmp_path / "export")


def test_an_export_at_a_rank_has_the_largest_components(tmp_path):
    training = method_training(method_of("bilora[rank=3,upper_learning_rate=0.1]"), ("linear",))
    training.run(lambda training: None)
    (whole,) = components(training.adaptation).values()
    largest = max(whole, key=np.linalg.norm)
    with training.adaptation.at_rank(1):
        training.adaptation.export(tmp_path)
        (cut,) = components(training.adaptation).values()
        np.testing.assert_allclose(sum(cut), largest, atol=1e-12)
    values = method_of("bilora").singular_values(tmp_path)["linear"]
    np.testing.assert_allclose(values, [np.linalg.norm(largest)], rtol=1e-10)


def test_stock_peft_trains_a_lora_in_its_place():
    form = method_of("bilora[rank=4,alpha=8]").peft_form({"a": 2, "b": 4, "c": 0})
    assert form.parameters["rank_pattern"] == {"a": 2, "c": 0}
    assert form.config["lora_alpha"] / form.config["r"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("rank=17", "rank = 17 is above the smaller side of layer"),
        ("rank=2,components=25", "components = 25 is above the 24 that there are"),
        ("held_out=0", "bilora.held_out = 0"),
        ("values=hard", "bilora.values = 'hard' is not allowed: it should be 'softmax', 'real' or 'binary'"),
        ("start_from=values", "start_from = values is for values = real: of softmax no value can be 0 at first"),
        ("binary_weight=1", "binary_weight = 1 needs values = binary"),
        ("levels=joint,held_out=0.5", "held_out = 0.5 needs levels = bilevel"),
        ("levels=joint,upper_every=2", "upper_every = 2 needs levels = bilevel"),
        ("cut_at=0.4", "cut_at = 0.4 needs components"),
        (
            "components=5,cut_at=0.3",
            "cut_at = 0.3 does not fit into 9 batches, with 4 before the end of that share and 1 after it: it takes at "
            "least 11",
        ),
        ("levels=joint,components=5,cut_at=0.95", "it takes at least 20"),
        ("upper_every=7", "upper_every = 7 does not fit into 9 batches: it takes at least 10"),
        ("held_out=0.001", "each level needs at least 2"),
    ],
)
def test_bad_settings_are_one_line(settings, message, tmp_path, capsys):
    assert_refused(f"bilora[{settings}]", message, tmp_path, capsys, "--batches", "9")


def test_a_dry_run_tells_what_the_levels_spend():
    backbone = Backbone(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), (), ("0", "1"))
    train = TrainSpec(batches=30)
    levels = "7 steps of the upper level, 3 batches each, in the first 30 of 30 batches, 9 of which are updates"
    assert method_of("bilora").notes(backbone, train, 100) == [levels]
    assert method_of("bilora[components=5]").notes(backbone, train, 100) == [
        levels,
        "5 of 16 components stay after batch 15",
    ]
    assert method_of("bilora[levels=joint]").notes(backbone, train, 100) == []
