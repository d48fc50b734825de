"""The step before the first update."""

import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from harness.method import Adaptation
from harness.run import checkpoint
from tests.support.network import network_training


class Prepared(Adaptation):
    """Reads some batches before the first update, with gradients."""

    reads, calls = 3, 0

    def prepare(self, step):
        self.calls += 1
        assert (step.index, step.used) == (0, 0)
        for first in range(self.reads):
            step.backward(tuple(range(first, first + 8)))
        assert any(p.grad is not None for p in self.model.parameters())
        assert not self.optimizer.state


class Unfreezing(Adaptation):
    """Finds out before the first update which weights to train, and has none of them before."""

    def prepare(self, step):
        self.train("linear" if float(step.backward((0, 1))) > 0 else "transposed")

    def train(self, name):
        self.optimizer.add_param_group({"params": [self.model.get_parameter(f"{name}.weight").requires_grad_(True)]})

    def load_state_dict(self, state):
        self.train("linear")
        super().load_state_dict(state)


def factors(training):
    return [row["learning_rate_factor"] for row in training.history]


def test_it_comes_once_before_the_first_update_and_its_batches_count():
    training = network_training(Prepared)
    training.run(lambda training: None)
    assert training.adaptation.calls == 1
    assert training.used == 12
    assert training.index == len(training.history) == training.data.drawn["all"] == 9


def test_its_gradients_are_gone_before_the_first_update():
    plain, prepared = network_training(batches=1), network_training(Prepared, batches=4)
    for training in (plain, prepared):
        training.run(lambda training: None)
    norms = [training.history[0]["gradient_norm"] for training in (plain, prepared)]
    assert norms[0] == norms[1]


def test_the_schedule_begins_after_it_over_what_is_left():
    training = network_training(Prepared, batches=13, warmup=0.2)
    training.run(lambda training: None)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = get_linear_schedule_with_warmup(optimizer, 2, 10)
    assert len(training.history) == 10
    for factor in factors(training):
        assert factor == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()


def test_it_leaves_a_batch_to_train_with():
    training = network_training(Prepared, batches=4)
    training.run(lambda training: None)
    assert training.index == 1
    training = network_training(Prepared, batches=3)
    with pytest.raises(RuntimeError, match="must leave one of the budget's 3 batches to train with: raise the budget"):
        training.run(lambda training: None)
    assert training.used == 2


def test_a_resumed_run_does_not_prepare_again(tmp_path):
    whole = network_training(Prepared)
    whole.run(lambda training: None)
    first = network_training(Prepared)
    first.update()
    checkpoint.save(tmp_path, first.used, first.state_dict())
    resumed = network_training(Prepared)
    resumed.load_state_dict(checkpoint.load_newest(tmp_path).state)
    resumed.run(lambda training: None)
    assert resumed.adaptation.calls == 0
    assert resumed.history == whole.history
    assert factors(resumed) == factors(whole)
    for name, value in whole.adaptation.model.state_dict().items():
        assert torch.equal(resumed.adaptation.model.state_dict()[name], value)


def test_weights_that_it_takes_for_the_adapter_are_counted_once(tmp_path):
    training = network_training(Unfreezing)
    parameters = sum(p.numel() for p in training.adaptation.model.parameters())
    training.update()
    checkpoint.save(tmp_path, training.used, training.state_dict())
    resumed = network_training(Unfreezing)
    resumed.load_state_dict(checkpoint.load_newest(tmp_path).state)
    for each in (training, resumed):
        each.run(lambda training: None)
        count = each.sizes.parameters()
        assert (count.adapter_initial, count.adapter_final, count.total) == (0, 360, parameters)
