"""A toy method that starts from the data: ranks and directions of its updates are read before the first one.

It is the smallest user of `Adaptation.prepare`, of both kinds of `harness.passes`, and of `Method.upper_share`.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Any, ClassVar, Literal

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from harness import registry
from harness.method import Adaptation, Backbone, Indices, Method, Step, TrainData, as_matrix
from harness.optimizer import adamw
from harness.passes import evaluation_mode, mean_weight_gradients, observe_inputs

NAME = "data_start"


class DataStart(Method):
    """Updates B A whose A are directions of the data: of the weights' gradients, or of the layers' inputs."""

    data_rule: ClassVar[Literal["all", "halves"]] = "halves"

    learning_rate: float = Field(1e-2, gt=0)
    source: Literal["gradients", "inputs"] = "gradients"
    rank: int = Field(2, ge=1, description="mean over the layers")
    reads: int = Field(3, ge=1, description="batches of the upper stream that it reads")
    share: float = Field(0.25, gt=0, lt=1, description="of the rows for the upper stream")

    @property
    def upper_share(self) -> float:
        return self.share

    def start(self, backbone: Backbone, train: Any, data: TrainData, rng: torch.Generator) -> Adaptation:
        layers = {name: backbone.module.get_submodule(name) for name in backbone.layers}
        backbone.module.requires_grad_(False)
        for name, layer in layers.items():
            backbone.module.set_submodule(name, Update(layer, self.rank))
        for _, parameter in backbone.head_parameters():
            parameter.requires_grad_(True)
        return DataStartAdaptation(self, backbone, layers, data)


class Update(nn.Module):
    """A linear layer and B A beside it."""

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        self.layer = layer
        weight = as_matrix(layer, layer.get_parameter("weight"))
        self.outputs, inputs = weight.shape
        self.set_directions(weight.new_zeros(rank, inputs))

    def set_directions(self, A: Tensor) -> None:
        """A (rank, inputs); B is 0."""
        self.A, self.B = nn.Parameter(A), nn.Parameter(A.new_zeros(self.outputs, len(A)))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) + inputs @ self.A.T @ self.B.T


class DataStartAdaptation(Adaptation):
    def __init__(self, method: DataStart, backbone: Backbone, layers: dict[str, nn.Module], data: TrainData) -> None:
        self.method, self.layers, self.data = method, layers, data
        self.updates: dict[str, Any] = {name: backbone.module.get_submodule(name) for name in layers}
        super().__init__(backbone.module, adamw(backbone.module, method.learning_rate, 0.0), backbone)

    def prepare(self, step: Step) -> None:
        batches = (self.data.draw("upper") for _ in range(self.method.reads))
        found = (
            self._of_gradients(step, batches) if self.method.source == "gradients" else self._of_inputs(step, batches)
        )
        ranks = dict.fromkeys(found, 1)
        pool = sorted(((float(v), name) for name, (values, _) in found.items() for v in values[1:]), reverse=True)
        for _, name in pool[: (self.method.rank - 1) * len(ranks)]:
            ranks[name] += 1
        self._place({name: directions[: ranks[name]] for name, (_, directions) in found.items()})

    def ranks(self) -> dict[str, int]:
        return {name: len(update.A) for name, update in self.updates.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._place({name: torch.zeros_like(state["trained"][f"{name}.A"]) for name in self.updates})
        super().load_state_dict(state)

    def _place(self, directions: dict[str, Tensor]) -> None:
        """The layers' A, of any rank, and an optimizer for them."""
        for name, A in directions.items():
            self.updates[name].set_directions(A.clone(memory_format=torch.contiguous_format))
        self.optimizer = adamw(self.model, self.method.learning_rate, 0.0)

    def _of_gradients(self, step: Step, batches: Iterator[Indices]) -> dict[str, tuple[Tensor, Tensor]]:
        """Each layer's (values, directions), the largest first: singular values as shares of all of the layer."""
        means = mean_weight_gradients(step, self.model, self.layers, batches)
        found = {name: torch.linalg.svd(mean, full_matrices=False)[1:] for name, mean in means.items()}
        return {name: (values / values.sum(), directions) for name, (values, directions) in found.items()}

    def _of_inputs(self, step: Step, batches: Iterator[Indices]) -> dict[str, tuple[Tensor, Tensor]]:
        """The same of the inputs' second moments."""
        moments: dict[str, Tensor] = {}

        def see(name: str, rows: Tensor) -> None:
            moments[name] = moments.get(name, 0) + rows.T @ rows

        with evaluation_mode(self.model):
            observe_inputs(step, self.model, self.layers, batches, see)
        found = {name: torch.linalg.svd(moment)[1:] for name, moment in moments.items()}
        return {name: (values / values.sum(), directions) for name, (values, directions) in found.items()}


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the method found by its name."""
    own = (EntryPoint(NAME, f"{__name__}:DataStart", registry.METHODS),)
    known = registry.registered

    def registered(group: str) -> dict[str, tuple[EntryPoint, ...]]:
        return known(group) | ({NAME: own} if group == registry.METHODS else {})

    monkeypatch.setattr(registry, "registered", registered)
