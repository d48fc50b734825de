"""SALT: the spectrum's two blocks, ReLU's traps, training against a slow reference, counts, cuts, resume, exports."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn

from harness import registry
from harness.contracts import METHOD_CONTRACTS, Subject
from harness.contracts.methods import (
    a_run_interrupted_after_every_update_equals_the_uninterrupted_one,
    counts_are_right,
    unchanged_output_at_the_start,
)
from harness.errors import InputError
from harness.method import Backbone
from harness.run import checkpoint
from harness.spec import TrainSpec
from methods.shared.weight_updates import load
from tests.support.network import KINDS, method_training
from tests.support.refusals import assert_refused
from tests.support.small_lora import assert_export_is_stock_lora, truncated, updates
from tests.support.spectral import reference_training, triples_of
from tests.support.trained import trained

SIDES = {"convolution": (4, 18), "linear": (10, 36), "transposed": (8, 10)}
SPLITS = [{"head": 2, "rank": 2}, {"head": 0, "rank": 3}, {"head": 4, "rank": 0}, {"head": 0.3, "rank": 1}]


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
def test_contracts(contract, tmp_path):
    """With the authors' ReLU; without it is tried with the other methods."""
    contract(Subject("salt[head=3,rank=2,relu=true]", tmp_path))


@pytest.mark.parametrize("settings", ["head=4,rank=0", "head=0,rank=2", "components=26,head=2"])
def test_contracts_of_empty_parts(settings, tmp_path):
    for place, contract in enumerate(
        (
            unchanged_output_at_the_start,
            counts_are_right,
            a_run_interrupted_after_every_update_equals_the_uninterrupted_one,
        )
    ):
        contract(Subject(f"salt[{settings}]", tmp_path / str(place), batches=4))


def salt(**settings):
    return registry.make_method("salt", settings)


def on_network(**settings):
    """A run on a kernel, a linear layer and a transposed one, in float64."""
    return method_training(salt(**{"head": 2, "rank": 2} | settings))


def drawn(adaptation, seed=1):
    """Random values in what trains, and these by layer."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, basis in adaptation.bases.items():
        for parameter in basis.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        found[name] = {part: value.detach().numpy().copy() for part, value in basis.named_parameters()}
    return found


def spectrum(sigma, values, relu):
    """S of a layer, (d, d), by NumPy: the whole matrix, as the authors' code makes it."""
    head = len(values["scale"])
    S = np.diag(sigma)
    S[:head, :head] = np.diag(values["scale"] * sigma[:head] + values["shift"])
    S[head:, head:] += values["X"] @ values["Y"]
    return np.maximum(S, 0) if relu else S


def changes(adaptation):
    """What each layer's weight changes by, (outputs, inputs), from what the layer computes."""
    found = {}
    for name, layer in adaptation.layers.items():
        B, A = adaptation.pair(adaptation.bases[name])
        assert B.shape[0] == SIDES[name][0]
        found[name] = (B @ A).detach().numpy()
        if name == "linear":
            unit = torch.eye(SIDES[name][1], dtype=torch.float64)
            bias = layer(torch.zeros_like(unit[:1]))
            weight = layer.weight.detach().numpy()
            np.testing.assert_allclose((layer(unit) - bias).detach().numpy().T - weight, found[name], atol=1e-12)
    return found


