"""ElaLoRA: its importance is AdaLoRA's, who offers what, and directions that are new."""

import pytest
import torch

from harness.contracts import METHOD_CONTRACTS, Subject
from harness.registry import make_method
from tests.support.network import method_training

ADAPTER = "default"
FACTORS = (("lora_E", 0), ("lora_A", 0), ("lora_B", 1))


@pytest.mark.parametrize("contract", METHOD_CONTRACTS, ids=lambda contract: contract.__name__)
def test_contracts(contract, tmp_path):
    """With other settings than those that every method is tried with, and layers of different ranks at the start."""
    settings = "components=25,offered=3,decay=late,interval=2,tinit=1,tfinal=1,beta1=0.5,dropout=0.1,orthogonality=0"
    contract(Subject(f"elalora[{settings}]", tmp_path))


def run_of(**settings):
    given = {"rank": 3, "learning_rate": 3e-2, "tinit": 4, "tfinal": 2, "interval": 3, "exchanged": 2}
    return method_training(make_method("elalora", given | settings))


def by_hand(history, beta1=0.85, beta2=0.85):
    """The smoothed |w g| times the smoothed distance from it, of one factor's (w, g), by AdaLoRA's equations."""
    sensitivity = uncertainty = torch.zeros_like(history[0][0])
    for weight, gradient in history:
        product = (weight * gradient).abs()
        sensitivity = beta1 * sensitivity + (1 - beta1) * product
        uncertainty = beta2 * uncertainty + (1 - beta2) * (product - sensitivity).abs()
    return sensitivity * uncertainty


class TestImportance:
    def test_it_is_that_of_adalora(self):
        """Against PEFT's own averages, and the sum over a component's numbers by hand."""
        training = run_of(exchanged=0)
        adaptation, after_step = training.adaptation, training.adaptation.after_step
        tuner = adaptation.model.base_model
        history = {}

        def watch(step):
            tuner.rankallocator.update_ipt(tuner.model)
            for name, layer in adaptation.layers.items():
                for factor, _ in FACTORS:
                    weight = getattr(layer, factor)[ADAPTER]
                    history.setdefault((name, factor), []).append((weight.detach().clone(), weight.grad.clone()))
            return after_step(step)

        adaptation.after_step = watch
        training.run(lambda training: None)
        averages = tuner.rankallocator.exp_avg_ipt, tuner.rankallocator.exp_avg_unc
        for name, layer in adaptation.layers.items():
            expected = torch.zeros(3, dtype=torch.float64)
            for factor, dim in FACTORS:
                scores = by_hand(history[name, factor])
                smoothed, uncertain = (average[f"{name}.{factor}.{ADAPTER}"] for average in averages)
                torch.testing.assert_close(smoothed * uncertain, scores, rtol=1e-12, atol=0)
                expected += scores.mean(1 - dim)
            found = adaptation.worth(layer)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
            assert found.min() > 0

    def test_averages_follow_their_components_through_an_exchange(self):
        """A component that stays has what it would have had, and a new one has what it gathered since."""
        training = run_of()
        adaptation = training.adaptation
        after_step, observe = adaptation.after_step, adaptation.observe
        history = {}  # of each layer's components, by the number of their birth: their (w, g) of every factor
        numbers = {name: list(range(3)) for name in adaptation.layers}
        born = dict.fromkeys(adaptation.layers, 3)
        rows, exchanges = {}, 0

        def remember():
            for name, layer in adaptation.layers.items():
                for place, number in enumerate(numbers[name]):
                    for factor, dim in FACTORS:
                        weight = getattr(layer, factor)[ADAPTER]
                        pair = tuple(v.detach().select(dim, place).clone() for v in (weight, weight.grad))
                        history.setdefault((name, number, factor), []).append(pair)
                rows[name] = layer.lora_A[ADAPTER].detach().clone()
            observe()

        def watch(step):
            nonlocal exchanges
            row = after_step(step)
            if row:
                exchanges += row["exchanged"]
                for name, layer in adaptation.layers.items():
                    after = layer.lora_A[ADAPTER].detach()
                    stay = [n for n, q in zip(numbers[name], rows[name], strict=True) if (after == q).all(1).any()]
                    new = len(after) - len(stay)
                    numbers[name] = stay + list(range(born[name], born[name] + new))
                    born[name] += new
            return row

        adaptation.after_step, adaptation.observe = watch, remember
        training.run(lambda training: None)
        assert exchanges == 4
        assert any(max(own) > 2 for own in numbers.values())
        for name, layer in adaptation.layers.items():
            expected = [sum(by_hand(history[name, n, f]).mean() for f, _ in FACTORS) for n in numbers[name]]
            torch.testing.assert_close(adaptation.worth(layer), torch.stack(expected), rtol=1e-9, atol=0)


class TestOffers:
    @pytest.mark.parametrize(("offered", "expected"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 0])])
    def test_a_layer_offers_its_least_important_and_never_its_last(self, offered, expected):
        adaptation = run_of(exchanged=0, offered=offered).adaptation
        adaptation.worth = lambda layer: torch.tensor([3.0, 1.0, 2.0])
        offers, seen = adaptation.offers()
        assert [offer.place for offer in offers if offer.layer == 0] == expected
        assert [offer.may_leave for offer in offers if offer.layer == 0] == [True, True, False][: len(expected)]
        assert seen == {"importance": [2.0] * 3}

    def test_a_layer_of_one_component_can_still_gain(self):
        training = run_of(rank=1, components=4, exchanged=1, offered=1)
        adaptation = training.adaptation
        assert list(adaptation.ranks().values()) == [2, 1, 1]
        adaptation.worth = lambda layer: torch.full((len(layer.lora_E[ADAPTER]),), float(layer is last))
        last = adaptation.layers["transposed"]
        training.run(lambda training: None)
        assert list(adaptation.ranks().values()) == [1, 1, 2]


def test_new_directions_have_length_one_and_are_orthogonal():
    adaptation = run_of().adaptation
    for rows in (torch.randn(3, 8).double(), torch.zeros(2, 6).double(), torch.randn(4, 7)):
        new = adaptation.directions(rows, 3, torch.Generator().manual_seed(0)).to(rows)
        tolerance = 1e-12 if rows.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(new @ new.T, torch.eye(3).to(rows), rtol=0, atol=tolerance)
        assert (new @ rows.T).abs().max() < 10 * tolerance
        other = adaptation.directions(rows, 3, torch.Generator().manual_seed(1))
        assert (new @ other.T.to(rows)).abs().max() < 0.999 or rows.shape[1] == 6


def test_a_cut_keeps_the_most_important():
    adaptation = run_of().adaptation
    layer = adaptation.layers["linear"]
    with torch.no_grad():
        layer.lora_E[ADAPTER].copy_(torch.tensor([[1.0], [-2.0], [3.0]]))
    adaptation.worth = lambda layer: torch.tensor([0.5, 0.7, 0.1])
    with adaptation.at_rank(2):
        assert layer.lora_E[ADAPTER][:, 0].tolist() == [1.0, -2.0, 0.0]
    assert layer.lora_E[ADAPTER][:, 0].tolist() == [1.0, -2.0, 3.0]
