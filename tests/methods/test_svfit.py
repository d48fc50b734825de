"""SVFit: the update's definition, training against a slow reference, ranks, counts, cuts, exact resume, export."""

import numpy as np
import pytest
import torch
from torch import nn

from harness import registry
from harness.contracts import METHOD_CONTRACTS, Subject
from harness.method import Backbone
from harness.run import checkpoint
from harness.spec import TrainSpec
from tests.support.network import method_training
from tests.support.refusals import assert_refused
from tests.support.small_lora import FakeStep, assert_export_is_stock_lora, truncated, updates
from tests.support.spectral import reference_training, singular_triples
from tests.support.trained import trained

SIDES = {"convolution": (4, 18), "linear": (10, 36), "transposed": (8, 10)}


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
def test_contracts(contract, tmp_path):
    """With a rank; the share of energy is tried with the other methods."""
    contract(Subject("svfit[rank=4]", tmp_path))


def svfit(**settings):
    return registry.make_method("svfit", settings)


def on_network(batches=12, **settings):
    """A run on a kernel, a linear layer and a transposed one, in float64, prepared."""
    training = method_training(svfit(**settings), batches=batches)
    training.prepare()
    return training


def set_deltas(adaptation, seed=1):
    """Random ones, by layer."""
    generator = torch.Generator().manual_seed(seed)
    for basis in adaptation.bases.values():
        basis.delta.data.copy_(torch.randn(len(basis.delta), generator=generator))
    return {name: basis.delta.detach().numpy().copy() for name, basis in adaptation.bases.items()}


