"""Components that move between layers while a LoRA trains, their total being constant.

What ElaLoRA and FlexLoRA share: updates P diag(E) Q, the schedule of the exchanges, which of the offered components
leave and which layers gain, and the change of the parameters together with their optimizer state.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from harness.errors import InputError
from harness.method import RANK, RANKS, Adaptation, Backbone, PeftForm, Step, Trace
from harness.optimizer import adamw
from methods.shared.lora_method import LoraMethod
from methods.shared.peft_model import lora_form, shared_parameters, unfit
from methods.shared.peft_names import ADAPTER
from methods.shared.placement import check_spread, spread
from methods.shared.shares import LARGEST, SHARE, check_shares, in_updates
from methods.shared.svd_lora import FACTORS, lora_pair, orthogonality, svd_model

if TYPE_CHECKING:
    from typing import Self

    import torch
    from torch import Tensor

    from harness.spec import TrainSpec

TIMES = "tinit", "tfinal", "interval"
MOST = 0.99  # of the updates, by shares: an exchange has to fit in


class Offer(NamedTuple):
    """A component that takes part in an exchange.

    layer: number of the layer. place: of the component in it. score: where it is low the component leaves, where it is
    high its layer gains one. may_leave: whether it may, as a layer's last component may not.
    """

    layer: int
    place: int
    score: float
    may_leave: bool


def trades(offers: Sequence[Offer], number: int, room: Mapping[int, int]) -> list[tuple[Offer, int]]:
    """At most `number` pairs of a component that leaves and a layer that gains one.

    The lowest scores leave and the owners of the highest gain, of equals the first, as long as the one is below the
    other; so no component does both. room: how many components a layer can still gain.
    """
    leaving = sorted((offer for offer in offers if offer.may_leave), key=lambda offer: offer.score)
    gaining = _with_room(sorted(offers, key=lambda offer: -offer.score), dict(room))
    pairs = zip(leaving[:number], gaining, strict=False)
    return [(low, high.layer) for low, high in itertools.takewhile(lambda pair: pair[0].score < pair[1].score, pairs)]


def _with_room(offers: Iterable[Offer], room: dict[int, int]) -> Iterator[Offer]:
    for offer in offers:
        if room[offer.layer] > 0:
            room[offer.layer] -= 1
            yield offer


class ExchangeLora(LoraMethod, ABC):
    """What the methods share. The update of a layer is (alpha / rank) P diag(E) Q, the scale being that of the
    parameters, whatever rank the layer has come to."""

    group: ClassVar[str] = "ranks searched"
    capabilities: ClassVar[tuple[str, ...]] = ("linear", "conv2d", "rank-adaptive")
    traces: ClassVar[tuple[Trace, ...]] = (RANK, RANKS, Trace("exchanged", "components exchanged"))

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    rank: int = Field(
        8,
        ge=1,
        description="rank of every layer at the start, at most its smaller side",
        json_schema_extra={"peft": "init_r"},
    )
    components: int | None = Field(
        None,
        ge=1,
        description="components of all layers together, spread evenly at the start, instead of rank in each; rank is "
        "then that of the scale alone",
    )
    exchanged: int = Field(4, ge=0, description="b: components that an exchange moves, at most; 0: ranks stay")
    tinit: float = Field(0.1, ge=0, description=f"before the exchanges begin: {SHARE}")
    tfinal: float = Field(0.3, ge=0, description=f"after the last exchange, at least one update: {SHARE}")
    interval: float = Field(0.02, gt=0, description=f"between two exchanges, at least one update: {SHARE}")
    orthogonality: float = Field(
        0.1, ge=0, description="weight of the mean of ||P^T P - I||_F and ||Q Q^T - I||_F over the layers"
    )
    alpha: float = Field(
        16.0, gt=0, description="the update is scaled by alpha / rank", json_schema_extra={"peft": "lora_alpha"}
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the adapter's input", json_schema_extra={"peft": "lora_dropout"}
    )
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, description="ends of layer names; all if unset")

    @property
    @abstractmethod
    def falling(self) -> Literal["none", "late", "early"]:
        """How the number of exchanged components falls over the phase, of which p is over: b, b (1 - p^3), or
        b (1 - p)^3."""

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        check_shares(self, *TIMES)
        given = {name: getattr(self, name) for name in TIMES}
        shares = sum(value for value in given.values() if value < 1)
        if shares > MOST:
            said = ", ".join(f"{name} = {value:g}" for name, value in given.items() if value < 1)
            raise ValueError(
                f"{said} are {shares:g} of the updates together: at most {MOST} leave room for an exchange"
            )
        return self

    def peft_form(self, ranks: Mapping[str, int]) -> PeftForm | None:
        """See `Method.peft_form`: LoRA with the components that each layer has, E in one of its factors."""
        return lora_form(ranks, self.alpha / self.rank, shared_parameters(self, self.dropout))

    def phase(self, updates: int) -> range:
        """After which of a run's `updates`, the first being 1, components are exchanged; empty where none is."""
        tinit, tfinal, interval = in_updates(updates, self.tinit, self.tfinal, self.interval)
        interval = max(interval, 1)
        return range(tinit + interval, updates - max(tfinal, 1) + 1, interval)

    def number_after(self, update: int, updates: int) -> int:
        """How many components may be exchanged after this one of a run's `updates`."""
        phase = self.phase(updates)
        if update not in phase:
            return 0
        begin = phase.start - phase.step
        over = (update - begin) / (phase.stop - 1 - begin)
        shares = {"none": 1.0, "late": 1 - over**3, "early": (1 - over) ** 3}
        return round(self.exchanged * shares[self.falling])

    def ranks_at_start(self, targets: Sequence[str]) -> dict[str, int]:
        """The rank of each layer: `components` spread evenly, the first layers having one more, or `rank`."""
        return spread(self.components, self.rank, targets)

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        if not backbone.layers:
            return backbone.without_layers()
        targets = backbone.targets(self.target_modules)
        check_spread(self.components, self.rank, backbone, targets)
        return unfit(backbone, list(targets))

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`: how often components are exchanged, and how many there are."""
        targets, updates = backbone.targets(self.target_modules), train.budget(num_examples)
        total = sum(self.ranks_at_start(targets).values())
        if self.exchanged == 0:
            return [f"{total} components in {len(targets)} layers stay where they are"]
        phase = self.phase(updates)
        if not phase:
            raise self._no_exchange(updates)
        moved = sum(self.number_after(update, updates) for update in phase)
        return [
            f"{total} components in {len(targets)} layers: at most {moved} are exchanged, in {len(phase)} exchanges "
            f"after updates {phase[0]} to {phase[-1]} of {updates}, every {phase.step}"
        ]

    def _no_exchange(self, updates: int) -> InputError:
        """With the least number of updates in which there is one."""
        given = {name: getattr(self, name) for name in TIMES}
        whole, share = (sum(v for v in given.values() if (v < 1) == below) for below in (False, True))
        begin = math.floor(min((whole - 2) / (1 - share), LARGEST + 1))  # each share is rounded, so near there
        longer = range(max(begin, updates + 1), LARGEST + 1)
        least = next((n for n in longer if self.phase(n)), LARGEST + 1)
        said = ", ".join(f"{name} = {value:g}" for name, value in given.items())
        return InputError(
            f"{said} leave no exchange in {updates} updates: give at least {least} batches",
            max(given, key=lambda name: given[name]),
        )


class ExchangeAdaptation(Adaptation, ABC):
    """One run: PEFT's AdaLoRA layers, whose parameters lose and gain components.

    A parameter keeps its place in the optimizer, and the components that stay keep their moments. A new component's
    entry of E is 0, so that the update is what it was, its moments are 0, and AdamW's steps on it are of its own age.
    """

    method: ExchangeLora

    def __init__(self, method: ExchangeLora, backbone: Backbone) -> None:
        from methods.shared.young_entries import YoungEntries

        targets = backbone.targets(method.target_modules)
        ranks = method.ranks_at_start(targets)
        model: Any = svd_model(backbone, ranks, method.alpha, method.rank, method.dropout)
        super().__init__(model, adamw(model, method.learning_rate, method.weight_decay), backbone)
        self.method = method
        self.layers: dict[str, Any] = {name: model.base_model.model.get_submodule(name) for name in targets}
        self.sides = {name: min(backbone.shape(name)) for name in targets}
        dims = {getattr(layer, name)[ADAPTER]: dim for layer in self.layers.values() for name, dim in FACTORS}
        self.young = YoungEntries(self.optimizer, dims)

    @abstractmethod
    def worth(self, layer: Any) -> Tensor:
        """What each component of a layer is worth to the method, (r,): the first to be kept has the largest."""

    @abstractmethod
    def offers(self) -> tuple[list[Offer], dict[str, list[float]]]:
        """The components that take part in an exchange, and what the history gets of it, a number for each layer."""

    @abstractmethod
    def directions(self, factor: Tensor, number: int, rng: torch.Generator) -> Tensor:
        """New rows, (number, n), for a factor (r, n): Q, or P transposed."""

    def observe(self) -> None:
        """What the method does after every update, before an exchange."""

    def penalty(self) -> Tensor | None:
        """See `Adaptation.penalty`: that of AdaLoRA."""
        weight = self.method.orthogonality
        return weight * orthogonality(self.layers.values()) if weight else None

    def before_step(self, step: Step) -> None:
        """See `Adaptation.before_step`."""
        self.young.before_step()

    def after_step(self, step: Step) -> dict[str, Any]:
        """See `Adaptation.after_step`. After an exchange the history has `rank`, their sum, `ranks`, how many
        components were `exchanged`, and what the choice was made by."""
        self.young.after_step(step.index + 1)
        self.observe()
        number = self.method.number_after(step.used, step.budget)
        if number == 0:
            return {}
        offers, seen = self.offers()
        room = {place: self.sides[name] - rank for place, (name, rank) in enumerate(self.ranks().items())}
        made = trades(offers, number, room)
        for place, layer in enumerate(self.layers.values()):
            self._remove(layer, {offer.place for offer, _ in made if offer.layer == place})
            self._add(layer, sum(gaining == place for _, gaining in made), step)
        ranks = list(self.ranks().values())
        return {"rank": sum(ranks), "ranks": ranks, "exchanged": len(made)} | seen

    def _remove(self, layer: Any, places: set[int]) -> None:
        """Remove these components of a layer."""
        import torch

        from methods.shared.optimizer_state import keep

        if places:
            stay = [place for place in range(len(layer.lora_E[ADAPTER])) if place not in places]
            for name, dim in FACTORS:
                parameter = getattr(layer, name)[ADAPTER]
                keep(parameter, torch.tensor(stay, device=parameter.device), dim, self.optimizer)
                self.young.kept(parameter, stay)

    def _add(self, layer: Any, number: int, step: Step) -> None:
        """Append components, with an E of 0."""
        from methods.shared.optimizer_state import append

        if number:
            E, A, B = (getattr(layer, name)[ADAPTER] for name, _ in FACTORS)
            append(E, E.new_zeros(number, 1), 0, self.optimizer)
            append(A, self.directions(A.detach(), number, step.rng).to(A), 0, self.optimizer)
            append(B, self.directions(B.detach().T, number, step.rng).T.to(B), 1, self.optimizer)
            for parameter in (E, A, B):
                self.young.resized(parameter, step.index + 1)

    def ranks(self) -> dict[str, int]:
        """See `Adaptation.ranks`."""
        return {name: len(layer.lora_E[ADAPTER]) for name, layer in self.layers.items()}

    def other_parameters(self) -> int:
        """See `Adaptation.other_parameters`. A layer's ranknum, a parameter for PEFT, is no part of the model."""
        return super().other_parameters() - len(self.layers)

    def at_rank(self, rank: int) -> AbstractContextManager[None]:
        """See `Adaptation.at_rank`: the components that are worth most to the method."""
        from methods.shared.truncation import swapped

        cut = {}
        for layer in self.layers.values():
            E = layer.lora_E[ADAPTER]
            kept = self.worth(layer).argsort(descending=True, stable=True)[:rank]
            cut[E] = E.new_zeros(E.shape).index_copy(0, kept, E.detach()[kept])
        return swapped(cut)

    def state_dict(self) -> dict[str, Any]:
        """See `Adaptation.state_dict`."""
        from methods.shared.optimizer_state import shapes

        return super().state_dict() | {"born": self.young.state(), "shapes": shapes(self.optimizer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Adaptation.load_state_dict`. The layers get the saved ranks first."""
        from methods.shared.optimizer_state import match_shapes

        match_shapes(self.optimizer, state["shapes"])
        self.young.load(state["born"])
        super().load_state_dict(state)

    def scaled_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(B, A) of every layer, (outputs, r) and (r, inputs), of a convolution with kernels; B has E and the scale."""
        return {name: lora_pair(name, layer) for name, layer in self.layers.items()}

    def export(self, path: Path) -> None:
        """A stock LoRA adapter with the head, at these ranks."""
        from methods.shared.stock_lora import export_stock_lora

        export_stock_lora(path, self.scaled_pairs(), self.model, self.head)