class TestDefinition:
    @pytest.mark.parametrize("relu", [False, True])
    @pytest.mark.parametrize("split", SPLITS, ids=str)
    def test_the_weight_is_the_changed_spectrum_between_the_singular_vectors(self, split, relu):
        training = on_network(**split, relu=relu)
        values = drawn(training.adaptation)
        triples = triples_of(training.adaptation)
        for name, change in changes(training.adaptation).items():
            U, sigma, Vh = triples[name]
            np.testing.assert_allclose(
                change, U @ (spectrum(sigma, values[name], relu) - np.diag(sigma)) @ Vh, atol=1e-12
            )

    @pytest.mark.parametrize("relu", [False, True])
    def test_every_kind_of_layer_computes_with_it(self, relu):
        training = on_network(relu=relu)
        drawn(training.adaptation)
        model, images = training.adaptation.model, training.encoded.inputs["images"]
        with torch.no_grad():
            found = model(images)
            for name, change in changes(training.adaptation).items():
                layer, added = model.get_submodule(name), torch.from_numpy(change)
                layer.weight += added.T if name == "transposed" else added.view_as(layer.weight)
                basis = training.adaptation.bases[name]
                for part, start in (("scale", 1), ("shift", 0), ("Y", 0)):
                    getattr(basis, part).fill_(start)
            torch.testing.assert_close(model(images), found, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("relu", [False, True])
    def test_the_start_is_the_backbone_bit_for_bit(self, relu):
        training, head = on_network(relu=relu), method_training(registry.make_method("head", {}))
        images = training.encoded.inputs["images"]
        assert torch.equal(training.adaptation.model(images), head.adaptation.model(images))

    def test_x_starts_as_in_the_code(self):
        """Uniform up to sqrt(6 / (1 + 20) / rank)."""
        training = method_training(salt(head=0, rank=4), layers=("linear", "transposed"))
        X = torch.cat([basis.X.detach().flatten() for basis in training.adaptation.bases.values()])
        bound = (6 / 21 / 4) ** 0.5
        assert 0.9 * bound < X.abs().max() <= bound
        assert abs(float(X.mean())) < 0.3 * bound


class TestReLU:
    """What the authors' code does to the spectrum, and why it is not the default."""

    def test_it_clips_negative_entries_between_the_singular_vectors(self):
        inside = {}
        for relu in (False, True):
            training = on_network(relu=relu)
            drawn(training.adaptation)
            U, sigma, Vh = triples_of(training.adaptation)["linear"]
            inside[relu] = U.T @ changes(training.adaptation)["linear"] @ Vh.T + np.diag(sigma)
        assert inside[False].min() < -0.1
        assert inside[True].min() > -1e-12
        np.testing.assert_allclose(inside[True], np.maximum(inside[False], 0), atol=1e-12)

    def test_the_rank_is_then_no_longer_bounded(self):
        ranks = {}
        for relu in (False, True):
            training = on_network(relu=relu)
            drawn(training.adaptation)
            ranks[relu] = [np.linalg.matrix_rank(change) for change in changes(training.adaptation).values()]
        assert ranks[False] == [4, 4, 4]
        assert min(ranks[True][1:]) > 4

    def test_it_starts_half_dead(self):
        """Off the diagonal the tail is 0, where ReLU has no gradient: Y gets that of the diagonal alone."""
        found = {}
        for relu in (False, True):
            training = on_network(relu=relu)
            model, batch = training.adaptation.model, training.encoded
            nn.functional.cross_entropy(model(**batch.inputs), batch.labels).backward()
            basis = training.adaptation.bases["linear"]
            found[relu], X = basis.Y.grad, basis.X.detach()
        diagonal = {relu: X.T * (gradient / X.T)[0] for relu, gradient in found.items()}  # X^T diag(g)
        torch.testing.assert_close(found[True], diagonal[True], rtol=1e-9, atol=1e-12)
        assert found[True].abs().max() > 1e-6
        assert (found[False] - diagonal[False]).abs().max() > 0.1 * found[False].abs().max()


class TestTraining:
    @pytest.mark.parametrize("settings", [{}, {"relu": True}, {"head": 4, "rank": 0}], ids=str)
    def test_losses_and_values_are_those_of_a_weight_composed_anew(self, settings):
        """By AdamW and autograd, through the whole of U S V^T. With rank 0 it is SVF on the first 4 values."""
        training = on_network(learning_rate=0.02, **settings)
        starts = {
            name: tuple(getattr(basis, part).detach().clone() for part in ("scale", "shift", "X", "Y"))
            for name, basis in training.adaptation.bases.items()
        }
        training.run(lambda training: None)

        def compose(name, sigma, scale, shift, X, Y):
            head = len(scale)
            top, tail = torch.diag(scale * sigma[:head] + shift), torch.diag(sigma[head:]) + X @ Y
            S = torch.block_diag(top, tail)
            return S.relu() if settings.get("relu") else S

        losses, values = reference_training(triples_of(training.adaptation), starts, compose, 0.02)
        assert [row["loss"] for row in training.history] == pytest.approx(losses, rel=1e-6)  # kept in float32
        for name, basis in training.adaptation.bases.items():
            for part, value in zip(("scale", "shift", "X", "Y"), values[name], strict=True):
                torch.testing.assert_close(getattr(basis, part), value, rtol=0, atol=1e-9)

    def test_head_and_tail_stay_apart(self):
        """In the weight's own basis: the head's block is diagonal, the tail's of rank 2, nothing is between them."""
        training = on_network(learning_rate=0.02)
        training.run(lambda training: None)
        triples = triples_of(training.adaptation)
        for name, change in changes(training.adaptation).items():
            U, _, Vh = triples[name]
            inside = U.T @ change @ Vh.T
            np.testing.assert_allclose(inside[:2, 2:], 0, atol=1e-12)
            np.testing.assert_allclose(inside[2:, :2], 0, atol=1e-12)
            np.testing.assert_allclose(inside[:2, :2], np.diag(np.diag(inside[:2, :2])), atol=1e-12)
            assert np.linalg.matrix_rank(inside[2:, 2:], tol=1e-9) == 2
            assert np.abs(np.diag(inside[:2, :2])).min() > 1e-3


class TestSizes:
    @pytest.mark.parametrize("split", SPLITS, ids=str)
    def test_a_layer_trains_two_numbers_a_value_of_the_head_and_x_and_y(self, split):
        training = on_network(**split)
        count, expected, kept = training.sizes.parameters(), 0, 27
        for outputs, inputs in SIDES.values():
            d = min(outputs, inputs)
            head = split["head"] if split["head"] >= 1 else int(split["head"] * d)
            expected += 2 * head + 2 * (d - head) * split["rank"]
            kept += (head + split["rank"]) * (outputs + inputs)
        assert count.adapter_initial == count.adapter_peak == count.adapter_final == expected
        assert (count.head, count.stored_bytes) == (27, 8 * kept)
        assert count.total == sum(p.numel() for p in training.adaptation.model.parameters())

    def test_components_are_spread_over_head_and_tail(self):
        training = on_network(components=11, rank=None)
        assert list(training.adaptation.ranks().values()) == [4, 4, 3]
        assert [len(basis.Y) for basis in training.adaptation.bases.values()] == [2, 2, 1]

    @pytest.mark.parametrize("split", SPLITS, ids=str)
    def test_a_cut_is_the_best_approximation(self, split):
        adaptation = on_network(**split).adaptation
        drawn(adaptation)
        whole = updates(adaptation)
        for rank in (1, 2, 3):
            with adaptation.at_rank(rank):
                for name, update in updates(adaptation).items():
                    np.testing.assert_allclose(update, truncated(whole[name], rank), atol=1e-10)
        for name, update in updates(adaptation).items():
            np.testing.assert_array_equal(update, whole[name])

    def test_with_relu_there_is_no_rank_and_no_cut(self):
        adaptation = on_network(relu=True).adaptation
        assert adaptation.ranks() == {}
        assert adaptation.at_rank(1) is None


def test_singular_vectors_come_from_a_checkpoint(tmp_path):
    training, resumed = on_network(), on_network()
    drawn(training.adaptation)
    for basis in resumed.adaptation.bases.values():
        basis.Vh.neg_()
    checkpoint.save(tmp_path, 0, training.state_dict())
    resumed.load_state_dict(checkpoint.load_newest(tmp_path).state)
    for name, change in changes(training.adaptation).items():
        np.testing.assert_array_equal(changes(resumed.adaptation)[name], change)


class TestExport:
    @pytest.mark.parametrize("settings", ["head=3,rank=2", "head=0,rank=2", "components=30,head=2"])
    def test_without_relu_it_is_a_stock_lora(self, settings, tmp_path):
        assert_export_is_stock_lora(trained(f"salt[{settings}]", tmp_path), tmp_path / "export")

    def test_so_it_is_of_kernels(self, tmp_path):
        training = on_network()
        drawn(training.adaptation)
        training.adaptation.export(tmp_path)
        plain = method_training(registry.make_method("head", {})).adaptation.model
        with pytest.warns(UserWarning, match="fan_in_fan_out"):  # not all of these layers are transposed
            loaded = PeftModel.from_pretrained(plain, tmp_path).eval()
        images = training.encoded.inputs["images"]
        torch.testing.assert_close(loaded(images=images), training.adaptation.model(images), rtol=0, atol=1e-5)

    def exported(self, folder):
        """(model, images) of a run with ReLU that was exported into the folder."""
        training = on_network(relu=True)
        drawn(training.adaptation)
        training.adaptation.model.head.weight.data.normal_()
        training.adaptation.export(folder)
        return training.adaptation.model, training.encoded.inputs["images"]

    def test_with_relu_a_plain_model_loads_it(self, tmp_path):
        """The same outputs, on kernels and transposed weights too."""
        model, images = self.exported(tmp_path)
        plain = method_training(registry.make_method("head", {})).adaptation.model
        assert (plain(images) - model(images)).abs().max() > 0.1
        load(plain, tmp_path)
        torch.testing.assert_close(plain(images), model(images), rtol=0, atol=1e-10)

    def test_with_relu_it_has_as_many_bytes_as_are_counted(self, tmp_path):
        self.exported(tmp_path)
        file = tmp_path / "trained.safetensors"
        header = int.from_bytes(file.read_bytes()[:8], "little") + 8
        whole = sum(outputs * inputs for outputs, inputs in SIDES.values())
        assert file.stat().st_size - header == 8 * (whole + 27)
        assert on_network(relu=True).sizes.parameters().stored_bytes == 8 * (whole + 27)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda folder: (folder / "weight_updates.json").unlink(), "is not there"),
            (lambda folder: (folder / "weight_updates.json").write_text("{"), "is not JSON"),
            (lambda folder: (folder / "trained.safetensors").write_bytes(b"x"), "the checksum of"),
        ],
    )
    def test_a_damaged_one_is_refused_in_one_line(self, damage, message, tmp_path):
        self.exported(tmp_path)
        damage(tmp_path)
        plain = method_training(registry.make_method("head", {})).adaptation.model
        before = {name: value.clone() for name, value in plain.state_dict().items()}
        with pytest.raises(InputError, match=message):
            load(plain, tmp_path)
        assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())

    def test_so_is_one_of_another_model(self, tmp_path):
        self.exported(tmp_path)
        with pytest.raises(InputError, match=r"does not fit the model: 'convolution\.weight'.*is not there"):
            load(nn.Sequential(nn.Linear(2, 3)), tmp_path)

    def test_the_file_names_what_is_added(self, tmp_path):
        self.exported(tmp_path)
        assert json.loads((tmp_path / "weight_updates.json").read_text())["added"] == [
            f"{kind}.weight" for kind in KINDS
        ]


