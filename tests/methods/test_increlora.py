"""IncreLoRA: its score by autograd, advance learning, rounds, sizes."""

import math

import numpy as np
import pytest
import torch

from harness import registry
from harness.contracts import Subject, start
from harness.method import as_matrix
from harness.run.streams import TrainingData
from tests.support.network import KINDS, method_training

LAYERS = 12  # of the synthetic task


def on_network(layers=KINDS, micro_batches=1, **settings):
    return method_training(registry.make_method("increlora", settings), layers, micro_batches=micro_batches)


def gradients(training, batch):
    """The gradient of the loss in each layer's effective weight, (outputs, inputs), by autograd through the whole."""
    layers = {name: layer.get_base_layer() for name, layer in training.adaptation.layers.items()}
    weights = [layer.weight.requires_grad_(True) for layer in layers.values()]
    loss = training.task.loss(training.adaptation.model, training.task.collate(training.encoded, batch, None), None)
    found = torch.autograd.grad(loss, weights)
    for weight in weights:
        weight.requires_grad_(False)
    return {name: as_matrix(layer, value) for (name, layer), value in zip(layers.items(), found, strict=True)}


class TestScore:
    @pytest.mark.parametrize("micro_batches", [1, 2, 4])
    def test_against_autograd_over_the_updates_before_a_round(self, micro_batches):
        """s = sum|dW o G| / sqrt(m n), its average and that of |s - I|: linear layers, kernels and transposed ones."""
        settings = {"beta1": 0.7, "beta2": 0.6, "tinit": 4, "deltaT": 2, "components": 5, "alpha": 300.0}
        training = on_network(micro_batches=micro_batches, learning_rate=0.05, **settings)
        batches, average, spread = TrainingData(24, 8, 0), dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0)
        for update in range(6):
            assert sum(training.adaptation.ranks().values()) == 3, update
            found, pairs = gradients(training, batches.draw("all")), training.adaptation.scaled_pairs()
            for name, (B, A) in pairs.items():
                product = (B.flatten(1) @ A.flatten(1)) * found[name]
                s = product.abs().sum().item() / math.sqrt(product.numel())
                average[name] = 0.7 * average[name] + 0.3 * s
                spread[name] = 0.6 * spread[name] + 0.4 * abs(s - average[name])
            training.update()
        training.fetch()
        scores = [average[name] * spread[name] for name in KINDS]
        assert min(scores) > 0
        np.testing.assert_allclose(training.history[-1]["score"], scores, rtol=1e-9)
        best = sorted(KINDS, key=lambda name: -scores[KINDS.index(name)])[:2]
        assert {name for name, rank in training.adaptation.ranks().items() if rank > 1} == set(best)

    def test_the_watch_on_gradients_changes_nothing_and_ends_with_the_growth(self):
        """Frozen weights require no gradient between updates, and none is computed once the target is reached."""
        training = on_network(components=5, tinit=0, deltaT=2)
        weights = [layer.get_base_layer().weight for layer in training.adaptation.layers.values()]
        before = [weight.detach().clone() for weight in weights]
        assert training.adaptation.for_batch(training) is not None
        while sum(training.adaptation.ranks().values()) < 5:
            training.update()
            assert not any(weight.requires_grad or weight.grad is not None for weight in weights)
        assert training.adaptation.for_batch(training) is None
        assert all(torch.equal(one, other) for one, other in zip(weights, before, strict=True))


