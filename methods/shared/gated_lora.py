"""LoRA with a gate on every component: the update is scale B diag(g) A, and a component whose gate is 0 is none.

What such methods share: the gates beside the factors, ranks and counts of the components that are live, the cut to a
rank by the largest gates, and the export, in which a gate is a part of its row of A. `ThresholdedLora` is for those
whose gates go through a soft threshold after the optimizer's step: they may become 0, and may come back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from harness.errors import InputError
from harness.method import RANK, RANKS, Adaptation, Backbone, PeftForm, Step, Trace, TrainData
from harness.optimizer import adamw
from harness.parameters import Range, SearchSpace
from methods.shared.cut_lora import CutLoraAdaptation, along, weighted
from methods.shared.lora_method import LoraMethod
from methods.shared.peft_model import lora_form, lora_model, shared_parameters, unfit_at_rank
from methods.shared.peft_names import ADAPTER

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from harness.spec import TrainSpec

GATE = "lora_gate"  # a parameter of A's module, or a buffer where gates do not train
RANKS_EVERY = 10  # updates between two rows of the history with the rank of each layer


class GatedLora(LoraMethod, ABC):
    """What methods with gates share."""

    group: ClassVar[str] = "ranks searched"
    capabilities: ClassVar[tuple[str, ...]] = ("linear", "conv2d", "rank-adaptive")

    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the adapter's input", json_schema_extra={"peft": "lora_dropout"}
    )
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, description="ends of layer names; all if unset")

    @property
    @abstractmethod
    def scale(self) -> float:
        """What B diag(g) A is multiplied by, in every layer."""

    def peft_form(self, ranks: Mapping[str, int]) -> PeftForm | None:
        """See `Method.peft_form`: LoRA with the live components, the gates in one of its factors."""
        return lora_form(ranks, self.scale, shared_parameters(self, self.dropout))


class GatedLoraAdaptation(CutLoraAdaptation):
    """A PEFT LoRA model with gates in training. A live component is one whose gate is not 0."""

    def gates(self) -> dict[str, Any]:
        """The gates of every adapted layer, (r,): a parameter, or a buffer where they are not trained."""
        return {name: getattr(layer.lora_A[ADAPTER], GATE) for name, layer in self.layers.items()}

    def live(self) -> Tensor:
        """How many components of each layer are live, (layers,) int64, on the gates' device."""
        import torch

        return torch.stack([gate.count_nonzero() for gate in self.gates().values()])

    def ranks(self) -> dict[str, int]:
        """See `Adaptation.ranks`: the live components."""
        gates = self.gates()
        on_meta = any(gate.is_meta for gate in gates.values())  # no values there, and no gate starts at 0
        numbers = [len(gate) for gate in gates.values()] if on_meta else self.live().tolist()
        live = dict(zip(gates, numbers, strict=True))
        return {name: live[name] for name in self.targets}

    def adapter_parameters(self) -> int:
        """See `Adaptation.adapter_parameters`: outputs + inputs for every component of `ranks`. Its gate is a part of A
        when it is stored."""
        return sum(rank * sum(self.sides(name)) for name, rank in self.ranks().items())

    def sides(self, name: str) -> tuple[int, int]:
        """(outputs, inputs) of a layer's update as a matrix."""
        layer = self.layers[name]
        return layer.lora_B[ADAPTER].weight.shape[0], layer.lora_A[ADAPTER].weight.shape[1:].numel()

    def at_rank(self, rank: int) -> AbstractContextManager[None]:
        """See `Adaptation.at_rank`: the components with the largest |g|."""
        from methods.shared.truncation import largest, swapped

        return swapped({gate: largest(gate, rank) for gate in self.gates().values()})

    def scaled_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(B, A) of every adapted layer, live components alone: B with the scale, A with the gates."""
        gates, pairs = self.gates(), super().scaled_pairs()
        for name, (B, A) in pairs.items():
            live = gates[name].detach() != 0
            pairs[name] = B[:, live], A[live] * along(gates[name].detach()[live], A, 0)
        return pairs


def add_gates(model: nn.Module, gates: Iterable[Tensor], trained: bool) -> None:
    """Give every LoRA layer of a PEFT model, in the model's order, its gates, (r,): as a parameter, or as a buffer
    where they are not trained. Call it before the optimizer is made."""
    from peft.tuners.lora import LoraLayer
    from torch import nn

    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    for layer, values in zip(layers, gates, strict=True):
        factor: nn.Module = layer.lora_A[ADAPTER]
        gate = values.to(factor.get_parameter("weight"))
        if trained:
            factor.register_parameter(GATE, nn.Parameter(gate))
        else:
            factor.register_buffer(GATE, gate)
        factor.register_forward_hook(_multiply)


def soft_threshold(values: Tensor, threshold: float | Tensor) -> Tensor:
    """sign(v) max(|v| - threshold, 0): the proximal step of threshold |v|. threshold: a number or (), at least 0."""
    return values.sign() * (values.abs() - threshold).clamp(min=0)


class ThresholdedLora(GatedLora, ABC):
    """What SoRA and CoDyRA share: gates that train with AdamW and go through a soft threshold after its step."""

    search_space: ClassVar[SearchSpace] = {
        "learning_rate": Range(1e-5, 1e-2, log=True),
        "threshold": Range(1e-5, 1e-2, log=True),
    }
    traces: ClassVar[tuple[Trace, ...]] = (
        RANK,
        RANKS,
        Trace("threshold", "threshold of the gates", drawing="log_line"),
    )

    rank: int = Field(
        8,
        ge=1,
        description="rank of every adapted layer at the start, at most its smaller side",
        json_schema_extra={"peft": "r"},
    )
    components: int | None = Field(
        None,
        ge=1,
        description="live components of all layers together in the end, at most: where the threshold leaves more, it "
        "is raised to the least that does not",
    )
    gate_init: Literal["normal", "ones"] = Field("normal", description="gates at the start: drawn from N(0, 1), or 1")
    gate_ratio: float = Field(
        1.0, ge=0, description="learning rate of the gates over that of the factors; 0: the loss does not move them"
    )

    @abstractmethod
    def stage(self, used: int, budget: int) -> float:
        """How far the ranks have to have fallen when so many batches of the budget are used, those of the update
        included: from 0, all may be live, to 1, only `components` may."""

    @abstractmethod
    def threshold_at(self, used: int, budget: int) -> float:
        """The threshold, before what `components` makes of it, of the update that ends with so many batches used."""

    @abstractmethod
    def misfit(self, budget: int) -> InputError | None:
        """Why the schedule does not fit into so many batches, or None."""

    def most_live(self, total: int, used: int, budget: int) -> int:
        """How many of `total` components may be live after the update that ends with so many batches used."""
        if self.components is None:
            return total
        return round(total + self.stage(used, budget) * (self.components - total))

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        return unfit_at_rank(backbone, self.target_modules, self.rank, self.components)

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`: how far the threshold reaches, which depends on the number of updates."""
        budget = train.budget(num_examples)
        if error := self.misfit(budget):
            raise error
        reach = sum(self.threshold_at(used, budget) for used in range(1, budget + 1))
        layers = len(backbone.targets(self.target_modules))
        start = "drawn from N(0, 1)" if self.gate_init == "normal" else "1 at the start"
        gates = f"{self.rank * layers} gates in {layers} layers, {start}"
        cap = "" if self.components is None else f"; at most {self.components} components are live in the end"
        return [f"{gates}: the thresholds of {budget} updates sum to {reach:.3g}{cap}"]

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        import torch

        targets = backbone.targets(self.target_modules)
        model = lora_model(backbone, dict.fromkeys(targets, self.rank), self.scale, self.dropout)
        normal = self.gate_init == "normal"
        gates = [torch.randn(self.rank, generator=rng) if normal else torch.ones(self.rank) for _ in targets]
        add_gates(model, gates, trained=self.gate_ratio > 0)
        ratios = {f".{GATE}": self.gate_ratio} if self.gate_ratio not in (0.0, 1.0) else {}
        optimizer = adamw(model, self.learning_rate, self.weight_decay, ratios)
        return self.adaptation(model, optimizer, backbone, targets)

    def adaptation(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, backbone: Backbone, targets: tuple[str, ...]
    ) -> Adaptation:
        """The run's state, of the adapted model and its optimizer."""
        return ThresholdedLoraAdaptation(self, model, optimizer, backbone, targets)