def test_a_dry_run_tells_what_trains():
    backbone = Backbone(nn.Sequential(nn.Linear(512, 256), nn.Linear(256, 24)), (), ("0", "1"))
    (plain,) = salt().notes(backbone, TrainSpec(batches=40), 100)
    assert plain == "27 singular values are scaled and shifted, and 16 components train between the others, in 2 layers"
    _, relu = salt(relu=True).notes(backbone, TrainSpec(batches=40), 100)
    assert relu == "relu = true: the updates have no low rank, and an export holds them whole"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("head=0,rank=0", "head = 0 and rank = 0: nothing trains"),
        ("head=1.5", "head = 1.5 should be a share below 1, or a whole number"),
        ("head=-1", "salt.head = -1 is not allowed"),
        ("head=17", "head = 17 is above the 16 singular values of layer"),
        ("head=10,rank=7", "head = 10 takes 10 of the 16 singular values of layer"),
        ("head=10,rank=7", "rank = 7 is above the 6 that it leaves"),
        ("head=0.01,rank=0", "and rank = 0: nothing of it trains"),
        ("rank=2,components=24", "rank = 2 and components = 24 are both set; give one of them"),
        ("components=24,head=4", "components = 24 gives it 2: 48 components do, or a smaller head"),
        ("components=11", "components = 11 should be 12 to 192"),
    ],
)
def test_bad_settings_are_one_line_and_nothing_is_written(settings, message, tmp_path, capsys):
    assert_refused(f"salt[{settings}]", message, tmp_path, capsys)


def test_what_does_not_fit_a_backbone_is_a_reason():
    grouped = Backbone(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), (), ("0",))
    assert "groups" in salt(rank=1).unsupported(grouped)
    assert "no linear or convolution layer" in salt().unsupported(Backbone(nn.Embedding(3, 2), (), ()))