class TestDefinition:
    def test_the_weight_gets_the_singular_values_plus_delta(self):
        """Against NumPy's SVD of the flattened weights."""
        training = on_network(rank=3)
        deltas = set_deltas(training.adaptation)
        for name, update in updates(training.adaptation).items():
            U, _, Vh = singular_triples()[name]
            np.testing.assert_allclose(update, (U[:, :3] * deltas[name]) @ Vh[:3], atol=1e-12)

    def test_a_layer_computes_with_the_changed_weight(self):
        training = on_network(rank=3)
        set_deltas(training.adaptation)
        model, images = training.adaptation.model, training.encoded.inputs["images"]
        with torch.no_grad():
            found = model(images)
            for name, update in updates(training.adaptation).items():
                layer, added = model.get_submodule(name), torch.from_numpy(update)
                layer.weight += added.T if name == "transposed" else added.view_as(layer.weight)
                training.adaptation.bases[name].delta.zero_()
            torch.testing.assert_close(model(images), found, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("settings", [{"rank": 3}, {"components": 11}, {"energy": 0.9}])
    def test_without_delta_the_model_is_the_backbone_bit_for_bit(self, settings):
        training, head = on_network(**settings), method_training(registry.make_method("head", {}))
        images = training.encoded.inputs["images"]
        assert torch.equal(training.adaptation.model(images), head.adaptation.model(images))


class TestTraining:
    @pytest.mark.parametrize("rank", [1, 4])
    def test_it_is_a_diagonal_svf_of_the_first_values(self, rank):
        """SVF composes W = U diag(sigma) V^T anew; here only its first values train, by AdamW and autograd."""
        training = on_network(rank=rank, learning_rate=0.05)
        training.run(lambda training: None)

        def compose(name, sigma, first):
            return torch.cat([first, sigma[rank:]])

        starts = {name: (torch.from_numpy(sigma[:rank].copy()),) for name, (_, sigma, _) in singular_triples().items()}
        losses, trained_values = reference_training(singular_triples(), starts, compose, 0.05)
        assert [row["loss"] for row in training.history] == pytest.approx(losses, rel=1e-6)  # which are kept in float32
        for name, (_, sigma, _) in singular_triples().items():
            found = training.adaptation.bases[name].delta.detach().numpy()
            np.testing.assert_allclose(found, trained_values[name][0].detach().numpy() - sigma[:rank], atol=1e-9)

    def test_singular_values_train_and_nothing_beside_them(self):
        """In the weight's own basis the update is diagonal, within the first r; without it the losses are others."""
        training, head = on_network(rank=2, learning_rate=0.05), method_training(svfit(rank=2, learning_rate=0.05))
        for basis in head.adaptation.bases.values():
            basis.delta.requires_grad_(False)
        for run in (training, head):
            run.run(lambda training: None)
        for name, update in updates(training.adaptation).items():
            U, _, Vh = singular_triples()[name]
            inside = U.T @ update @ Vh.T
            assert np.abs(np.diag(inside)[:2]).min() > 1e-3
            inside[[0, 1], [0, 1]] = 0
            np.testing.assert_allclose(inside, 0, atol=1e-12)
        losses = [[row["loss"] for row in run.history] for run in (training, head)]
        assert losses[0][0] == losses[1][0]
        assert losses[0][-1] < losses[1][-1] - 1e-3


class TestRanks:
    @pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 1.0])
    def test_energy_takes_the_fewest_values_that_hold_it(self, energy):
        training = on_network(energy=energy)
        for name, (_, sigma, _) in singular_triples().items():
            rank = training.adaptation.ranks()[name]
            whole = (sigma**2).sum()
            assert (sigma[:rank] ** 2).sum() >= energy * whole * (1 - 1e-12)
            assert (sigma[: rank - 1] ** 2).sum() < energy * whole
        training.update()
        training.fetch()
        assert training.history[0]["ranks"] == list(training.adaptation.ranks().values())

    def test_energy_is_of_each_layer_whatever_its_scale(self):
        """And a weight of 0 has one."""
        ranks = []
        for scale in (1.0, 1e-3):
            torch.manual_seed(0)
            layers = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
            layers[0].weight.data *= scale
            layers[1].weight.data.zero_()
            adaptation = svfit(energy=0.8).start(Backbone(layers, (), ("0", "1")), None, None, None)
            adaptation.prepare(FakeStep(0))
            ranks.append(adaptation.ranks())
        assert ranks[0] == ranks[1]
        assert 1 < ranks[0]["0"] < 5
        assert ranks[0]["1"] == 1

    def test_without_a_rule_it_is_the_share_of_the_abstract(self):
        assert on_network().adaptation.ranks() == on_network(energy=0.99).adaptation.ranks()

    def test_components_are_spread_evenly(self):
        assert list(on_network(components=11).adaptation.ranks().values()) == [4, 4, 3]

    def test_a_layer_has_as_many_parameters_as_its_rank(self):
        """What is kept of it holds the singular vectors, too; the head has 27 numbers."""
        training = on_network(components=8)
        ranks, count = training.adaptation.ranks(), training.sizes.parameters()
        assert count.adapter_initial == count.adapter_peak == count.adapter_final == 8
        numbers = sum(rank * sum(SIDES[name]) for name, rank in ranks.items())
        assert (count.head, count.stored_bytes) == (27, 8 * (numbers + 27))
        assert count.total == sum(p.numel() for p in training.adaptation.model.parameters())

    def test_with_energy_the_size_before_the_cut_is_all_values(self):
        count = on_network(energy=0.5).sizes.parameters()
        assert count.adapter_initial == count.adapter_peak == sum(map(min, SIDES.values())) > count.adapter_final

    @pytest.mark.parametrize("settings", [{"rank": 4}, {"energy": 0.9}])
    def test_a_cut_is_the_best_approximation(self, settings):
        adaptation = on_network(**settings).adaptation
        set_deltas(adaptation)
        whole = updates(adaptation)
        for rank in (1, 2, 3):
            with adaptation.at_rank(rank):
                for name, update in updates(adaptation).items():
                    np.testing.assert_allclose(update, truncated(whole[name], rank), atol=1e-12)


