"""Lower and upper streams of a share of the rows."""

import hashlib

import numpy as np
import pytest

from harness.run.streams import TrainingData


def rows_of(data, stream):
    return {row for _ in range(3 * data.size) for row in data.draw(stream)}


@pytest.mark.parametrize(
    ("case", "digest"),
    [
        ((21, 4, 0, False), "feb433c99189ad1f"),
        ((1003, 16, 3, False), "e00a3fea12f94491"),
        ((1003, 16, 3, True), "385868a2ca96d009"),
    ],
)
def test_halves_have_the_orders_that_finished_runs_had(case, digest):
    size, batch_size, seed, grouped = case
    lengths = np.random.default_rng(0).integers(1, 50, size) if grouped else None
    for share in ({}, {"upper_share": 0.5}):
        data = TrainingData(size, batch_size, seed, lengths, **share)
        drawn = [data.draw(stream) for stream in ("all", "lower", "upper") for _ in range(3 * size // batch_size)]
        assert hashlib.sha256(repr(drawn).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("size", [2, 3, 10, 47, 100])
@pytest.mark.parametrize("share", [0.001, 0.2, 0.29, 0.3, 0.75, 0.999])
def test_shares_are_disjoint_whole_and_of_their_size(size, share):
    data = TrainingData(size, 4, 0, upper_share=share)
    lower, upper = rows_of(data, "lower"), rows_of(data, "upper")
    assert not lower & upper
    assert lower | upper == set(range(size)) == rows_of(data, "all")
    assert abs(len(upper) - share * size) <= 0.5 or min(len(lower), len(upper)) == 1


def test_all_is_in_one_order_whatever_the_share():
    orders = [[TrainingData(50, 8, 0, upper_share=share).draw("all") for _ in range(9)] for share in (0.2, 0.5)]
    assert orders[0] == orders[1]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(ValueError, match="is not between 0 and 1"):
        TrainingData(10, 2, 0, upper_share=share)
