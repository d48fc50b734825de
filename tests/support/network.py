"""A network of every kind of adaptable layer in a run, on images and labels of chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from harness.method import Adaptation, Backbone, Method, as_matrix
from harness.optimizer import adamw
from harness.registry import make_method
from harness.run.streams import TrainingData
from harness.run.training import Training
from harness.spec import TrainSpec
from harness.task import Batch

KINDS = ("convolution", "linear", "transposed")


class Network(nn.Module):
    """Images (rows, 2, 6, 6) to scores of 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 4, 3, stride=2, padding=1, dilation=1)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(36, 10)
        self.dropout = nn.Dropout(0.5)
        self.transposed = Conv1D(8, 10)
        self.unused = nn.Linear(3, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = functional.relu(self.norm(self.convolution(images))).flatten(1)
        hidden = self.dropout(functional.relu(self.linear(features)))
        return self.head(functional.relu(self.transposed(hidden)))


class Chance:
    """What the loop asks of a task."""

    def collate(self, encoded: Batch, rows: Any, generator: torch.Generator | None) -> Batch:
        return Batch({"images": encoded.inputs["images"][list(rows)]}, encoded.labels[list(rows)])

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        return functional.cross_entropy(model(**batch.inputs).float(), batch.labels)


def network_training(cls: type[Adaptation] = Adaptation, **train: Any) -> Training:
    """A run of the network whose head alone trains: in evaluation mode, so that nothing is random."""
    torch.manual_seed(0)
    backbone = Backbone(Network().eval(), head=("head",), layers=(*KINDS, "unused"))
    backbone.module.requires_grad_(False)
    for _, parameter in backbone.head_parameters():
        parameter.requires_grad_(True)
    encoded = Batch({"images": torch.randn(24, 2, 6, 6)}, torch.from_numpy(np.arange(24) % 3))
    spec = TrainSpec(**{"batches": 12, "batch_size": 8} | train)
    assert spec.batches is not None
    adaptation = cls(backbone.module, adamw(backbone.module, 1e-2, 0.0), backbone)
    data = TrainingData(24, spec.batch_size, 0)
    task: Any = Chance()
    return Training(adaptation, task, encoded, data, spec, torch.device("cpu"), spec.batches)


def layers_of(training: Training, names: tuple[str, ...] = KINDS) -> dict[str, nn.Module]:
    return {name: training.adaptation.model.get_submodule(name) for name in names}


def gradients_by_autograd(
    training: Training, batch: tuple[int, ...], names: tuple[str, ...] = KINDS
) -> dict[str, Tensor]:
    """The gradient of the batch's mean loss in each layer's weight, as (outputs, inputs)."""
    layers = layers_of(training, names)
    weights = [layer.get_parameter("weight").requires_grad_(True) for layer in layers.values()]
    inputs = training.task.collate(training.encoded, batch, None)
    with torch.autocast("cpu", torch.bfloat16, enabled=training.train.precision == "bf16"):
        loss = training.task.loss(training.adaptation.model, inputs, torch.Generator())
    found = torch.autograd.grad(loss, weights)
    for weight in weights:
        weight.requires_grad_(False)
    return {name: as_matrix(layer, value) for (name, layer), value in zip(layers.items(), found, strict=True)}


class Exact(Chance):
    """The same, in the network's own precision."""

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        return functional.cross_entropy(model(**batch.inputs), batch.labels)


def method_training(
    method: Method,
    layers: tuple[str, ...] = KINDS,
    batches: int = 12,
    module: type[nn.Module] = Network,
    micro_batches: int = 1,
) -> Training:
    """A run of a method on the network, or another `module`, in float64 and evaluation mode; what it starts from is
    always the same."""
    torch.manual_seed(0)
    backbone = Backbone(module().eval().double(), head=("head",), layers=layers)
    encoded = Batch({"images": torch.randn(24, 2, 6, 6).double()}, torch.from_numpy(np.arange(24) % 3))
    spec = TrainSpec(batches=batches, batch_size=8, warmup=0.0, schedule="constant", micro_batches=micro_batches)
    data = TrainingData(24, 8, 0)
    adaptation = method.start(backbone, spec, data, torch.Generator().manual_seed(0))
    task: Any = Exact()
    return Training(adaptation, task, encoded, data, spec, torch.device("cpu"), batches)


def mean_gradients(
    batches: int, layers: tuple[str, ...] = KINDS, module: type[nn.Module] = Network
) -> dict[str, Tensor]:
    """Of such a run's first batches, by autograd: the mean gradient of each layer's weight, (outputs, inputs)."""
    training = method_training(make_method("head", {}), layers, module=module)
    found = [gradients_by_autograd(training, training.data.draw("all"), layers) for _ in range(batches)]
    return {name: torch.stack([each[name] for each in found]).mean(0) for name in layers}


def weights_of(layers: tuple[str, ...] = KINDS, module: type[nn.Module] = Network) -> dict[str, Tensor]:
    """The frozen weights of such a run, (outputs, inputs)."""
    found = layers_of(method_training(make_method("head", {}), layers, module=module), layers)
    return {name: as_matrix(layer, layer.get_parameter("weight").detach()) for name, layer in found.items()}
