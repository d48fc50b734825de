"""The loop's promises: data order, budget, schedule, accumulation, precision, divergence."""

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from harness.contracts import Subject, start
from harness.errors import Diverged
from harness.method import Adaptation, Backbone
from harness.optimizer import adamw
from harness.run import checkpoint
from harness.run.prediction import predict
from harness.run.streams import TrainingData, derived_seed
from harness.run.training import Training
from harness.spec import TrainSpec


def test_a_stream_passes_over_all_rows_again_and_again():
    data = TrainingData(size=10, batch_size=4, seed=0)
    drawn = [row for _ in range(5) for row in data.draw("all")]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]


def test_halves_are_equal_disjoint_and_random():
    data = TrainingData(size=21, batch_size=10, seed=0)
    lower, upper = set(data.draw("lower")), set(data.draw("upper"))
    assert len(lower) == len(upper) == 10
    assert not lower & upper
    assert set(TrainingData(size=21, batch_size=10, seed=1).draw("lower")) != lower


def test_order_depends_on_the_seed_and_on_nothing_drawn_elsewhere():
    one, two = TrainingData(50, 8, seed=3), TrainingData(50, 8, seed=3)
    two.draw("upper")
    assert [one.draw("all") for _ in range(9)] == [two.draw("all") for _ in range(9)]
    assert TrainingData(50, 8, seed=4).draw("all") != TrainingData(50, 8, seed=3).draw("all")


def test_a_batch_larger_than_the_split_repeats_rows():
    assert len(TrainingData(size=3, batch_size=8, seed=0).draw("all")) == 8


def test_seeds_for_different_purposes_differ():
    assert len({derived_seed(s, w) for s in range(20) for w in ("a", "b", 1)}) == 60


def training_with(train, subject=None, tmp_path=None):
    started = start(Subject("full[learning_rate=1e-2]", tmp_path))
    old = started.training
    budget = train.budget(old.data.size)
    return Training(old.adaptation, old.task, old.encoded, old.data, train, old.device, budget)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.33])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedule_is_that_of_transformers(schedule, warmup, tmp_path):
    train = TrainSpec(batches=30, batch_size=4, warmup=warmup, schedule=schedule)
    training = training_with(train, tmp_path=tmp_path)
    training.run(lambda training: None)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = schedule.replace("constant", "constant_with_warmup")
    reference = get_scheduler(theirs, optimizer, int(np.ceil(30 * warmup)), 30)
    for row in training.history:
        assert row["learning_rate_factor"] == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()


def test_the_cosine_is_half_a_period_over_what_follows_the_warmup(tmp_path):
    training = training_with(TrainSpec(batches=20, batch_size=4, warmup=0.2, schedule="cosine"), tmp_path=tmp_path)
    training.run(lambda training: None)
    factors = [row["learning_rate_factor"] for row in training.history]
    rising, falling = [done / 4 for done in range(4)], [np.cos(np.pi * done / 32) ** 2 for done in range(16)]
    assert factors == pytest.approx(rising + falling)


def test_a_restarted_schedule_covers_what_is_left(tmp_path):
    training = training_with(TrainSpec(batches=20, batch_size=4, warmup=0.2), tmp_path=tmp_path)

    def restart(training):
        if training.index == 10:
            training.restart_schedule()

    training.run(restart)
    factors = [row["learning_rate_factor"] for row in training.history]
    assert factors[10] == 0.0  # warm-up begins again
    assert max(factors[11:]) == 1.0


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path):
    gradients = []
    for pieces in (1, 3):
        training = training_with(TrainSpec(batches=1, batch_size=8, micro_batches=pieces), tmp_path=tmp_path)
        training.adaptation.model.eval()  # no dropout
        loss = training.backward(training.data.draw("all"))
        gradients.append([loss, *(p.grad for p in training.adaptation.model.parameters() if p.grad is not None)])
    for whole, pieces in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, pieces)


def test_bf16_trains_with_parameters_in_fp32(tmp_path):
    training = training_with(TrainSpec(batches=5, batch_size=4, precision="bf16"), tmp_path=tmp_path)
    seen = []
    linear = training.adaptation.model.get_submodule("bert.encoder.layer.0.intermediate.dense")
    linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    training.run(lambda training: None)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in training.adaptation.model.parameters()} == {torch.float32}
    assert all(np.isfinite(row["loss"]) for row in training.history)


def test_no_batch_beyond_the_budget(tmp_path):
    training = training_with(TrainSpec(batches=2, batch_size=4), tmp_path=tmp_path)
    training.run(lambda training: None)
    with pytest.raises(RuntimeError, match="budget of 2 batches is used up"):
        training.backward(training.data.draw("all"))


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_loss_again_has_the_random_numbers_of_the_last_backward(tmp_path, pieces):
    training = training_with(TrainSpec(batches=4, batch_size=8, micro_batches=pieces), tmp_path=tmp_path)
    model, batch = training.adaptation.model, training.data.draw("all")
    assert model.training  # with dropout
    first = training.backward(batch)
    torch.rand(5)
    state = torch.get_rng_state()
    again = training.loss(batch)
    torch.testing.assert_close(again.detach(), first)
    assert torch.equal(torch.get_rng_state(), state)
    held = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert all(torch.equal(p.grad, held[name]) for name, p in model.named_parameters() if name in held)
    again.backward()
    for name, gradient in held.items():
        torch.testing.assert_close(model.get_parameter(name).grad, 2 * gradient)
    with torch.no_grad():
        assert not training.loss(batch).requires_grad
    assert training.used == 3


