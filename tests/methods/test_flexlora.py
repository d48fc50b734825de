"""FlexLoRA: entropy against its definition, and the slips of the published code as tests that would catch them."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harness.contracts import METHOD_CONTRACTS, Subject
from harness.registry import make_method
from methods.flexlora import spectral_entropy
from tests.support.network import method_training

ADAPTER = "default"


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
def test_contracts(contract, tmp_path):
    """With other settings than those that every method is tried with, and layers of different ranks at the start."""
    settings = "components=15,decay=none,interval=2,tinit=1,tfinal=1,new_std=1.0,dropout=0.1,orthogonality=0"
    contract(Subject(f"flexlora[{settings}]", tmp_path))


class TestEntropy:
    def test_against_its_definition(self):
        generator = np.random.default_rng(0)
        for rank in (2, 3, 8):
            E = generator.normal(size=rank)
            s = E**2 / (E**2).sum()
            expected = -(s * np.log(s)).sum() / np.log(rank)
            assert spectral_entropy(torch.tensor(E)) == pytest.approx(expected, rel=1e-12)
            assert spectral_entropy(torch.tensor(-7 * E)) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize(
        ("sizes", "expected"),
        [([2.0, 2.0, 2.0], 1.0), ([1.0, 0.0, 0.0], 0.0), ([1.0, 1.0, 0.0, 0.0], 0.5), ([5.0], 0.0), ([0.0, 0.0], 0.0)],
    )
    def test_its_limits_are_numbers(self, sizes, expected):
        assert spectral_entropy(torch.tensor(sizes)) == pytest.approx(expected, abs=1e-15)


def with_values(values, **settings):
    """A run on a convolution, a linear and a transposed layer whose E are these, an exchange later."""
    given = {
        "components": sum(map(len, values)),
        "exchanged": 1,
        "tinit": 0,
        "tfinal": 1,
        "interval": 1,
        "decay": "none",
    }
    adaptation = method_training(make_method("flexlora", given | settings)).adaptation
    assert list(adaptation.ranks().values()) == [len(own) for own in values]
    with torch.no_grad():
        for layer, own in zip(adaptation.layers.values(), values, strict=True):
            layer.lora_E[ADAPTER].copy_(torch.tensor(own, dtype=torch.float64)[:, None])
    row = adaptation.after_step(SimpleNamespace(index=0, used=1, budget=9, rng=torch.Generator().manual_seed(0)))
    return [layer.lora_E[ADAPTER][:, 0].tolist() for layer in adaptation.layers.values()], row


class TestExchange:
    def test_the_lowest_entropy_loses_its_smallest_and_the_highest_gains(self):
        found, row = with_values([[2.0, 0.1], [1.0, 1.0], [1.0, 0.5]])
        assert found == [[2.0], [1.0, 1.0, 0.0], [1.0, 0.5]]
        assert row["exchanged"] == 1
        assert row["entropy"] == pytest.approx(
            [spectral_entropy(torch.tensor(v)) for v in ([2.0, 0.1], [1.0, 1.0], [1.0, 0.5])]
        )

    def test_the_smallest_is_that_of_least_magnitude(self):
        """By sign the largest singular value of the first layer would go."""
        found, _ = with_values([[-2.0, 0.1], [1.0, 1.0], [1.0, 0.5]])
        assert found[0] == [-2.0]

    def test_a_layer_of_one_component_is_no_number_too_large(self):
        """Its entropy is 0 / 0 by the formula, which torch.topk takes for the largest."""
        found, row = with_values([[1.0, 1.0], [0.3, 0.01], [5.0]])
        assert found == [[1.0, 1.0, 0.0], [0.3], [5.0]]
        assert all(math.isfinite(value) for value in row["entropy"])

    def test_a_layer_that_learned_nothing_is_no_number_too_large_either(self):
        found, row = with_values([[1.0, 1.0], [0.0, 0.0], [1.0, 0.5]])
        assert found == [[1.0, 1.0, 0.0], [0.0], [1.0, 0.5]]
        assert all(math.isfinite(value) for value in row["entropy"])

    def test_at_the_start_nothing_is_known_and_nothing_moves(self):
        found, row = with_values([[0.0, 0.0]] * 3)
        assert found == [[0.0, 0.0]] * 3
        assert row["exchanged"] == 0

    def test_a_layer_at_its_smaller_side_gains_nothing(self):
        """The convolution has 4 outputs; the next lower entropy gains instead."""
        found, row = with_values([[1.0] * 4, [1.0, 0.5, 0.5], [2.0, 0.1, 0.2]])
        assert found == [[1.0] * 4, [1.0, 0.5, 0.5, 0.0], [2.0, 0.2]]
        assert row["exchanged"] == 1

    def test_a_last_component_stays(self):
        found, row = with_values([[1.0, 1.0], [0.2], [0.1]])
        assert found == [[1.0, 1.0], [0.2], [0.1]]
        assert row["exchanged"] == 0

    @pytest.mark.parametrize("std", [0.02, 1.0])
    def test_new_directions_are_normal(self, std):
        adaptation = method_training(make_method("flexlora", {"rank": 2, "new_std": std})).adaptation
        new = adaptation.directions(torch.zeros(2, 4000), 3, torch.Generator().manual_seed(0))
        assert new.shape == (3, 4000)
        assert float(new.std()) == pytest.approx(std, rel=0.05)


def test_a_cut_keeps_the_largest_magnitudes():
    adaptation = method_training(make_method("flexlora", {"rank": 3})).adaptation
    E = adaptation.layers["linear"].lora_E[ADAPTER]
    with torch.no_grad():
        E.copy_(torch.tensor([[1.0], [-2.0], [0.5]]))
    with adaptation.at_rank(1):
        assert E[:, 0].tolist() == [0.0, -2.0, 0.0]
    assert E[:, 0].tolist() == [1.0, -2.0, 0.5]
