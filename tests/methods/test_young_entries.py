"""Entries that join a parameter while it trains: AdamW's steps on them are those of a parameter of their own."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from harness.contracts import Subject, start
from methods.shared import optimizer_state
from methods.shared.optimizer_state import append, keep
from methods.shared.young_entries import YoungEntries

# In 24 updates of 12 layers they add components more than once, and never after two updates in a row.
ADDING = {
    "increlora[components=30,tinit=6,deltaT=2]": "shared/cored_lora.py",
    "increlora[components=30,tinit=6,deltaT=2,advance=false]": "shared/cored_lora.py",
    "triadaptlora[components=30,tinit=6,deltaT=2]": "shared/cored_lora.py",
    "elalora[rank=3,tinit=6,interval=2]": "shared/exchange.py",
    "flexlora[rank=3,tinit=6,interval=2]": "shared/exchange.py",
    "l1ra[rank=3,gate_learning_rate=0.3,every=0.1]": "l1ra.py",
}
BEFORE_TRAINING = {"shared/gradient_start.py"}  # it adds to parameters that have no past


def test_they_make_the_steps_of_a_parameter_of_their_own():
    """Random gradients: one parameter that grows twice, against three that begin when it does."""
    torch.manual_seed(0)
    gradients = torch.randn(40, 3, 6, dtype=torch.float64)
    ends, born = (2, 3, 6), (0, 7, 19)
    whole = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    optimizer = torch.optim.AdamW([whole], lr=0.1, weight_decay=0.0)
    young = YoungEntries(optimizer, {whole: 1})
    alone = [nn.Parameter(torch.zeros(3, size, dtype=torch.float64)) for size in (2, 1, 3)]
    others = [torch.optim.AdamW([each], lr=0.1, weight_decay=0.0) for each in alone]
    for update, gradient in enumerate(gradients):
        if update in born[1:]:
            append(whole, torch.zeros(3, (0, 1, 3)[born.index(update)]).double(), 1, optimizer)
            young.resized(whole, update)
        whole.grad = gradient[:, : whole.shape[1]].clone()
        young.before_step()
        optimizer.step()
        young.after_step(update + 1)
        for each, other, first, end, since in zip(alone, others, (0, *ends), ends, born, strict=False):
            if update >= since:
                each.grad = gradient[:, first:end].clone()
                other.step()
    torch.testing.assert_close(whole.detach(), torch.cat([each.detach() for each in alone], 1), rtol=1e-5, atol=1e-6)


def test_one_that_loses_entries_as_well():
    """The ages go with the entries that stay: against a parameter for each, with random gradients."""
    torch.manual_seed(0)
    whole = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.AdamW([whole], lr=0.1, weight_decay=0.0)
    young = YoungEntries(optimizer, {whole: 0})
    alone: list[tuple[nn.Parameter, torch.optim.Optimizer]] = []

    def join(number):
        for _ in range(number):
            parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
            alone.append((parameter, torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.0)))

    join(3)
    left = {5: [0, 2], 9: [2, 1], 14: [3, 0, 2]}
    for update in range(25):
        if update in left:
            keep(whole, torch.tensor(left[update]), 0, optimizer)
            young.kept(whole, left[update])
            alone[:] = [alone[place] for place in left[update]]
            append(whole, torch.zeros(2, dtype=torch.float64), 0, optimizer)
            young.resized(whole, update)
            join(2)
        gradient = torch.randn(len(whole), dtype=torch.float64)
        whole.grad = gradient.clone()
        young.before_step()
        optimizer.step()
        young.after_step(update + 1)
        for (parameter, own), value in zip(alone, gradient, strict=True):
            parameter.grad = value[None].clone()
            own.step()
    expected = torch.cat([parameter.detach() for parameter, _ in alone])
    torch.testing.assert_close(whole.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ADDING)
def test_a_new_entry_first_moves_by_a_learning_rate_at_most(name, tmp_path, monkeypatch):
    """As every entry does in its first step of AdamW. With the betas here it would be 2 after 6 updates by the
    parameter's age, as it would be with the usual ones after 400."""
    joined = []

    def watched(parameter, values, dim, optimizer):
        append(parameter, values, dim, optimizer)
        if values.shape[dim]:
            first = parameter.shape[dim] - values.shape[dim]
            joined.append((parameter, dim, first, values.clone()))

    monkeypatch.setattr(optimizer_state, "append", watched)
    training = start(Subject(name, tmp_path)).training
    for group in training.adaptation.optimizer.param_groups:
        group["betas"] = (0.1, 0.9)
    moves = []
    while training.used < training.budget:
        new = list(joined)
        joined.clear()
        training.update()
        assert not (new and joined), "the second would move what the first added"
        rates = {p: group["lr"] for group in training.adaptation.optimizer.param_groups for p in group["params"]}
        for parameter, dim, first, values in new:
            moved = parameter.detach().narrow(dim, first, values.shape[dim]) - values
            moves.append(float(moved.abs().max()) / rates[parameter])
    assert len(moves) > 3
    assert 0.5 < max(moves) < 1.05


def test_every_method_that_adds_entries_is_tried():
    methods = Path(optimizer_state.__file__).parents[1]
    adds = re.compile(r"optimizer_state import .*\bappend\b")
    found = {str(path.relative_to(methods)) for path in methods.rglob("*.py") if adds.search(path.read_text())}
    assert found == {*ADDING.values()} | BEFORE_TRAINING
