"""Small methods, one for each thing that the method interface offers; registered by `registered_toys`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch

from harness import registry
from harness.method import Adaptation, Backbone, Step
from harness.optimizer import adamw
from methods.lora import Lora
from methods.shared.lora_adaptation import LoraAdaptation

TOYS = {
    "growing": "tests.plugin.growing:Growing",
    "scaled": "tests.support.toy_methods:Scaled",
    "leaking": "tests.support.toy_methods:Leaking",
    "with_ratio": "tests.support.toy_methods:WithRatio",
    "rewarmed": "tests.support.toy_methods:Rewarmed",
    "masked": "tests.support.toy_methods:Masked",
    "silent": "tests.support.toy_methods:Silent",
}


def registered_toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the toys beside the installed methods, as if a package brought them."""
    installed = registry.registered
    toys = {name: (EntryPoint(name, value, registry.METHODS),) for name, value in TOYS.items()}

    def registered(group: str) -> dict[str, tuple[EntryPoint, ...]]:
        return installed(group) | (toys if group == registry.METHODS else {})

    monkeypatch.setattr(registry, "registered", registered)


class Toy(Lora):
    """A LoRA, with a hook."""

    def adaptation(self, lora: LoraAdaptation, backbone: Backbone) -> Adaptation:
        """The LoRA's model and optimizer in an adaptation of one's own."""
        raise NotImplementedError

    def start(self, backbone: Backbone, *others: Any) -> Adaptation:  # type: ignore[override]
        """See `Method.start`."""
        lora = super().start(backbone, *others)
        assert isinstance(lora, LoraAdaptation)
        return self.adaptation(lora, backbone)


class Scaled(Toy):
    """Every batch is trained at a scale of its own, drawn from 1 - spread to 1 + spread."""

    spread: float = 0.5

    def adaptation(self, lora: LoraAdaptation, backbone: Backbone) -> Adaptation:
        """See `Toy.adaptation`."""
        return ScaledAdaptation(lora.model, lora.optimizer, backbone, self.spread)


class ScaledAdaptation(LoraAdaptation):
    """drawn: the scales so far, of this process."""

    def __init__(self, model: Any, optimizer: Any, backbone: Backbone, spread: float) -> None:
        super().__init__(model, optimizer, backbone)
        self.spread = spread
        self.drawn: list[float] = []

    @contextlib.contextmanager
    def for_batch(self, step: Step) -> Iterator[None]:  # type: ignore[override]
        """See `Adaptation.for_batch`."""
        scale = 1 + self.spread * (2 * float(torch.rand((), generator=step.rng)) - 1)
        self.drawn.append(scale)
        before = {name: dict(layer.scaling) for name, layer in self.layers.items()}
        for layer in self.layers.values():
            layer.scaling["default"] *= scale
        try:
            yield
        finally:
            self.put_back(before)

    def put_back(self, before: dict[str, dict[str, float]]) -> None:
        """The scales that evaluations see."""
        for name, layer in self.layers.items():
            layer.scaling.update(before[name])


class Leaking(Scaled):
    """The scale of a batch stays: a mistake."""

    def adaptation(self, lora: LoraAdaptation, backbone: Backbone) -> Adaptation:
        """See `Toy.adaptation`."""
        adaptation = ScaledAdaptation(lora.model, lora.optimizer, backbone, self.spread)
        adaptation.put_back = lambda before: None  # type: ignore[method-assign]
        return adaptation


class WithRatio(Toy):
    """LoRA+ (Hayou et al., 2024): B learns at a multiple of A's rate."""

    ratio: float = 16.0

    def adaptation(self, lora: LoraAdaptation, backbone: Backbone) -> Adaptation:
        """See `Toy.adaptation`."""
        optimizer = adamw(lora.model, self.learning_rate, self.weight_decay, {".lora_B.": self.ratio})
        return LoraAdaptation(lora.model, optimizer, backbone)


class Rewarmed(Toy):
    """The learning rate warms up again over 4 batches after the updates of `at`."""

    at: tuple[int, ...] = (9, 15)

    def adaptation(self, lora: LoraAdaptation, backbone: Backbone) -> Adaptation:
        """See `Toy.adaptation`."""
        return RewarmedAdaptation(lora.model, lora.optimizer, backbone, self.at)


class RewarmedAdaptation(LoraAdaptation):
    """Moments of the factors are forgotten, as ReLoRA does after a merge."""

    def __init__(self, model: Any, optimizer: Any, backbone: Backbone, at: tuple[int, ...]) -> None:
        super().__init__(model, optimizer, backbone)
        self.at = at

    def after_step(self, step: Step) -> dict[str, Any]:
        """See `Adaptation.after_step`."""
        if step.index in self.at:
            self.optimizer.state.clear()
            step.restart_warmup(4)
        return {}


class Masked(Toy):
    """A half of the components are in effect, all of them from update 3 to 6, then a quarter: a mask, no shape, shows
    it."""

    def adaptation(self, lora: LoraAdaptation, backbone: Backbone) -> Adaptation:
        """See `Toy.adaptation`."""
        return MaskedAdaptation(lora.model, lora.optimizer, backbone)


class MaskedAdaptation(LoraAdaptation):
    """share: of the components in effect."""

    tells = True

    def __init__(self, model: Any, optimizer: Any, backbone: Backbone) -> None:
        super().__init__(model, optimizer, backbone)
        self.share = 0.5

    def after_step(self, step: Step) -> dict[str, Any]:
        """See `Adaptation.after_step`."""
        share = {3: 1.0, 6: 0.25}.get(step.index)
        if share is not None:
            self.share = share
            if self.tells:
                step.resized()
        return {}

    def ranks(self) -> dict[str, int]:
        """See `Adaptation.ranks`."""
        return {name: int(rank * self.share) for name, rank in super().ranks().items()}

    def adapter_parameters(self) -> int:
        """See `Adaptation.adapter_parameters`."""
        return int(super().adapter_parameters() * self.share)

    def at_rank(self, rank: int) -> None:
        """See `Adaptation.at_rank`."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """See `Adaptation.state_dict`."""
        return super().state_dict() | {"share": self.share}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Adaptation.load_state_dict`."""
        super().load_state_dict(state)
        self.share = state["share"]


class Silent(Toy):
    """As `Masked`, without a word to the loop: a mistake."""

    def adaptation(self, lora: LoraAdaptation, backbone: Backbone) -> Adaptation:
        """See `Toy.adaptation`."""
        adaptation = MaskedAdaptation(lora.model, lora.optimizer, backbone)
        adaptation.tells = False
        return adaptation
