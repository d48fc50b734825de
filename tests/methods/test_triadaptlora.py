"""TriAdaptLoRA: the core of two triangles, its start, its score, how many layers grow when, sizes."""

import math

import numpy as np
import pytest
import torch

from harness import registry
from harness.contracts import Subject, start
from methods.triadaptlora import num_entries, places_of
from tests.support.network import KINDS, method_training

LAYERS = 12  # of the synthetic task


def triadapt(**settings):
    return registry.make_method("triadaptlora", settings)


def triangles(entries, blocks):
    """L and U, (r, r) each, entry by entry: of each block its rows of L, then its columns of U."""
    rank, numbers = sum(blocks), iter(entries)
    L, U, first = np.zeros((rank, rank)), np.zeros((rank, rank)), 0
    for size in blocks:
        end = first + size
        for row in range(first, end):
            for column in range(end):
                L[row, column] = next(numbers)
        for row in range(end):
            for column in range(first, end):
                U[row, column] = next(numbers)
        first = end
    assert next(numbers, None) is None
    return L, U


class TestCore:
    @pytest.mark.parametrize("blocks", [[1], [3], [1, 1, 1], [1, 2, 3], [2, 1, 4]])
    def test_it_is_a_lower_and_an_upper_triangle_of_blocks(self, blocks):
        count = sum(num_entries(size, sum(blocks[: place + 1])) for place, size in enumerate(blocks))
        entries = torch.randn(count, dtype=torch.float64)
        L, U = triangles(entries.tolist(), blocks)
        rank = sum(blocks)
        found = torch.zeros(rank * rank, dtype=torch.float64).index_add(0, places_of(blocks), entries).view(rank, rank)
        np.testing.assert_allclose(found, L + U)
        starts = np.repeat(np.cumsum([0, *blocks[:-1]]), blocks)
        assert not L[starts[:, None] < starts].any()  # nothing of L right of its blocks on the diagonal
        assert not U[starts[:, None] > starts].any()

    def test_the_update_of_a_run_that_has_grown(self):
        training = method_training(triadapt(components=12, increment=2, deltaT=2, learning_rate=0.05))
        training.run(lambda training: None)
        adaptation = training.adaptation
        assert sum(adaptation.ranks().values()) == 12
        for name, (B, A) in adaptation.scaled_pairs().items():
            up, down, entries = adaptation.parts(name)
            blocks = adaptation.blocks[name]
            assert sum(blocks) == adaptation.ranks()[name]
            L, U = triangles(entries.tolist(), blocks)
            expected = 16 / sum(blocks) * up.detach().flatten(1).numpy() @ (L + U) @ down.detach().flatten(1).numpy()
            np.testing.assert_allclose((B.flatten(1) @ A.flatten(1)).numpy(), expected, atol=1e-12)

    def test_sizes_by_ones(self, tmp_path):
        """r (m + n) + r (r + 1) numbers of a layer, the diagonal being in both triangles."""
        started = start(Subject("triadaptlora[components=40,increment=1]", tmp_path))
        started.training.run(lambda training: None)
        count, ranks = started.training.sizes.parameters(), started.adaptation.ranks()
        sides = {name: sum(started.before.shape(name)) for name in ranks}
        assert max(ranks.values()) > 2
        assert count.adapter_final == sum(r * sides[name] + r * (r + 1) for name, r in ranks.items())
        assert count.adapter_initial == sum(sides.values()) + 2 * LAYERS
        assert count.adapter_peak == count.adapter_final


class TestStart:
    def test_gradients_reach_the_core_at_once_and_the_factors_then(self):
        """A start with B, L and U at 0, as one copy of the source has it, has no gradient at all."""
        training = method_training(triadapt(components=3))
        before = {name: [p.detach().clone() for p in training.adaptation.parts(name)] for name in KINDS}
        training.update()
        for name in KINDS:
            assert (training.adaptation.parts(name)[2].detach() != before[name][2]).all()
        middle = {name: [p.detach().clone() for p in training.adaptation.parts(name)] for name in KINDS}
        training.update()
        for name in KINDS:
            for part, old in zip(training.adaptation.parts(name), middle[name], strict=True):
                assert (part.detach() != old).all()

    def test_a_new_block_moves_as_well(self):
        training = method_training(triadapt(components=12, increment=3, tinit=1, deltaT=1, orthogonality=0))
        training.update()
        training.update()
        (grown, *_) = (name for name, rank in training.adaptation.ranks().items() if rank > 1)
        entries = training.adaptation.parts(grown)[2]
        assert not entries[2:].any()
        training.update()
        assert entries[2:].all()


def test_the_score_is_the_rise_of_the_cores_norm_by_blocks():
    """|L + U|_F / blocks, now and at the round before, with the blocks that there were then."""
    training = method_training(triadapt(components=10, increment=2, tinit=1, deltaT=2, learning_rate=0.02))
    norms, rounds = dict.fromkeys(KINDS, 0.0), 0
    seen = []
    while sum(training.adaptation.ranks().values()) < 10:
        blocks = {name: list(sizes) for name, sizes in training.adaptation.blocks.items()}
        ranks = training.adaptation.ranks()
        training.update()
        if training.adaptation.ranks() != ranks:
            now = {}
            for name in KINDS:
                count = sum(num_entries(size, sum(blocks[name][: i + 1])) for i, size in enumerate(blocks[name]))
                L, U = triangles(training.adaptation.parts(name)[2][:count].tolist(), blocks[name])
                now[name] = math.sqrt(((L + U) ** 2).sum()) / len(blocks[name])
            seen.append([now[name] - norms[name] for name in KINDS])
            norms, rounds = now, rounds + 1
    training.fetch()
    assert rounds >= 2
    found = [row["score"] for row in training.history if "score" in row]
    np.testing.assert_allclose(found, seen, rtol=1e-9)


@pytest.mark.parametrize(
    ("growth", "expected"),
    [("linear", [1, 25, 50, 75, 99]), ("exponential", [1, 3, 10, 31, 95])],
)
def test_how_many_layers_grow(growth, expected):
    """(T - R) p, and exp(p ln(T - R)), rounded down, and one at least."""
    method = triadapt(growth=growth)
    assert [method.layers_to_grow(100, share) for share in (0.001, 0.25, 0.5, 0.75, 0.99)] == expected
    assert method.layers_to_grow(1, 0.5) == 1


def test_growth_speeds_up_over_the_run():
    """A round gives out more the later it is, up to one layer after the other."""
    linear, exponential = (
        triadapt(target_rank=9, increment=1, deltaT=10, growth=growth).sizes(50, 100)
        for growth in ("linear", "exponential")
    )
    assert np.diff(list(linear.values())).tolist() == [40, *[50] * 6, 48, 10]
    assert np.diff(list(exponential.values())).tolist()[:4] == [1, 3, 6, 10]
