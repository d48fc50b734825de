"""Parameters that are cut, grown and rotated in training: moments go with them, and a resume finds their shapes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.method import Adaptation, Backbone
from harness.optimizer import adamw
from harness.run import checkpoint
from methods.shared.optimizer_state import append, change_basis, keep, match_shapes, shapes

OPTIMIZERS: dict[str, Any] = {
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, fused=False),
    "fused": functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, fused=True),
    "amsgrad": functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, amsgrad=True),
    "fused-amsgrad": functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, amsgrad=True, fused=True),
    "momentum": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=0.1),
}
FACTORS = {"column": (16, 8), "row": (8, 16), "kernel-in": (8, 4, 3, 3), "kernel-out": (16, 8, 1, 1)}
DIMS = {"column": 1, "row": 0, "kernel-in": 0, "kernel-out": 1}


def moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The state that has the parameter's shape."""
    return {n: v for n, v in optimizer.state[parameter].items() if isinstance(v, Tensor) and v.dim() > 0}


def trained(shape: tuple[int, ...], make: Any, steps: int = 4, seed: int = 0) -> tuple[nn.Parameter, Any]:
    """A parameter and its optimizer after some steps, with the last gradient still there."""
    generator = torch.Generator().manual_seed(seed)
    parameter = nn.Parameter(torch.randn(shape, generator=generator))
    optimizer = make([parameter])
    for _ in range(steps):
        parameter.grad = torch.randn(shape, generator=generator)
        optimizer.step()
    return parameter, optimizer


@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_kept_keeps_its_values_gradient_and_moments(kind, name):
    dim = DIMS[kind]
    parameter, optimizer = trained(FACTORS[kind], OPTIMIZERS[name])
    value, gradient = parameter.detach().clone(), parameter.grad.clone()
    before, kept = moments(optimizer, parameter), torch.tensor([5, 0, 2])
    assert before
    steps = optimizer.state[parameter].get("step")
    keep(parameter, kept, dim, optimizer)
    assert optimizer.param_groups[0]["params"][0] is parameter
    assert torch.equal(parameter, value.index_select(dim, kept))
    assert torch.equal(parameter.grad, gradient.index_select(dim, kept))
    after = moments(optimizer, parameter)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key].index_select(dim, kept)) for key in before)
    assert optimizer.state[parameter].get("step") is steps
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_appended_has_no_past(name):
    parameter, optimizer = trained((6, 3), OPTIMIZERS[name])
    value, before, new = parameter.detach().clone(), moments(optimizer, parameter), torch.randn(6, 2)
    append(parameter, new, 1, optimizer)
    assert torch.equal(parameter, torch.cat([value, new], 1))
    for key, moment in moments(optimizer, parameter).items():
        assert torch.equal(moment[:, :3], before[key])
        assert not moment[:, 3:].any()
    assert not parameter.grad[:, 3:].any()
    optimizer.step()


@pytest.mark.parametrize("steps_between", [0, 3])
@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_grown_by_zeros_and_cut_back_it_equals_the_one_that_was_never_grown(name, kind, steps_between):
    """Bit for bit, with steps in between and after, under weight decay. Each new entry's gradient is 0."""
    shape, dim = FACTORS[kind], DIMS[kind]
    (one, one_optimizer), (two, two_optimizer) = trained(shape, OPTIMIZERS[name]), trained(shape, OPTIMIZERS[name])
    size = shape[dim]
    new = torch.zeros([8 if place == dim else length for place, length in enumerate(shape)])
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(shape, generator=generator) for _ in range(6)]
    append(two, new, dim, two_optimizer)
    for gradient in gradients[:steps_between]:
        one.grad, two.grad = gradient, torch.cat([gradient, new], dim)
        one_optimizer.step()
        two_optimizer.step()
        assert not two.detach().narrow(dim, size, 8).any()
    keep(two, torch.arange(size), dim, two_optimizer)
    for gradient in gradients[steps_between:]:
        one.grad, two.grad = gradient.clone(), gradient.clone()
        one_optimizer.step()
        two_optimizer.step()
    assert torch.equal(one, two)
    for key, value in moments(one_optimizer, one).items():
        assert torch.equal(value, moments(two_optimizer, two)[key]), key


