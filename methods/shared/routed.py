"""LoRA whose components are chosen token by token: the update of a token x is scale B g(A x) with g of few components.

What such methods share: the number of components and how many a token uses, the router between A and B, how often each
component is chosen, padding left out, and files of this package's own, since such an update is no matrix.
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from harness.errors import InputError
from harness.method import Adaptation, Backbone, Step, Trace, TrainData, is_adaptable
from harness.optimizer import adamw
from methods.shared.lora_adaptation import LoraAdaptation
from methods.shared.lora_method import LoraMethod
from methods.shared.peft_model import lora_model, unfit
from methods.shared.peft_names import ADAPTER, PREFIX
from methods.shared.placement import check_spread, spread

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from harness.spec import TrainSpec
    from methods.shared.router import Router

SHARE = 4  # a quarter of a layer's components is chosen where nothing else is said
EVERY = 10  # updates between two rows of the history with the imbalance
NOT_STOCK = "what a token is given depends on the token: no matrix, and nothing that stock PEFT could hold"


class RoutedLora(LoraMethod, ABC):
    """What the methods share. A layer has as many components as `layer_ranks` says; a token uses `chosen` of them."""

    group: ClassVar[str] = "routed"
    capabilities: ClassVar[tuple[str, ...]] = ("linear",)
    traces: ClassVar[tuple[Trace, ...]] = (
        Trace("imbalance", "tokens of a layer's most chosen component over the mean of its components"),
    )
    name: ClassVar[str]  # of the method, and of the file that tells of its export
    frozen: ClassVar[bool] = False  # A does not train
    own_format: ClassVar[bool] = True

    rank: int = Field(
        8, ge=1, description="components of every layer, at most its smaller side", json_schema_extra={"peft": "r"}
    )
    components: int | None = Field(
        None,
        ge=1,
        description="components of all layers together, spread evenly, instead of rank in each",
    )
    top_k: int | None = Field(
        None, ge=1, description="components of a layer that a token uses; a quarter of them if unset, at least one"
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the adapter's input", json_schema_extra={"peft": "lora_dropout"}
    )
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, description="ends of layer names; all if unset")

    @property
    @abstractmethod
    def scale(self) -> float:
        """What B is multiplied by, in every layer."""

    @abstractmethod
    def route(self, router: Router, activations: Tensor) -> tuple[Tensor, Tensor]:
        """What B is given, (..., r), of the activations A x, (..., r), and which components a token has chosen, bool,
        (..., r)."""

    def chosen(self, rank: int) -> int:
        """How many of a layer's components a token uses."""
        return max(1, rank // SHARE) if self.top_k is None else self.top_k

    def is_routed(self, ranks: Mapping[str, int]) -> bool:
        """Whether the update of a layer depends on the token; otherwise the adapter is a LoRA."""
        return True

    def layer_ranks(self, backbone: Backbone) -> dict[str, int]:
        """The number of components of each layer."""
        return spread(self.components, self.rank, backbone.targets(self.target_modules))

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        if not backbone.layers:
            return backbone.without_layers("linear layer")
        targets = backbone.targets(self.target_modules)
        if (reason := unfit(backbone, list(targets), "a choice for every token")) is not None:
            return reason
        check_spread(self.components, self.rank, backbone, targets)
        self.check_choice(self.layer_ranks(backbone))
        return None

    def check_choice(self, ranks: Mapping[str, int]) -> None:
        """Raises InputError where a token cannot choose so many of a layer's components."""
        fewest = min(ranks, key=lambda name: ranks[name])
        if self.top_k is not None and self.top_k > ranks[fewest]:
            raise InputError(
                f"top_k = {self.top_k} is above the {ranks[fewest]} components of layer '{fewest}'", "top_k"
            )

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`: what a token uses, and where the adapter can be used."""
        ranks = self.layer_ranks(backbone)
        pairs = sorted({(rank, self.chosen(rank)) for rank in ranks.values()})
        used = " or ".join(f"{chosen} of {rank}" for rank, chosen in pairs)
        told = f"a token uses {used} components of a layer, {sum(ranks.values())} in {len(ranks)} layers"
        return [f"{told}; {NOT_STOCK}" if self.is_routed(ranks) else told]

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        ranks = self.layer_ranks(backbone)
        model, routers = self.adapted(backbone, ranks, rng)
        optimizer = adamw(model, self.learning_rate, self.weight_decay)
        return self.adaptation(model, optimizer, backbone, routers)

    def adapted(
        self, backbone: Backbone, ranks: Mapping[str, int], rng: torch.Generator
    ) -> tuple[nn.Module, dict[str, Router]]:
        """The backbone with PEFT's LoRA at these ranks, all above 0, and the routers in it, by layer."""
        from methods.shared.router import add_routers

        model = lora_model(backbone, dict(ranks), self.scale, self.dropout)
        return model, add_routers(model, ranks, self.route, self.frozen)

    def adaptation(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, backbone: Backbone, routers: dict[str, Router]
    ) -> Adaptation:
        """The run's state, of the adapted model and its optimizer."""
        return RoutedLoraAdaptation(self, model, optimizer, backbone, routers)


class RoutedLoraAdaptation(LoraAdaptation):
    """One run.

    counts: of each layer, how many tokens of the update's batch have chosen each component, (r,) int64, where that is
    counted; padding, where the model is given an attention_mask, is not. Gradient checkpointing calls a layer again and
    counts all its tokens twice, on which neither the imbalance nor a sign depends.
    """

    written_by_peft = False

    def __init__(
        self,
        method: RoutedLora,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        backbone: Backbone,
        routers: dict[str, Router],
    ) -> None:
        super().__init__(model, optimizer, backbone, tuple(routers))
        self.method = method
        self.backbone_module = backbone.module
        self.routers = routers
        self.counts: dict[str, Tensor] = {}

    def is_counted(self, step: Step) -> bool:
        """Whether this update counts what its tokens choose."""
        return step.index % EVERY == 0

    def for_batch(self, step: Step) -> contextlib.AbstractContextManager[None] | None:
        """See `Adaptation.for_batch`: what its tokens choose is counted."""
        self.counts = {}
        return self._counting() if self.is_counted(step) else None

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        from harness.passes import without_padding

        with without_padding(self.backbone_module) as rows:
            try:
                for name, router in self.routers.items():
                    router.watch = functools.partial(self._count, name, rows)
                yield
            finally:
                for router in self.routers.values():
                    router.watch = None

    def _count(self, name: str, rows: Callable[[Tensor], Tensor], chosen: Tensor) -> None:
        now = rows(chosen).sum(0)
        self.counts[name] = self.counts[name] + now if name in self.counts else now

    def after_step(self, step: Step) -> dict[str, Any]:
        """See `Adaptation.after_step`. Every ten updates the history has the `imbalance`, a mean over the layers: 1
        where all components are chosen equally often, r / k where all tokens choose the same."""
        import torch

        if not self.counts or step.index % EVERY:
            return {}
        shares = [count.max() / count.double().mean() for count in self.counts.values()]
        return {"imbalance": torch.stack(shares).mean()}

    def at_rank(self, rank: int) -> contextlib.AbstractContextManager[None] | None:
        """See `Adaptation.at_rank`: the components with the largest |b_i| |a_i|. Tokens choose as before; what is cut
        adds nothing. A LoRA's is its best approximation."""
        from methods.shared.truncation import largest, swapped

        if not self.method.is_routed(self.ranks()):
            return super().at_rank(rank)
        values = {}
        for name, router in self.routers.items():
            B: Tensor = self.layers[name].lora_B[ADAPTER].weight.detach()
            kept = largest(B.norm(dim=0) * router.weight.detach().norm(dim=1), rank) > 0
            values[self.layers[name].lora_B[ADAPTER].weight] = B * kept
        return swapped(values)

    def stored_bytes(self) -> int:
        """See `Adaptation.stored_bytes`: of what `export` writes, a frozen A included."""
        whole, routers = self.method.is_routed(self.ranks()), self.routers.values()
        held = [value for router in routers for name, value in router.named_buffers() if whole or name == "weight"]
        return super().stored_bytes() + sum(value.numel() * value.element_size() for value in held)

    def scaled_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """See `LoraAdaptation.scaled_pairs`. Raises ValueError where tokens choose: there is no such pair."""
        if self.method.is_routed(self.ranks()):
            raise ValueError(f"{self.method.name} is no LoRA: {NOT_STOCK}")
        return super().scaled_pairs()

    def export(self, path: Path) -> None:
        """The adapter and the head as `load` reads them; a stock LoRA where nothing is chosen."""
        from methods.shared.own_format import save

        if not self.method.is_routed(self.ranks()):
            return super().export(path)
        settings = {"parameters": self.method.model_dump(mode="json"), "ranks": self.ranks(), "head": list(self.head)}
        save(path, self.method.name, settings, kept(self.model))


def kept(model: nn.Module) -> dict[str, Tensor]:
    """What an export holds: trained parameters and the routers' buffers, by their names in the PEFT model."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return trained | {name: buffer for name, buffer in model.named_buffers() if f".lora_A.{ADAPTER}." in name}


def load(method: type[RoutedLora], module: nn.Module, path: Path) -> nn.Module:
    """Put an exported adapter and head onto `module`, a model built as the one that was trained, and give the whole as
    a PEFT model in evaluation mode.

    Raises InputError, in one line, where `path` holds no such export, where it is damaged, or where it does not fit the
    model; do not use `module` then.
    """
    import torch

    from methods.shared.own_format import read

    settings, tensors = read(path, method.name)
    found = method.of(settings["parameters"], method.name)
    for name in settings["ranks"]:
        layers = (part for own, part in module.named_modules() if own == name)
        if not any(is_adaptable(layer) and not isinstance(layer, torch.nn.Conv2d) for layer in layers):
            raise InputError(f"the adapter in '{path}' does not fit the model, which has no linear layer '{name}'")
    backbone = Backbone(module, tuple(settings["head"]), tuple(settings["ranks"]))
    model, _ = found.adapted(backbone, settings["ranks"], torch.Generator())
    own = kept(model)
    for name in sorted(own.keys() | tensors.keys()):
        shapes = [tuple(those[name].shape) if name in those else None for those in (own, tensors)]
        if shapes[0] != shapes[1]:
            told = name.removeprefix(PREFIX)
            raise InputError(
                f"the adapter in '{path}' does not fit the model: '{told}' is {shapes[1]}, not {shapes[0]}"
            )
        own[name].copy_(tensors[name])
    return model.eval()
