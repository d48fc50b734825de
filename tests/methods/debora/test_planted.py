"""The planted-ranks script, on a seed or two: it runs, and its best setting finds what was planted."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[3] / "scripts" / "planted_ranks.py"))


def test_the_problem_is_a_change_of_known_rank():
    import torch

    problem = SCRIPT["Planted"](3)
    assert sum(rank > 0 for rank in problem.ranks) == 3
    assert set(problem.ranks) <= {0, 1, 2, 3}
    batch = problem.collate(None, range(64), None)
    assert float(problem.loss(problem.network, batch, None)) == pytest.approx(1, rel=0.5)
    assert torch.equal(batch.labels, SCRIPT["Planted"](3).collate(None, range(64), None).labels)


@pytest.mark.parametrize("name", SCRIPT["SETTINGS"])
def test_every_setting_runs(name):
    parameters = SCRIPT["COMMON"] | SCRIPT["SETTINGS"][name]
    outcome = SCRIPT["solve"](parameters, 0, 60)
    assert 0 <= outcome.total <= 24
    assert outcome.error < 2


def test_the_best_setting_finds_the_planted_ranks():
    outcome = SCRIPT["solve"](SCRIPT["COMMON"] | SCRIPT["SETTINGS"]["matrix implicit"], 0, 3000)
    assert outcome.layers
    assert outcome.ranks
    assert outcome.effective
    assert outcome.error < 1e-3