def test_a_state_from_before_the_first_update_is_exact(tmp_path):
    whole, resumed = (method_training(svfit(energy=0.7)) for _ in range(2))
    whole.prepare()
    assert all(rank < min(SIDES[name]) for name, rank in whole.adaptation.ranks().items())
    checkpoint.save(tmp_path, 0, whole.state_dict())
    resumed.load_state_dict(checkpoint.load_newest(tmp_path).state)
    for training in (whole, resumed):
        training.run(lambda training: None)
    assert whole.history == resumed.history
    assert all(
        torch.equal(one.delta, resumed.adaptation.bases[name].delta) for name, one in whole.adaptation.bases.items()
    )


def test_singular_vectors_come_from_a_checkpoint(tmp_path):
    """Another machine's SVD may have others, up to their signs at least."""
    training, resumed = on_network(rank=3), method_training(svfit(rank=3))
    set_deltas(training.adaptation)
    for basis in resumed.adaptation.bases.values():
        basis.U.neg_()
    checkpoint.save(tmp_path, 0, training.state_dict())
    resumed.load_state_dict(checkpoint.load_newest(tmp_path).state)
    for name, update in updates(training.adaptation).items():
        np.testing.assert_array_equal(updates(resumed.adaptation)[name], update)


@pytest.mark.parametrize("settings", ["rank=5", "energy=0.6", "components=17"])
def test_an_export_is_a_stock_lora(settings, tmp_path):
    assert_export_is_stock_lora(trained(f"svfit[{settings}]", tmp_path), tmp_path / "export")


def test_an_export_has_as_many_bytes_as_are_counted(tmp_path):
    started = trained("svfit[components=17]", tmp_path)
    started.adaptation.export(tmp_path / "export")
    (file,) = (tmp_path / "export").glob("*.safetensors")
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    assert file.stat().st_size - header == started.training.sizes.parameters().stored_bytes


def test_kernels_are_exported_and_loaded_by_stock_peft(tmp_path):
    from peft import PeftModel

    training = on_network(rank=3)
    set_deltas(training.adaptation)
    training.adaptation.export(tmp_path)
    plain = method_training(registry.make_method("head", {})).adaptation.model
    with pytest.warns(UserWarning, match="fan_in_fan_out"):  # not all of these layers are transposed
        loaded = PeftModel.from_pretrained(plain, tmp_path).eval()
    images = training.encoded.inputs["images"]
    torch.testing.assert_close(loaded(images=images), training.adaptation.model(images), rtol=0, atol=1e-5)


def test_a_lora_of_these_ranks_would_train_other_parameters():
    assert svfit(rank=2).peft_form({"a": 2}) is None


def test_a_dry_run_tells_how_many_values_train():
    backbone = Backbone(nn.Sequential(nn.Linear(512, 256), nn.Linear(256, 24)), (), ("0", "1"))
    (fixed,) = svfit(rank=8).notes(backbone, TrainSpec(batches=40), 100)
    assert fixed == "16 singular values of 2 layers train"
    (share,) = svfit().notes(backbone, TrainSpec(batches=40), 100)
    assert share == (
        "up to 280 singular values of 2 layers train: of each the fewest that hold 0.99 of their squares, found before "
        "training"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("rank=17", "rank = 17 is above the smaller side of layer"),
        ("rank=2,energy=0.5", "rank = 2 and energy = 0.5 are set together; give one of them"),
        ("rank=2,components=24", "rank = 2 and components = 24 are set together; give one of them"),
        ("energy=0", "svfit.energy = 0 is not allowed"),
        ("energy=1.5", "svfit.energy = 1.5 is not allowed"),
        ("components=11", "components = 11 should be 12 to 192"),
        ("components=193", "components = 193 should be 12 to 192"),
        ("dropout=0.1", "unknown parameter of svfit 'dropout'"),
    ],
)
def test_bad_settings_are_one_line_and_nothing_is_written(settings, message, tmp_path, capsys):
    assert_refused(f"svfit[{settings}]", message, tmp_path, capsys)


def test_what_does_not_fit_a_backbone_is_a_reason():
    grouped = Backbone(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), (), ("0",))
    assert "groups" in svfit(rank=2).unsupported(grouped)
    assert "no linear or convolution layer" in svfit().unsupported(Backbone(nn.Embedding(3, 2), (), ()))