class ThresholdedLoraAdaptation(GatedLoraAdaptation):
    """One run. All gates start live, so the size at the start is the peak; the loop sees those on the way every ten
    updates, since to look at them is to wait for the device."""

    method: ThresholdedLora

    def after_step(self, step: Step) -> dict[str, Any]:
        """See `Adaptation.after_step`. The history has the `threshold` and the `rank` of every update."""
        gates = list(self.gates().values())
        threshold = self._threshold(gates, step)
        for gate in gates:
            gate.data.copy_(soft_threshold(gate.detach(), threshold))
        live = self.live()
        row = {"threshold": threshold, "rank": live.sum()}
        return row | {"ranks": live} if step.index % RANKS_EVERY == 0 or step.used == step.budget else row

    def _threshold(self, gates: list[Tensor], step: Step) -> float | Tensor:
        """The method's own, or the least that leaves no more gates live than may be."""
        import torch

        threshold = self.method.threshold_at(step.used, step.budget)
        total = sum(map(len, gates))
        most = self.method.most_live(total, step.used, step.budget)
        if most == total:
            return threshold
        sizes = torch.cat([gate.detach() for gate in gates]).abs()
        return sizes.topk(most + 1).values[-1].clamp(min=threshold)


def _multiply(factor: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Hook of A: its outputs times the gates."""
    return weighted(factor, output, getattr(factor, GATE))
