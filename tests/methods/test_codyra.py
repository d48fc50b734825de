"""CoDyRA for one task: its thresholds against the authors' loop, its limit LoRA, what is merged."""

import numpy as np
import pytest
import torch
from torch import nn

from harness.contracts.subject import method_of
from harness.method import Backbone
from harness.spec import TrainSpec
from tests.support.refusals import assert_refused, least_that_does
from tests.support.trained import trained


def test_without_a_threshold_and_with_gates_of_1_it_is_lora_bit_for_bit(tmp_path):
    limit = "codyra[rank=4,threshold=0,values=2,gate_init=ones,gate_ratio=0,beta2=0.999]"
    ours, lora = (trained(name, tmp_path) for name in (limit, "lora[rank=4,alpha=4]"))
    for row, other in zip(ours.training.history, lora.training.history, strict=True):
        assert other.items() <= row.items()
    found = ours.adaptation.model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in lora.adaptation.model.state_dict().items())


def test_the_dense_share_has_all_components(tmp_path):
    started = trained("codyra[rank=4,threshold=0.2,values=3]", tmp_path)
    ranks = [row["rank"] for row in started.training.history]
    assert ranks[:13] == 13 * [48]
    assert ranks[13] < 48
    assert 0 < ranks[-1] < ranks[13]


def test_other_moments_than_usual(tmp_path):
    """Every group of the optimizer has the decay, and so the run is another."""
    started = trained("codyra[rank=4,values=6]", tmp_path, batches=16)
    assert {group["betas"] for group in started.adaptation.optimizer.param_groups} == {(0.9, 0.9999)}
    other = trained("codyra[rank=4,values=6,beta2=0.999]", tmp_path, batches=16)
    assert other.training.history[-1]["loss"] != started.training.history[-1]["loss"]


def test_what_is_merged_computes_the_same(tmp_path):
    """The end of a task: W + B diag(g) A of the gates that are not 0."""
    started = trained("codyra[rank=4,values=6,threshold=0.2]", tmp_path)
    batch = started.batch(range(8))
    with torch.no_grad():
        expected = started.adaptation.model.eval()(**batch.inputs).logits
        for name, (B, A) in started.adaptation.scaled_pairs().items():
            layer = started.adaptation.layers[name]
            layer.get_base_layer().weight += B @ A
            layer.enable_adapters(False)
        torch.testing.assert_close(started.adaptation.model(**batch.inputs).logits, expected, rtol=0, atol=1e-5)


def authors_thresholds(total, dense_share, values, most):
    """The threshold of every update, None before the first, as their loop has them."""
    grid, place, found = np.linspace(0, most, values), 0, []
    threshold = grid[0]
    dense = dense_share * total
    width = int((total - dense) // values)
    for iteration in range(total):
        if width > 0 and iteration >= dense and iteration % width == 0:
            place += 1
            threshold = grid[min(len(grid) - 1, place)]
        found.append(threshold if iteration > dense else 0.0)
    return found


@pytest.mark.parametrize("total", [24, 100, 101, 137, 500])
@pytest.mark.parametrize(("dense", "values"), [(0.5, 3), (0.5, 10), (0.0, 7), (0.3, 12), (0.77, 4)])
def test_thresholds_are_those_of_the_authors_loop(total, dense, values):
    method = method_of(f"codyra[dense={dense},values={values},threshold=5e-3]")
    found = [method.threshold_at(used, total) for used in range(1, total + 1)]
    assert found == pytest.approx(authors_thresholds(total, dense, values, 5e-3), abs=1e-15)
    assert found[-1] == 5e-3


def notes(method, batches):
    backbone = Backbone(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), (), ("0", "1"))
    return method.notes(backbone, TrainSpec(batches=batches), 100)


@pytest.mark.parametrize("dense", [0.0, 0.3, 0.5, 0.77, 0.999])
def test_the_least_budget_that_is_named_does(dense):
    """Below it the authors' loop never has a threshold."""
    method = method_of(f"codyra[values=6,dense={dense}]")
    least = least_that_does(lambda batches: notes(method, batches))
    assert not any(authors_thresholds(least - 1, dense, 6, 1.0))


def test_a_dry_run_says_how_far_the_threshold_reaches():
    """49 of 50 numbers of the grid are above 0; the first update after the dense share has none."""
    told = "32 gates in 2 layers, drawn from N(0, 1): the thresholds of 500 updates sum to "
    (note,) = notes(method_of("codyra"), 500)
    assert note.startswith(told)
    assert float(note.removeprefix(told)) == pytest.approx(sum(authors_thresholds(500, 0.5, 50, 5e-3)), rel=1e-2)


def test_bad_settings_are_one_line(tmp_path, capsys):
    message = "values = 50 after dense = 0.5 of the budget does not fit into 99 batches: it takes at least 100"
    assert_refused("codyra", message, tmp_path, capsys, "--batches", "99")