def test_passes_that_a_method_makes_itself_count(tmp_path):
    training = training_with(TrainSpec(batches=4, batch_size=4), tmp_path=tmp_path)
    training.spend(3)
    with pytest.raises(RuntimeError, match="budget of 4 batches is used up"):
        training.spend(2)
    assert training.used == 3
    training.spend(1)
    with pytest.raises(RuntimeError, match="used up"):
        training.loss((0,))


def test_the_history_takes_numbers_lists_and_tensors(tmp_path):
    training = training_with(TrainSpec(batches=2, batch_size=4), tmp_path=tmp_path)
    values = {
        "number": 2,
        "list": [1, 2],
        "scalar": torch.tensor(3.5),
        "vector": torch.arange(3),
        "none": torch.ones(0),
    }
    training.adaptation.after_step = lambda step: dict(values)
    training.run(lambda training: None)
    for row in training.history:
        kept = {name: row[name] for name in values}
        assert kept == {"number": 2, "list": [1, 2], "scalar": 3.5, "vector": [0.0, 1.0, 2.0], "none": []}


def test_clipping_bounds_the_step(tmp_path):
    training = training_with(TrainSpec(batches=3, batch_size=4, clip_norm=1e-3), tmp_path=tmp_path)
    norms = []
    training.adaptation.after_step = lambda step: (
        norms.append(
            torch.nn.utils.get_total_norm(
                [p.grad for p in training.adaptation.model.parameters() if p.grad is not None]
            )
        )
        or {}
    )
    training.run(lambda training: None)
    assert max(norms) <= 1e-3 * 1.001
    assert training.history[0]["gradient_norm"] > 1e-3  # what is recorded is the norm before clipping


def test_divergence_is_told_with_its_update(tmp_path):
    training = training_with(TrainSpec(batches=50, batch_size=4), tmp_path=tmp_path)

    def poison(training):
        if training.index == 13:
            with torch.no_grad():
                training.adaptation.model.get_parameter("classifier.bias").fill_(float("nan"))

    with pytest.raises(Diverged, match="the loss is nan at update 13"):
        training.run(poison)


class Hooked(Adaptation):
    """Writes down the order of its hooks, and whether gradients are there."""

    calls: list

    def before_forward(self, step):
        self.calls.append(("before_forward", self.gradients()))

    def penalty(self):
        self.calls.append(("penalty", self.gradients()))
        return sum(p.square().sum() for p in self.model.parameters())

    def before_step(self, step):
        self.calls.append(("before_step", self.gradients()))

    def after_step(self, step):
        self.calls.append(("after_step", self.gradients()))
        return {"mine": torch.tensor(3.0), "number": 4}

    def finish(self, step):
        self.calls.append(("finish", self.gradients()))

    def gradients(self):
        return any(p.grad is not None for p in self.model.parameters())


def test_hooks_come_in_the_documented_order(tmp_path):
    training = training_with(TrainSpec(batches=1, batch_size=4, warmup=0.0), tmp_path=tmp_path)
    training.adaptation.__class__ = Hooked
    training.adaptation.calls = []
    training.run(lambda training: None)
    assert training.adaptation.calls == [
        ("before_forward", False),
        ("penalty", True),
        ("before_step", True),
        ("after_step", True),
        ("finish", False),
    ]
    assert training.history[0]["mine"] == 3.0
    assert training.history[0]["number"] == 4


def test_a_penalty_changes_the_gradient_and_not_the_recorded_loss(tmp_path):
    rows = []
    for hooked in (False, True):
        training = training_with(TrainSpec(batches=1, batch_size=4), tmp_path=tmp_path)
        if hooked:
            training.adaptation.__class__ = Hooked
            training.adaptation.calls = []
        training.run(lambda training: None)
        rows.append(training.history[0])
    assert rows[0]["loss"] == rows[1]["loss"]
    assert rows[0]["gradient_norm"] < rows[1]["gradient_norm"]


def test_predictions_come_back_in_the_order_of_the_rows(tmp_path, monkeypatch):
    started = start(Subject("full", tmp_path))
    task, training = started.task, started.training
    labels = training.encoded.labels
    arguments = (started.adaptation, task, training.encoded, labels, training.train, training.device)
    expected = predict(*arguments)
    lengths = np.random.default_rng(0).permutation(len(labels))
    monkeypatch.setattr(type(task), "lengths", lambda self, encoded: lengths)
    monkeypatch.setattr(type(task), "predict", lambda self, model, batch: model(**batch.inputs).logits)
    by_length = predict(*arguments)
    monkeypatch.setattr(type(task), "lengths", lambda self, encoded: None)
    np.testing.assert_allclose(by_length, predict(*arguments), atol=1e-6)
    assert (by_length.argmax(1) == expected).mean() > 0.99
    assert started.adaptation.model.training


@pytest.mark.parametrize("stops", [1, 4])
def test_a_parameter_in_another_order_in_memory_resumes_exactly(stops, tmp_path):
    """A weight that is the transpose of one in memory, as an SVD or Conv1D gives it: its moments lie as it does."""

    def made():
        model = torch.nn.Linear(5, 3, bias=False)
        model.weight = torch.nn.Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).T)
        return Adaptation(model, adamw(model, 0.01, 0.1), Backbone(model, (), ()))

    def trained(adaptation, updates):
        for _ in range(updates):
            adaptation.optimizer.zero_grad()
            rows = adaptation.model(torch.linspace(-1, 1, 20).view(4, 5))
            (rows.square() * torch.arange(12.0).view(4, 3)).mean().backward()
            adaptation.optimizer.step()
        return adaptation

    checkpoint.save(tmp_path, stops, trained(made(), stops).state_dict())
    resumed = made()
    resumed.load_state_dict(checkpoint.load_newest(tmp_path).state)
    assert torch.equal(trained(resumed, 6 - stops).model.weight, trained(made(), 6).model.weight)
