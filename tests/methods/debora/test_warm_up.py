"""No upper-level step before the warm-up is over, and the basis that the search begins in."""

from __future__ import annotations

import copy

import pytest
import torch

from harness.contracts.subject import CPU
from harness.run.streams import TrainingData, seed_everything
from harness.run.training import Training
from methods.debora.method import Debora
from tests.methods.debora.runs import adaptation_of, dense, logits, numbers, started


def with_warm_up(method: Debora, warm_up: float, batches: int) -> list[dict]:
    """The history of a run whose learning rate warms up over this share of it."""
    run = started("rank=2")
    train = run.training.train.model_copy(update={"warmup": warm_up, "batches": batches})
    seed_everything(0)
    data = TrainingData(run.training.data.size, train.batch_size, 0)
    adaptation = method.start(copy.deepcopy(run.before), train, data, torch.Generator().manual_seed(0))
    training = Training(adaptation, run.task, run.training.encoded, data, train, CPU, batches)
    training.run(lambda training: None)
    return training.history


@pytest.mark.parametrize("batches", [17, 20, 31])
@pytest.mark.parametrize("warm_up", [0.0, 0.06, 0.1, 0.35])
@pytest.mark.parametrize("kind", ["free", "direct"])
def test_no_upper_step_before_the_learning_rate_has_peaked(kind, warm_up, batches):
    history = with_warm_up(Debora(rank=2, n0=100, T_max=1, hypergradient=kind), warm_up, batches)
    first = next(n for n, row in enumerate(history) if "gap" in row)
    assert max(row["learning_rate_factor"] for row in history[: first + 1]) == 1.0


def test_where_the_learning_rate_peaks_after_the_search_no_step_is_made_and_the_target_is_reached():
    history = with_warm_up(Debora(rank=2, components=5, search_fraction=0.3), 0.4, 20)
    assert not any("gap" in row for row in history)
    assert [(row["cut"], row["rank"]) for row in history if "cut" in row] == [(19, 5)]


@pytest.mark.parametrize("T_max", [1, 3])
@pytest.mark.parametrize("settings", ["recipe=ours", "recipe=ours,hypergradient=path,path_points=2", "recipe=paper"])
def test_without_a_warm_up_the_first_step_comes_after_its_updates(settings, T_max):
    run = started(f"{settings},rank=2,warm_up=0,T_max={T_max},n0=100", batches=16)
    run.training.run(lambda training: None)
    assert next(n for n, row in enumerate(run.training.history) if "gap" in row) == T_max - 1


@pytest.mark.parametrize("settings", ["recipe=ours", "recipe=ours,hypergradient=direct", "recipe=paper"])
def test_with_a_warm_up_it_comes_so_many_later(settings):
    run = started(f"{settings},rank=2,warm_up=0.2,T_max=2,n0=100", batches=20)
    run.training.run(lambda training: None)
    assert [n for n, row in enumerate(run.training.history) if "gap" in row][:2] == [5, 7]


@pytest.mark.parametrize("geometry", ["matrix", "oblique", "stiefel"])
def test_the_search_begins_in_a_basis_that_leaves_the_function(geometry):
    """The same run with cut_by=s, which rotates nothing, is the same function when the warm-up ends."""
    found = {}
    for cut_by in ("size", "s"):
        settings = f"recipe=ours,geometry={geometry},rank=4,tau=40,warm_up=0.2,cut_by={cut_by},learning_rate=0.02"
        found[cut_by] = started(settings, 5, batches=25)
    torch.testing.assert_close(logits(found["size"]), logits(found["s"]), rtol=1e-4, atol=1e-5)
    adaptation = adaptation_of(found["size"])
    own = numbers(adaptation)
    changed = 0
    for name, (U, s, V) in own.items():
        before = numbers(adaptation_of(found["s"]))[name]
        torch.testing.assert_close(dense((U, s, V)), dense(before), rtol=1e-3, atol=1e-5)
        changed += not torch.allclose(U, before[0], atol=1e-4)
        sizes = s * U.norm(dim=0) * V.norm(dim=0)
        assert (sizes.diff() <= 1e-5).all()
        if geometry == "matrix":
            for factor in (U, V):
                gram = factor.T @ factor
                torch.testing.assert_close(gram, gram.diag().diag(), rtol=0, atol=1e-5)
    assert changed > 6 or geometry != "matrix"
    torch.testing.assert_close(torch.cat([s for _, s, _ in own.values()]), adaptation.search.s)
    found["size"].training.update()
    torch.testing.assert_close(torch.cat([s for _, s, _ in numbers(adaptation).values()]), adaptation.search.s)