def test_a_low_rank_update_grown_by_zero_components_and_cut_back_is_the_one_that_was_never_grown():
    """Bit for bit, through the graph: both factors of an update B A, trained on with the components that are 0."""
    ends = []
    for grows in (False, True):
        torch.manual_seed(0)
        model = LowRank(rank=8)
        optimizer = adamw(model, 0.01, 0.1)
        for update in range(9):
            if grows and update == 3:
                append(model.B, torch.zeros(16, 8), 1, optimizer)
                append(model.A, torch.zeros(8, 16), 0, optimizer)
            if grows and update == 6:
                assert not model.B[:, 8:].any()
                keep(model.B, torch.arange(8), 1, optimizer)
                keep(model.A, torch.arange(8), 0, optimizer)
            descend(model, optimizer)
        ends.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_permutation_with_signs_changes_nothing_but_the_names_of_the_entries(name, dim):
    """Then the diagonal second moment loses nothing: steps before and after the change are the same steps."""
    parameter, optimizer = trained((3, 4, 5), OPTIMIZERS[name])
    plain, plain_optimizer = trained((3, 4, 5), OPTIMIZERS[name])
    size = parameter.shape[dim]
    order, signs = torch.randperm(size, generator=torch.Generator().manual_seed(0)), torch.ones(size)
    signs[::2] = -1
    P = torch.eye(size)[order] * signs[:, None]

    def turned(value: Tensor) -> Tensor:
        return (P @ value.transpose(0, dim).flatten(1)).view(-1, *value.transpose(0, dim).shape[1:]).transpose(0, dim)

    change_basis(parameter, turned(parameter.detach()), P, dim, optimizer)
    assert torch.equal(parameter.grad, turned(plain.grad))
    for _ in range(3):
        plain.grad = torch.randn(3, 4, 5)
        parameter.grad = turned(plain.grad).contiguous()
        optimizer.step()
        plain_optimizer.step()
    torch.testing.assert_close(parameter.detach(), turned(plain.detach()), rtol=1e-6, atol=1e-7)


def test_a_change_of_basis_maps_the_first_moment_and_by_squares_the_second():
    parameter, optimizer = trained((4, 3), OPTIMIZERS["fused-amsgrad"])
    before = moments(optimizer, parameter)
    P = torch.randn(2, 4, generator=torch.Generator().manual_seed(2))
    values = torch.ones(2, 3)
    change_basis(parameter, values, P, 0, optimizer)
    assert torch.equal(parameter, values)
    after = moments(optimizer, parameter)
    torch.testing.assert_close(after["exp_avg"], P @ before["exp_avg"])
    torch.testing.assert_close(after["exp_avg_sq"], P**2 @ before["exp_avg_sq"])
    torch.testing.assert_close(after["max_exp_avg_sq"], P**2 @ before["max_exp_avg_sq"])
    optimizer.step()


def test_the_second_moment_is_that_of_the_new_gradients_where_entries_are_uncorrelated():
    """A long run on white noise, turned by a rotation half way, ends with the moments of one that was turned before."""
    generator = torch.Generator().manual_seed(0)
    P = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    parameter = nn.Parameter(torch.zeros(6, 500))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, betas=(0.9, 0.99))
    scales = torch.tensor([1.0, 2, 3, 4, 5, 6])[:, None]
    expected = (P**2 @ scales**2)[:, 0]
    for _ in range(300):
        parameter.grad = scales * torch.randn(6, 500, generator=generator)
        optimizer.step()
    change_basis(parameter, P @ parameter.detach(), P, 0, optimizer)
    found = optimizer.state[parameter]["exp_avg_sq"].mean(1) / (1 - 0.99**300)
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0)


def test_moments_keep_to_the_parameters_layout_in_memory():
    """The fused AdamW pairs entries by their place in memory, whatever their strides say."""
    shape = (5, 3)
    start = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).T  # transposed in memory
    ends = []
    for fused in (False, True):
        parameter = nn.Parameter(start.clone(memory_format=torch.preserve_format))
        optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
        generator = torch.Generator().manual_seed(1)
        for step in range(6):
            gradient = torch.randn(shape, generator=generator)
            if step == 3:
                append(parameter, torch.zeros(5, 1), 1, optimizer)
                keep(parameter, torch.arange(3), 1, optimizer)
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
            optimizer.step()
        assert optimizer.state[parameter]["exp_avg"].stride() == parameter.stride()
        ends.append(parameter.detach())
    torch.testing.assert_close(*ends)


def test_before_the_first_step_and_without_an_optimizer_the_parameter_alone_changes():
    parameter = nn.Parameter(torch.arange(6.0).view(2, 3))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    keep(parameter, torch.tensor([2, 0]), 1, optimizer)
    assert parameter not in optimizer.state
    append(parameter, torch.ones(2, 1), 1, None)
    assert torch.equal(parameter.detach(), torch.tensor([[2.0, 0, 1], [5, 3, 1]]))
    assert parameter.grad is None


