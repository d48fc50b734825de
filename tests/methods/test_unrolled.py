"""The hypergradient of one unrolled step, against autograd through that step."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from harness.errors import InputError
from harness.method import Adaptation, Backbone
from harness.run.streams import TrainingData
from harness.run.training import Training
from harness.spec import TrainSpec
from harness.task import Batch
from methods.shared.unrolled import batches_a_step, check_halves, unrolled_gradient

UPPER, LOWER = (0,), (1,)


@dataclass
class TwoLevels:
    """A step of which a batch is a level, whose objective is a function without arguments."""

    objectives: dict
    used: list = field(default_factory=list)

    def loss(self, batch):
        self.used.append(batch)
        return self.objectives[batch]()

    def backward(self, batch):
        loss = self.loss(batch)
        loss.backward()
        return loss.detach()


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Quadratic:
    """Both levels quadratic in the weights, a vector and a matrix, and in two variables."""

    def __init__(self):
        self.weights = [numbers(5, seed=1).requires_grad_(), numbers(2, 3, seed=2).requires_grad_()]
        self.variables = [numbers(3, seed=3).requires_grad_(), numbers(1, seed=4).requires_grad_()]
        self.H, self.K = numbers(15, 15, seed=5), numbers(7, 15, seed=6)

    def of(self, form, weights):
        everything = torch.cat([tensor.flatten() for tensor in (*weights, *self.variables)])
        return ((form @ everything).square().sum() + form[0] @ everything) / 2

    def by_autograd(self, size):
        """The gradient of f1 after the step of f2, at the weights that there are, through the step."""
        gradients = torch.autograd.grad(self.of(self.H, self.weights), self.weights, create_graph=True)
        moved = [weight - size * gradient for weight, gradient in zip(self.weights, gradients, strict=True)]
        found = torch.autograd.grad(self.of(self.K, moved), self.variables)
        return found, [weight.detach() for weight in moved]

    def step(self):
        return TwoLevels(
            {UPPER: lambda: self.of(self.K, self.weights), LOWER: lambda: self.of(self.H, self.weights)},
        )


@pytest.mark.parametrize("size", [0.0, 1e-3, 0.2, 1.0])
def test_it_is_the_derivative_through_the_step(size):
    """Exactly, of a quadratic."""
    problem, step = Quadratic(), None
    expected, moved = problem.by_autograd(size)
    with torch.no_grad():
        for weight, value in zip(problem.weights, moved, strict=True):
            weight.copy_(value)
    step = problem.step()
    loss, found = unrolled_gradient(step, UPPER, LOWER, problem.weights, problem.variables, size)
    assert loss == problem.of(problem.K, problem.weights)
    for own, value in zip(found, expected, strict=True):
        torch.testing.assert_close(own, value, rtol=1e-7, atol=1e-7)
    assert step.used == [UPPER, LOWER, LOWER][: batches_a_step(size)]


def test_of_another_function_it_is_the_mixed_derivative_where_the_weights_are():
    w, a = numbers(6, seed=1).requires_grad_(), numbers(4, seed=2).requires_grad_()
    X = numbers(6, 4, seed=3)

    def lower():
        return (w.sin() @ X @ a.tanh()).square()

    def upper():
        return ((w @ X) * a).square().sum()

    direct, v = torch.autograd.grad(upper(), (a, w))
    (gradient,) = torch.autograd.grad(lower(), w, create_graph=True)
    (mixed,) = torch.autograd.grad(gradient @ v, a)
    _, (found,) = unrolled_gradient(TwoLevels({UPPER: upper, LOWER: lower}), UPPER, LOWER, [w], [a], 0.7)
    torch.testing.assert_close(found, direct - 0.7 * mixed, rtol=1e-3, atol=1e-3)


def test_nothing_is_left_moved():
    """Bit for bit, where Betty's leaves the weights at one end of the difference."""
    problem = Quadratic()
    before = [tensor.detach().clone() for tensor in (*problem.weights, *problem.variables)]
    problem.weights[0].grad = numbers(5)
    expected = unrolled_gradient(problem.step(), UPPER, LOWER, problem.weights, problem.variables, 1.0)[1]
    for tensor, value in zip((*problem.weights, *problem.variables), before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor.grad is None
    again = unrolled_gradient(problem.step(), UPPER, LOWER, problem.weights, problem.variables, 1.0)[1]
    assert all(torch.equal(one, two) for one, two in zip(expected, again, strict=True))


def test_where_the_upper_level_does_not_ask_for_the_weights_there_is_no_difference():
    """Instead of a division by 0."""
    w, a = numbers(3).requires_grad_(), numbers(3, seed=1).requires_grad_()
    step = TwoLevels({UPPER: lambda: a.square().sum() + 0 * w.sum(), LOWER: lambda: (w * a).sum()})
    _, (found,) = unrolled_gradient(step, UPPER, LOWER, [w], [a], 1.0)
    torch.testing.assert_close(found, 2 * a.detach())
    assert step.used == [UPPER]


class Noisy(nn.Module):
    """Linear in its weight and in its variable apart, each behind a dropout of its own."""

    def __init__(self):
        super().__init__()
        self.weight, self.variable = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
        self.dropout = nn.Dropout(0.5)

    def forward(self, images):
        return (self.dropout(images) * self.weight).sum() + (self.dropout(images) * self.variable).sum()


class Sum:
    def collate(self, encoded, rows, generator):
        return Batch({"images": encoded.inputs["images"][list(rows)]}, encoded.labels[list(rows)])

    def loss(self, model, batch, generator):
        return model(**batch.inputs)


def test_both_ends_of_the_difference_see_the_same_dropout():
    """There is no mixed derivative, but other masks would look like a large one."""
    module = Noisy().train()
    backbone = Backbone(module, (), ())
    adaptation = Adaptation(module, torch.optim.SGD(module.parameters(), 0.1), backbone)
    encoded = Batch({"images": torch.ones(8, 4)}, torch.zeros(8))
    data, spec = TrainingData(8, 4, 0), TrainSpec(batches=9, batch_size=4)
    training = Training(adaptation, Sum(), encoded, data, spec, torch.device("cpu"), 9)
    torch.manual_seed(0)
    plain = unrolled_gradient(training, (0, 1), (2, 3), [module.weight], [module.variable], 0.0)[1]
    torch.manual_seed(0)
    unrolled = unrolled_gradient(training, (0, 1), (2, 3), [module.weight], [module.variable], 1.0)[1]
    assert torch.equal(plain[0], unrolled[0])
    assert training.used == 4


@pytest.mark.parametrize(
    ("rows", "held_out", "left"), [(1, 0.3, "1 and 0"), (2, 0.5, "1 and 1"), (5, 0.2, "4 and 1"), (3, 0.9, "1 and 2")]
)
def test_a_level_with_one_row_is_refused(rows, held_out, left):
    with pytest.raises(InputError, match=f"held_out = {held_out} of {rows} training rows leaves {left}: each level"):
        check_halves(rows, held_out)


@pytest.mark.parametrize(("rows", "held_out"), [(4, 0.5), (5, 0.3), (100, 0.02)])
def test_two_rows_each_are_enough(rows, held_out):
    check_halves(rows, held_out)
