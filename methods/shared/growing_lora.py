"""The settings of a LoRA that grows while it trains: its budget, and when how many ranks are given out.

One rank for all layers at the start, then rounds in which some of them gain ranks, up to a total that is never passed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from harness.errors import InputError
from harness.method import RANK, RANKS, Backbone, PeftForm, Trace
from methods.shared.lora_method import LoraMethod
from methods.shared.peft_model import lora_form, shared_parameters, unfit
from methods.shared.shares import SHARE, check_shares, in_updates

if TYPE_CHECKING:
    from typing import Self

    from harness.spec import TrainSpec

SEARCHED = 10_000  # batches above the budget among which the least that does is looked for


class GrowingLora(LoraMethod, ABC):
    """What the methods share: their budget, and when how many ranks are given out, which no score decides."""

    group: ClassVar[str] = "ranks searched"
    capabilities = ("linear", "conv2d", "rank-adaptive")
    traces: ClassVar[tuple[Trace, ...]] = (RANK, RANKS, Trace("score", "score of the growth", drawing="heat_map"))

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    init_rank: int = Field(1, ge=1, description="rank of every adapted layer at the start, at most its smaller side")
    target_rank: int = Field(2, ge=1, description="mean rank of the layers in the end, at least init_rank")
    components: int | None = Field(
        None, ge=1, description="components in the end over all layers, instead of target_rank times their number"
    )
    increment: int | None = Field(
        None, ge=1, description="ranks that a layer gains at once; half of the mean target if unset, at least 1"
    )
    tinit: float = Field(0.0, ge=0, description=f"before the first interval: {SHARE}")
    deltaT: float = Field(1.0, gt=0, description=f"interval between two rounds, at least one update: {SHARE}")  # noqa: N815
    scale: Literal["own", "fixed"] = Field(
        "own", description="the update is scaled by alpha / the layer's rank, or by alpha / init_rank throughout"
    )
    alpha: float = Field(16.0, gt=0, description="see scale", json_schema_extra={"peft": "lora_alpha"})
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the adapter's input", json_schema_extra={"peft": "lora_dropout"}
    )
    orthogonality: float = Field(
        0.1, ge=0, description="weight of the mean of ||A A^T - I||_F and ||B^T B - I||_F over the layers"
    )
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, description="ends of layer names; all if unset")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.components is None and self.target_rank < self.init_rank:
            raise ValueError(f"target_rank = {self.target_rank} is below init_rank = {self.init_rank}")
        check_shares(self, "tinit", "deltaT")
        return self

    @abstractmethod
    def layers_to_grow(self, missing: int, progress: float) -> int:
        """How many layers gain ranks in a round. missing: ranks below the target, at least 1. progress: share of the
        updates after `tinit` that are made, above 0 and below 1."""

    def total(self, num_layers: int) -> int:
        """Components of all layers together in the end."""
        return self.target_rank * num_layers if self.components is None else self.components

    def each(self, num_layers: int) -> int:
        """Ranks that a layer gains at once."""
        return max(1, self.total(num_layers) // (2 * num_layers)) if self.increment is None else self.increment

    def given_out(self, size: int, num_layers: int, used: int, updates: int) -> int:
        """Ranks that all layers together gain after `used` of the `updates`, where they have `size`; 0 for no round."""
        first, interval = self._rhythm(updates)
        missing = self.total(num_layers) - size
        if missing <= 0 or not first < used < updates or (used - first) % interval:
            return 0
        number = min(num_layers, self.layers_to_grow(missing, (used - first) / (updates - first)))
        return min(missing, number * self.each(num_layers))

    def sizes(self, num_layers: int, updates: int) -> dict[int, int]:
        """Components of all layers after each round, by the updates made; at 0 those at the start."""
        first, interval = self._rhythm(updates)
        size = self.init_rank * num_layers
        found = {0: size}
        for used in range(first + interval, updates, interval):
            if not (gained := self.given_out(size, num_layers, used, updates)):
                break
            size += gained
            found[used] = size
        return found

    def scale_of(self, rank: float) -> float:
        """What the update of a layer of this rank is multiplied by."""
        return self.alpha / (rank if self.scale == "own" else self.init_rank)

    def peft_form(self, ranks: Mapping[str, int]) -> PeftForm | None:
        """See `Method.peft_form`: LoRA of these ranks, with the scale of their mean in every layer, as it has one."""
        mean = sum(ranks.values()) / max(1, len(ranks))
        return lora_form(ranks, self.scale_of(mean), shared_parameters(self, self.dropout)) if mean else None

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        if not backbone.layers:
            return backbone.without_layers()
        targets = backbone.targets(self.target_modules)
        backbone.check_rank(self.init_rank, targets, "init_rank")
        least, most = self.init_rank * len(targets), sum(most_ranks(backbone, targets).values())
        if not least <= self.total(len(targets)) <= most:
            given, name = self._target()
            raise InputError(f"{given} should be {least} to {most} components in {len(targets)} layers", name)
        return unfit(backbone, list(targets))

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`: when the layers grow."""
        layers, updates = len(backbone.targets(self.target_modules)), train.budget(num_examples)
        sizes, target = self.sizes(layers, updates), self.total(layers)
        _, *rounds = sizes
        start, end = sizes[0], max(sizes.values())
        if end < target:
            raise self._out_of_reach(layers, updates, end)
        if not rounds:
            return [f"{start} components in {layers} layers are the target: none grows"]
        when = f"{len(rounds)} rounds, after update {rounds[0]} to {rounds[-1]} of {updates}"
        return [f"{start} components in {layers} layers grow to {target} in {when}"]

    def _out_of_reach(self, layers: int, updates: int, reached: int) -> InputError:
        """The error for a target that the budget is too short for."""
        given, name = self._target()
        target, size = self.total(layers), self.init_rank * layers
        most = min(layers, self.layers_to_grow(target - size, 1.0)) * self.each(layers)  # that a round can give out

        def fits(batches: int) -> bool:
            first, interval = self._rhythm(batches)
            rounds = len(range(first + interval, batches, interval))
            return size + rounds * most >= target and max(self.sizes(layers, batches).values()) == target

        least = next((each for each in range(updates + 1, updates + SEARCHED) if fits(each)), None)
        remedy = "lower tinit or deltaT, or raise increment" if least is None else f"it takes at least {least} batches"
        return InputError(
            f"{given}, and growth reaches {reached} of {target} components in {updates} batches: {remedy}", name
        )

    def _target(self) -> tuple[str, str]:
        """What sets the target, with its value, and its name."""
        name = "target_rank" if self.components is None else "components"
        return f"{name} = {getattr(self, name)}", name

    def _rhythm(self, updates: int) -> tuple[int, int]:
        """(tinit, deltaT) in updates."""
        first, interval = in_updates(updates, self.tinit, self.deltaT)
        return first, max(interval, 1)


def most_ranks(backbone: Backbone, targets: Sequence[str]) -> dict[str, int]:
    """The smaller side of each layer."""
    return {name: min(backbone.shape(name)) for name in targets}


def shared_out(order: Sequence[int], room: Sequence[int], each: int, total: int) -> list[int]:
    """How many of `total` ranks each layer gains, at most its room: `each` to a layer, in this order of places, and
    from the first on again where some are left. Together min(total, sum(room))."""
    gains, left = [0] * len(room), min(total, sum(room))
    while left:
        for place in order:
            gain = min(each, room[place] - gains[place], left)
            gains[place] += gain
            left -= gain
    return gains
