"""A method's own passes: what they hand over, what they hold in memory, what they leave as it was."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from harness.contracts import Subject, start
from harness.method import Adaptation, as_matrix
from harness.passes import (
    evaluation_mode,
    mean_weight_gradients,
    observe_inputs,
    taking_weight_gradients,
    weight_gradients,
)
from harness.spec import Place
from tests.support import tiny
from tests.support.network import KINDS, gradients_by_autograd, layers_of, network_training


def model_of(training):
    return training.adaptation.model


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def drawn(training, number):
    return [training.data.draw("all") for _ in range(number)]


@pytest.mark.parametrize(
    ("train", "tolerance"),
    [
        ({}, {}),
        ({"micro_batches": 3}, {}),
        ({"precision": "bf16"}, {}),
        ({"precision": "bf16", "micro_batches": 3}, {"rtol": 0.05, "atol": 2e-3}),
    ],
)
def test_gradients_are_those_of_autograd(train, tolerance):
    training = network_training(**train)
    batches = drawn(training, 3)
    expected = [gradients_by_autograd(training, batch) for batch in batches]
    found = mean_weight_gradients(training, model_of(training), layers_of(training), iter(batches))
    assert training.used == 3
    assert found.keys() == set(KINDS)
    for name in KINDS:
        mean = torch.stack([each[name] for each in expected]).mean(0)
        assert mean.count_nonzero() > mean.numel() / 2
        torch.testing.assert_close(found[name], mean, **tolerance)


@pytest.mark.parametrize("pieces", [1, 3])
def test_the_parts_of_a_batch_sum_to_its_gradient(pieces):
    training = network_training(micro_batches=pieces)
    (batch,) = drawn(training, 1)
    expected = gradients_by_autograd(training, batch)
    parts = []
    number = weight_gradients(
        training, model_of(training), layers_of(training), [batch], lambda *part: parts.append(part)
    )
    assert number == 1
    assert [name for name, _ in parts] == [*reversed(KINDS)] * pieces
    for kind in KINDS:
        torch.testing.assert_close(sum(part for name, part in parts if name == kind), expected[kind])


@pytest.mark.parametrize("pieces", [1, 3])
def test_one_gradient_is_alive_at_a_time(pieces):
    training = network_training(micro_batches=pieces)
    alive, kept, counts = [], [], []

    def take(name, gradient):
        assert all(part.grad is None for part in model_of(training).parameters())
        counts.append(sum(not storage.expired() for storage in alive))
        alive.append(StorageWeakRef(gradient.untyped_storage()))
        if name == KINDS[0] and not kept:
            kept.append(gradient)

    layers = layers_of(training)
    weight_gradients(training, model_of(training), layers, drawn(training, 2), take)
    assert counts == [0] * len(KINDS) + [1] * (2 * pieces - 1) * len(KINDS)  # what the caller keeps is the caller's


def test_a_layer_that_no_loss_reaches_has_a_gradient_of_zero():
    training = network_training()
    names = ("linear", "unused")
    found = mean_weight_gradients(training, model_of(training), layers_of(training, names), drawn(training, 1))
    assert found["linear"].count_nonzero() > 0
    assert torch.equal(found["unused"], torch.zeros(2, 3))
    assert not found["unused"].requires_grad


def test_nothing_is_left_behind_and_gradients_of_the_trained_stay():
    """Also where the caller stops within a pass, and where a layer of the pass is itself trained."""
    training = network_training()
    model = model_of(training)
    model.linear.weight.requires_grad_(True)
    training.backward(*drawn(training, 1))
    held = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    values, random = state_of(model), torch.get_rng_state()
    assert held.keys() == {"linear.weight", "head.weight", "head.bias"}

    def stop(name, gradient):
        raise LookupError(name)

    weight_gradients(training, model, layers_of(training), drawn(training, 2), lambda name, gradient: None)
    with pytest.raises(LookupError, match="linear"):
        weight_gradients(training, model, layers_of(training, ("linear",)), drawn(training, 1), stop)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name for name, p in model.named_parameters() if p.grad is not None} == held.keys()
    assert all(torch.equal(model.get_parameter(name).grad, gradient) for name, gradient in held.items())
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    training.backward(*drawn(training, 1))  # no hook has stayed
    assert model.transposed.weight.grad is None


class Following(Adaptation):
    """Takes the gradients of the training batches themselves."""

    def before_forward(self, step):
        self.sums, self.within = {}, ExitStack()
        layers = {name: self.model.get_submodule(name) for name in KINDS}
        self.within.enter_context(taking_weight_gradients(layers, self.take))

    def take(self, name, gradient):
        self.sums[name] = self.sums.get(name, 0) + gradient

    def before_step(self, step):
        self.within.close()


@pytest.mark.parametrize("pieces", [1, 3])
def test_gradients_of_the_training_batches_cost_none(pieces):
    training, plain = (network_training(cls, micro_batches=pieces) for cls in (Following, Adaptation))
    for _ in range(3):
        expected = gradients_by_autograd(plain, plain.data.draw("all"))
        plain.data.drawn["all"] -= 1
        for each in (training, plain):
            each.update()
        torch.testing.assert_close(training.adaptation.sums, expected)
    assert training.used == 3
    for one, two in zip(model_of(training).parameters(), model_of(plain).parameters(), strict=True):
        assert torch.equal(one, two)
        assert one.grad is None
        assert one.requires_grad == two.requires_grad


def test_gradients_are_there_where_gradients_are_off():
    training = network_training()
    (batch,) = drawn(training, 1)
    expected = gradients_by_autograd(training, batch)
    with torch.no_grad():
        found = mean_weight_gradients(training, model_of(training), layers_of(training), [batch])
    for name in KINDS:
        torch.testing.assert_close(found[name], expected[name])


def test_both_passes_count_and_end_with_the_budget():
    training = network_training(batches=3)
    model, layers = model_of(training), layers_of(training)
    for number, use in enumerate((weight_gradients, observe_inputs), start=1):
        use(training, model, layers, drawn(training, 1), lambda name, tensor: None)
        assert training.used == number
    endless = iter(lambda: training.data.draw("all"), None)
    for use in (weight_gradients, observe_inputs):
        with pytest.raises(RuntimeError, match="budget of 3 batches is used up"):
            use(training, model, layers, endless, lambda name, tensor: None)
    assert training.used == 3


def test_batches_are_drawn_when_they_are_needed():
    """So that a method can stop when it has seen enough."""
    training = network_training()
    seen = []

    def batches():
        while len(seen) < 2 * len(KINDS):
            yield training.data.draw("all")

    observe_inputs(training, model_of(training), layers_of(training), batches(), lambda name, rows: seen.append(name))
    assert training.data.drawn["all"] == training.used == 2


def test_layers_that_share_a_weight_are_refused():
    training = network_training()
    layers = layers_of(training) | {"again": model_of(training).linear}
    with pytest.raises(ValueError, match="share their weight"):
        weight_gradients(training, model_of(training), layers, drawn(training, 1), lambda name, gradient: None)
    assert training.used == 0


@pytest.mark.parametrize("train", [{}, {"micro_batches": 3}])
def test_rows_are_what_the_layer_s_weight_multiplies(train):
    training = network_training(**train)
    model, layers = model_of(training), layers_of(training)
    outputs = {name: [] for name in KINDS}
    rows = {name: [] for name in KINDS}
    handles = [
        layer.register_forward_hook(lambda module, inputs, output, name=name: outputs[name].append(output))
        for name, layer in layers.items()
    ]
    observe_inputs(training, model, layers, drawn(training, 2), lambda name, seen: rows[name].append(seen))
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        assert len(rows[name]) == 2 * training.train.micro_batches
        output = torch.cat(outputs[name])
        expected = output.movedim(1, -1).flatten(0, -2) if output.dim() == 4 else output
        found = torch.cat(rows[name]) @ as_matrix(layer, layer.weight).T + layer.bias
        torch.testing.assert_close(found, expected)
        assert not torch.cat(rows[name]).requires_grad


@pytest.mark.parametrize("padding", [{"groups": 2}, {"padding_mode": "circular"}, {"padding": "same"}])
def test_a_convolution_whose_inputs_are_no_rows_is_refused(padding):
    training = network_training()
    model_of(training).convolution = nn.Conv2d(2, 4, 3, **{"padding": 1} | padding)
    layers = layers_of(training, ("convolution",))
    with pytest.raises(ValueError, match="no rows"):
        observe_inputs(training, model_of(training), layers, drawn(training, 1), lambda name, rows: None)


def test_the_mode_is_the_caller_s():
    """In training mode dropout and BatchNorm do as in any training batch; in evaluation mode neither does."""
    training = network_training()
    model, layers = model_of(training), layers_of(training)
    model.train()
    model.linear.eval()
    modes = [module.training for module in model.modules()]
    before, random = state_of(model.norm), torch.get_rng_state()

    def look():
        for use in (weight_gradients, observe_inputs):
            use(training, model, layers, drawn(training, 1), lambda name, tensor: None)

    def look_and_fail():
        with evaluation_mode(model):
            look()
            raise LookupError

    with pytest.raises(LookupError):
        look_and_fail()
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.norm.running_mean, before["running_mean"])
    assert torch.equal(torch.get_rng_state(), random)
    look()
    assert [module.training for module in model.modules()] == modes
    assert not torch.equal(model.norm.running_mean, before["running_mean"])
    assert not torch.equal(torch.get_rng_state(), random)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    text = tiny.write_all(tmp_path_factory.mktemp("text"))
    return Place(data_root=str(text / "data"), model=str(text / "bert"))


def test_padding_is_left_out(place):
    run = start(Subject("head", Path(), task="glue/sst2", place=place))
    model = run.adaptation.model
    names = ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense", "bert.pooler.dense")
    layers = {name: model.get_submodule(name) for name in names}
    masks, whole, rows = [], {name: [] for name in names}, {name: [] for name in names}
    model.register_forward_pre_hook(
        lambda module, args, inputs: masks.append(inputs["attention_mask"].bool()), with_kwargs=True
    )
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda module, inputs, name=name: whole[name].append(inputs[0]))
    with evaluation_mode(model):
        observe_inputs(run.training, model, layers, drawn(run.training, 3), lambda name, seen: rows[name].append(seen))
    assert not all(mask.all() for mask in masks)
    for place_in_batches, mask in enumerate(masks):
        for name in names[:2]:
            assert torch.equal(rows[name][place_in_batches], whole[name][place_in_batches][mask])
        assert torch.equal(rows[names[2]][place_in_batches], whole[names[2]][place_in_batches])  # a row an example


class Flattening(nn.Module):
    """A language model that puts all tokens of a batch in one dimension, as OPT does before its feed-forward layers."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(9, 4), nn.Linear(4, 1)

    def forward(self, input_ids, attention_mask):
        return self.linear(self.embedding(input_ids).flatten(0, 1))


