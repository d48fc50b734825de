"""PARA: what one threshold for all layers keeps, against brute force; that 1 is LoRA; sizes, export."""

import itertools

import numpy as np
import pytest
import torch

from harness.cli import main
from harness.contracts import METHOD_CONTRACTS, Subject, start
from harness.contracts.subject import method_of
from tests.support.refusals import assert_refused
from tests.support.small_lora import (
    NETWORKS,
    FakeStep,
    adapted,
    assert_export_is_stock_lora,
    outputs,
    singular_values,
    truncated,
    updates,
)

SIDES = {"linear": {"0": 9 + 5, "2": 5 + 4}, "convolution": {"0": 27 + 6, "2": 6 + 4}}  # what a component costs


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
def test_contracts(contract, tmp_path):
    """With components so few that some layers have none left."""
    contract(Subject("para[rank=4,components=7]", tmp_path))


def cut(network, settings, factor=0.4):
    """An adaptation that was cut in the end, with the updates before; the first layer's is made smaller by `factor`,
    so that layers differ."""
    adaptation = adapted("para", network, settings)
    with torch.no_grad():
        adaptation.layers["0"].lora_B["default"].weight.mul_(factor)
    before = updates(adaptation)
    adaptation.finish(FakeStep(10))
    return adaptation, before


def squared_error(before, ranks):
    """Of the best approximations at these ranks, all layers together."""
    return sum(((update - truncated(update, ranks[name])) ** 2).sum() for name, update in before.items())


def found_error(before, adaptation):
    return sum(((before[name] - update) ** 2).sum() for name, update in updates(adaptation).items())


def all_ranks():
    return [dict(zip(("0", "2"), ranks, strict=True)) for ranks in itertools.product(range(4), repeat=2)]


@pytest.mark.parametrize("network", NETWORKS)
class TestThreshold:
    @pytest.mark.parametrize("energy", [0.3, 0.7, 0.9, 0.99])
    def test_the_fewest_stay_that_hold_the_energy(self, energy, network):
        adaptation, before = cut(network, {"energy": energy})
        squares = np.sort(np.concatenate([own**2 for own in singular_values(before).values()]))[::-1]
        kept = sum(adaptation.ranks().values())
        assert squares[:kept].sum() >= energy * squares.sum() > squares[: kept - 1].sum()

    @pytest.mark.parametrize("settings", [{"energy": 0.8}, {"components": 2}, {"components": 4}])
    def test_one_threshold_parts_the_singular_values_of_all_layers(self, settings, network):
        adaptation, before = cut(network, settings)
        values, ranks = singular_values(before), adaptation.ranks()
        kept = np.concatenate([own[: ranks[name]] for name, own in values.items()])
        removed = np.concatenate([own[ranks[name] :] for name, own in values.items()])
        assert kept.min() > removed.max()
        for name, update in updates(adaptation).items():
            np.testing.assert_allclose(update, truncated(before[name], ranks[name]), atol=1e-12)

    @pytest.mark.parametrize("settings", [{"energy": 0.6}, {"components": 3}, {"parameters": 40}])
    def test_the_squared_error_is_the_sum_of_what_was_removed(self, settings, network):
        adaptation, before = cut(network, settings)
        ranks = adaptation.ranks()
        removed = sum((own[ranks[name] :] ** 2).sum() for name, own in singular_values(before).items())
        assert removed > 0
        np.testing.assert_allclose(found_error(before, adaptation), removed, rtol=1e-10)

    @pytest.mark.parametrize("components", [1, 2, 3, 4, 5])
    def test_no_other_ranks_of_that_sum_are_better(self, components, network):
        adaptation, before = cut(network, {"components": components})
        assert sum(adaptation.ranks().values()) == components
        others = [squared_error(before, ranks) for ranks in all_ranks() if sum(ranks.values()) == components]
        np.testing.assert_allclose(found_error(before, adaptation), min(others), rtol=1e-10)

    @pytest.mark.parametrize("factor", [0.4, 1.0, 2.5])
    @pytest.mark.parametrize("share", [0.45, 0.6, 0.8, 0.95])
    def test_no_other_ranks_of_so_many_parameters_are_better(self, share, factor, network):
        """Nor does the next component fit: that of the largest sigma^2 by cost of those that were removed."""
        sides = SIDES[network]
        budget = max(round(share * 3 * sum(sides.values())), max(sides.values()))

        def cost(ranks):
            return sum(sides[name] * rank for name, rank in ranks.items())

        adaptation, before = cut(network, {"parameters": budget}, factor)
        ranks = adaptation.ranks()
        assert adaptation.adapter_parameters() == cost(ranks) <= budget
        others = [squared_error(before, other) for other in all_ranks() if cost(other) <= cost(ranks)]
        np.testing.assert_allclose(found_error(before, adaptation), min(others), rtol=1e-10)
        values = singular_values(before)
        worth = {name: own[ranks[name]] ** 2 / sides[name] for name, own in values.items() if ranks[name] < 3}
        assert cost(ranks) + sides[max(worth, key=lambda name: worth[name])] > budget

    def test_all_that_there_is_changes_nothing(self, network):
        for settings in ({"energy": 1}, {"components": 6}, {"parameters": 3 * sum(SIDES[network].values())}):
            adaptation = adapted("para", network, settings)
            before = {name: value.clone() for name, value in adaptation.model.state_dict().items()}
            adaptation.finish(FakeStep(10))
            assert all(torch.equal(value, before[name]) for name, value in adaptation.model.state_dict().items())

    def test_of_what_adds_nothing_nothing_stays(self, network):
        """A layer that no gradient reached, at an energy of 1."""
        adaptation = adapted("para", network, {"energy": 1})
        with torch.no_grad():
            adaptation.layers["0"].lora_B["default"].weight.zero_()
        before = outputs(adaptation, network)
        adaptation.finish(FakeStep(10))
        assert adaptation.ranks() == {"0": 0, "2": 3}
        torch.testing.assert_close(outputs(adaptation, network), before, rtol=0, atol=1e-12)