class TestAdvanceLearning:
    def test_a_reserve_trains_its_vectors_and_not_its_lambda(self):
        training = on_network(components=12, tinit=5, deltaT=1, increment=2, learning_rate=0.01)
        first = {name: [part.detach().clone() for part in training.adaptation.parts(name)] for name in KINDS}
        for _ in range(5):
            training.update()
        for name in KINDS:
            B, A, entries = (part.detach() for part in training.adaptation.parts(name))
            assert entries[1:].tolist() == [1e-5, 1e-5]
            assert entries[0] != 0
            assert (B[:, 1:] != first[name][0][:, 1:]).all()
            assert (A[1:] != first[name][1][1:]).all()

    def test_it_is_what_a_layer_gains(self):
        """The triples in use after a round are those that were in reserve, with their moments, and move on."""
        training = on_network(components=12, tinit=5, deltaT=1, increment=2, top_h=1, learning_rate=0.01)
        for _ in range(5):
            training.update()
        state = training.adaptation.optimizer.state
        before = {name: [p.detach().clone() for p in training.adaptation.parts(name)] for name in KINDS}
        training.update()
        (grown,) = (name for name, rank in training.adaptation.ranks().items() if rank == 3)
        B, A, entries = training.adaptation.parts(grown)
        assert (len(A), len(entries), B.shape[1]) == ((4, 4, 4) if grown == "convolution" else (5, 5, 5))
        assert (A.detach()[1:3] - before[grown][1][1:3]).abs().max() < 0.011  # one step of AdamW, not another draw
        assert state[A]["exp_avg"][1:3].abs().min() > 0
        assert not state[A]["exp_avg"][3:].any()
        assert entries[1:].tolist() == [1e-5] * (len(entries) - 1)
        training.update()
        assert (entries.detach()[1:3] - 1e-5).abs().min() > 1e-3
        assert entries[3:].tolist() == [1e-5] * (len(entries) - 3)

    @pytest.mark.parametrize("advance", [True, False])
    def test_nothing_of_it_is_left_in_the_end(self, advance, tmp_path):
        """Sizes with it while the layers grow, without from the target on."""
        chosen = f"increlora[components=24,increment=2,tinit=2,deltaT=2,advance={str(advance).lower()}]"
        started = start(Subject(chosen, tmp_path))
        started.training.run(lambda training: None)
        sides = [sum(started.before.shape(name)) + 1 for name in started.adaptation.ranks()]
        rows = {row["batches"]: row["ranks"] for row in started.training.history if "ranks" in row}
        expected = {0: [3 if advance else 1] * LAYERS}
        for batches, ranks in rows.items():
            reserve = 2 if advance and batches < 8 else 0
            expected[batches] = [rank + reserve for rank in ranks]
        sizes = {size.batches: size.adapter_parameters for size in started.training.sizes.trajectory}
        assert sizes == {
            batches: sum(rank * side for rank, side in zip(ranks, sides, strict=True))
            for batches, ranks in expected.items()
        }
        assert list(sizes) == [0, 4, 6, 8]
        ranks = started.adaptation.ranks()
        assert [len(A) for _, A, _ in map(started.adaptation.parts, ranks)] == list(ranks.values())

    def test_a_run_that_is_too_short_ends_without_it_as_well(self, tmp_path):
        """Such a run is refused when it is planned."""
        started = start(Subject("increlora[components=90,increment=1,tinit=2,deltaT=5]", tmp_path))
        started.training.run(lambda training: None)
        ranks = started.adaptation.ranks()
        assert sum(ranks.values()) == LAYERS + 4 * 2
        assert [len(entries) for *_, entries in map(started.adaptation.parts, ranks)] == list(ranks.values())


def test_one_round_over_all_layers_is_a_rank_more_in_each(tmp_path):
    started = start(Subject(f"increlora[target_rank=2,top_h={LAYERS},increment=1]", tmp_path))
    started.training.run(lambda training: None)
    assert set(started.adaptation.ranks().values()) == {2}
    assert [size.rank for size in started.training.sizes.trajectory] == [LAYERS, 2 * LAYERS]


@pytest.mark.parametrize(("target", "increment"), [(2, 1), (4, 2), (6, 3), (8, 4), (3, 1), (1, 1)])
def test_a_layer_gains_half_of_the_mean_target_at_once(target, increment):
    """The map of the authors' code, and what is between."""
    assert registry.make_method("increlora", {"target_rank": target}).each(LAYERS) == increment
    assert registry.make_method("increlora", {"components": target * LAYERS}).each(LAYERS) == increment