def test_padding_is_left_out_where_the_model_flattens_its_tokens():
    model, seen = Flattening(), []
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    ids = torch.tensor([[1, 2, 0], [3, 0, 0]])

    class Forward:
        def backward(self, batch):
            model(input_ids=ids, attention_mask=mask)

    observe_inputs(Forward(), model, {"linear": model.linear}, [(0, 1)], lambda name, rows: seen.append(rows))
    assert torch.equal(seen[0], model.embedding(torch.tensor([1, 2, 3])))


def test_layers_looked_up_before_an_adapter_is_put_around_them_serve_after_it(tmp_path):
    """PEFT's LoRA at its start, whose update is 0, gives what the bare backbone gives."""
    found = {}
    for name in ("head", "lora[rank=2]"):
        run = start(Subject(name, tmp_path))
        model = run.adaptation.model
        bases = {
            full.removeprefix("base_model.model.").removesuffix(".base_layer"): module
            for full, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }
        layers = {layer: bases[layer] for layer in run.before.layers}
        sums = dict.fromkeys(layers, 0.0)

        def see(layer, rows, sums=sums):
            sums[layer] += rows.square().sum()

        batch = run.training.data.draw("all")
        with evaluation_mode(model):
            gradients = mean_weight_gradients(run.training, model, layers, [batch])
            observe_inputs(run.training, model, layers, [batch], see)
        found[name] = (gradients, sums)
    (bare, bare_sums), (adapted, adapted_sums) = found.values()
    torch.testing.assert_close(adapted, bare)
    torch.testing.assert_close(adapted_sums, bare_sums)