def trained(tmp_path, name):
    started = start(Subject(name, tmp_path), batches=12)
    started.training.run(lambda training: None)
    return started


def test_it_trains_as_lora_does_and_is_cut_then(tmp_path):
    ours, whole, lora = (trained(tmp_path, f"{name}") for name in ("para[rank=4,energy=0.5]", "para[energy=1]", "lora"))
    assert ours.training.history == trained(tmp_path, "lora[rank=4]").training.history
    assert whole.training.history == lora.training.history
    found = whole.adaptation.model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in lora.adaptation.model.state_dict().items())


def test_sizes_are_those_before_and_after(tmp_path):
    started = trained(tmp_path, "para[rank=4,parameters=700]")
    count, ranks = started.training.sizes.parameters(), started.adaptation.ranks()
    assert count.adapter_initial == count.adapter_peak == 4 * 448
    assert count.adapter_final == sum(rank * sum(started.before.shape(layer)) for layer, rank in ranks.items()) <= 700
    assert count.adapter_final > 700 - max(sum(started.before.shape(layer)) for layer in ranks)
    assert count.stored_bytes == 4 * (count.adapter_final + count.head)
    assert [size.batches for size in started.training.sizes.trajectory] == [0, 12]


@pytest.mark.parametrize("settings", ["energy=0.5", "components=5", "parameters=500"])
def test_an_export_is_a_stock_lora_at_these_ranks(settings, tmp_path):
    started = trained(tmp_path, f"para[rank=4,{settings}]")
    assert len(set(started.adaptation.ranks().values())) > 1
    assert_export_is_stock_lora(started, tmp_path / "export")


def test_stock_peft_trains_what_stayed_in_its_place():
    form = method_of("para[rank=8,alpha=4]").peft_form({"a": 2, "b": 1, "c": 0})
    assert (form.config["r"], form.config["lora_alpha"]) == (2, 1.0)
    assert form.config["alpha_pattern"] == {"^b": 0.5}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("energy=0", "para.energy = 0 is not allowed"),
        ("energy=1.1", "para.energy = 1.1 is not allowed"),
        ("energy=0.9,components=3", "energy = 0.9 and components = 3 are set together; give one of them"),
        ("parameters=900,components=3", "components = 3 and parameters = 900 are set together; give one of them"),
        ("rank=17", "rank = 17 is above the smaller side of layer"),
        ("components=97", "components = 97 is above the 96 that there are"),
        ("parameters=3585", "parameters = 3585 is above the 3584 that there are"),
        (
            "parameters=47",
            "parameters = 47 holds no component of layer 'bert.encoder.layer.0.intermediate.dense', which ",
        ),
    ],
)
def test_bad_settings_are_one_line(settings, message, tmp_path, capsys):
    assert_refused(f"para[{settings}]", message, tmp_path, capsys)


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ("para", "after training, of 96 components in 12 layers the fewest stay that hold 0.9 of the squared singular"),
        ("para[components=7]", "after training, of 96 components in 12 layers the 7 largest stay"),
        (
            "para[parameters=999]",
            "after training, of 96 components in 12 layers those stay that fit into 999 parameters",
        ),
    ],
)
def test_a_dry_run_says_what_stays(settings, note, tmp_path, capsys):
    options = ["--tasks", "synthetic", "--batches", "9", "--results", str(tmp_path), "--dry-run"]
    assert main(["run", "--methods", settings, *options]) == 0
    assert note in " ".join(capsys.readouterr().out.split())