def test_nothing_may_be_left_and_something_may_come_again():
    parameter, optimizer = trained((4, 3), OPTIMIZERS["fused"])
    keep(parameter, torch.tensor([], dtype=torch.int64), 1, optimizer)
    assert parameter.shape == parameter.grad.shape == optimizer.state[parameter]["exp_avg"].shape == (4, 0)
    append(parameter, torch.ones(4, 2), 1, optimizer)
    parameter.grad = torch.ones(4, 2)
    optimizer.step()
    assert (parameter < 1).all()


@pytest.mark.parametrize("change", ["keep", "append", "change_basis"])
def test_a_state_of_another_shape_is_refused_and_nothing_is_changed(change):
    parameter = nn.Parameter(torch.ones(4, 3))
    optimizer = torch.optim.Adafactor([parameter])
    parameter.grad = torch.ones(4, 3)
    optimizer.step()
    value = parameter.detach().clone()
    with pytest.raises(ValueError, match="optimizer state 'row_var' is"):
        {
            "keep": lambda: keep(parameter, torch.tensor([0]), 1, optimizer),
            "append": lambda: append(parameter, torch.ones(4, 1), 1, optimizer),
            "change_basis": lambda: change_basis(parameter, torch.ones(4, 3), torch.eye(4), 0, optimizer),
        }[change]()
    assert torch.equal(parameter, value)


def test_a_state_without_a_rule_for_a_change_of_basis_is_refused():
    parameter = nn.Parameter(torch.ones(4, 3))
    optimizer = torch.optim.RMSprop([parameter])
    parameter.grad = torch.ones(4, 3)
    optimizer.step()
    with pytest.raises(ValueError, match="'square_avg' has no rule"):
        change_basis(parameter, torch.ones(4, 3), torch.eye(4), 0, optimizer)


class LowRank(nn.Module):
    """x (W + B A)^T with a frozen W. The components are added up in turn, so that zeros at the end change no bit."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(16, 16), requires_grad=False)
        self.B, self.A = nn.Parameter(torch.randn(16, rank)), nn.Parameter(torch.randn(rank, 16))

    def forward(self, x: Tensor) -> Tensor:
        components = (torch.outer(b, a) for b, a in zip(self.B.T, self.A, strict=True))
        return x @ sum(components, self.W).T


def descend(model: LowRank, optimizer: torch.optim.Optimizer) -> None:
    """One update on rows that depend on the state of the parameters alone."""
    optimizer.zero_grad()
    model(torch.linspace(-1, 1, 64).view(4, 16)).square().mean().backward()
    optimizer.step()


class Resizing(Adaptation):
    """Trains a `LowRank` whose rank changes: what a method's resume does."""

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"shapes": shapes(self.optimizer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        match_shapes(self.optimizer, state["shapes"])
        super().load_state_dict(state)


def resizing() -> tuple[Resizing, LowRank, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = LowRank(rank=4)
    optimizer = adamw(model, 0.01, 0.1)
    return Resizing(model, optimizer, Backbone(model, (), ())), model, optimizer


def at_update(update: int, model: LowRank, optimizer: torch.optim.Optimizer) -> None:
    """Grown by two at update 2, cut to three at update 5, rotated at update 7."""
    if update == 2:
        append(model.B, torch.zeros(16, 2), 1, optimizer)
        append(model.A, torch.ones(2, 16), 0, optimizer)
    if update == 5:
        for parameter, dim in ((model.B, 1), (model.A, 0)):
            keep(parameter, torch.tensor([5, 1, 0]), dim, optimizer)
    if update == 7:
        Q = torch.linalg.qr(torch.arange(9.0).view(3, 3) + torch.eye(3)).Q
        change_basis(model.B, model.B.detach() @ Q.T, Q, 1, optimizer)
        change_basis(model.A, Q @ model.A.detach(), Q, 0, optimizer)


def test_a_run_whose_sizes_change_resumes_bit_for_bit_after_every_update(tmp_path):
    _, whole, optimizer = resizing()
    for update in range(10):
        at_update(update, whole, optimizer)
        descend(whole, optimizer)
    adaptation, model, optimizer = resizing()
    for update in range(10):
        at_update(update, model, optimizer)
        descend(model, optimizer)
        checkpoint.save(tmp_path, update, adaptation.state_dict())
        state = checkpoint.load_newest(tmp_path).state
        assert state is not None
        adaptation, model, optimizer = resizing()
        objects = list(model.parameters())
        adaptation.load_state_dict(state)
        assert all(one is two for one, two in zip(model.parameters(), objects, strict=True))
    assert model.A.shape == (3, 16)
    assert torch.equal(model.A, whole.A)
    assert torch.equal(model.B, whole.B)
