"""LoRA (Hu et al., 2022, arXiv 2106.09685), as PEFT implements it, with ranks of one's own choice."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import Field, field_validator, model_validator

from harness.errors import InputError, unknown
from harness.method import EVERY_DTYPE, PACKED, Adaptation, Backbone, Finished, FinishedRun, PeftForm, TrainData
from harness.optimizer import adamw
from methods.shared.lora_method import LoraMethod
from methods.shared.peft_model import OF_ALL_RANKS, lora_form, lora_model, nearest_rank, pattern_of, shuffled, unfit
from methods.shared.placement import BY_DEPTH, Placement, Rule

if TYPE_CHECKING:
    import torch

    from harness.spec import TrainSpec

MOST_ITERATIONS = 1000  # of PiSSA's fast SVD
OWN_SCALE = "PEFT's rank_pattern would divide alpha by each layer's own rank"
INITS = ("default", "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4", "pissa_niter_16")


class Lora(LoraMethod):
    """LoRA (Hu et al., 2022): W + (alpha / rank) B A with one rank, or a rank for each layer.

    Hyperparameters may be given by PEFT's names: lora[r=4,lora_alpha=8] is lora[rank=4,alpha=8].

    Scaling: every layer's update is scaled by alpha / rank (with rslora alpha / sqrt(rank), Kalajdzievski, 2023),
    where `rank` is the parameter, whatever the layer's own rank in `rank_pattern` is. So a component has the same
    weight in every layer, as it has where a method removes components from a LoRA of that rank. PEFT's rank_pattern
    divides alpha by the layer's own rank instead.

    Inits: "default" (A uniform, B = 0), "gaussian" (B = 0), "orthogonal" (B A = 0, even ranks), and those that move a
    part of the frozen weight into the adapter, so that its function stays: "olora" (Bueyuekakyuez, 2024), "pissa" (Meng
    et al., 2024) and "pissa_niter_N" (its fast SVD with N iterations). An export of the latter three is a LoRA of twice
    the rank on the backbone as it was.

    Controls: `ranks` and `parameters` are filled in when a run is planned: the run's own parameters are then
    `rank_pattern` and `rank`. `ranks_of` and `parameters_of` name a configuration of the same sweep: each run waits for
    that one's run of its task and seed, and takes its ranks, or the rank nearest to its number of parameters.
    `placement` puts `components` by nothing that was learned, when a run starts, fewer than there are layers, too.
    """

    version = 2
    provenance = "PEFT's"
    group = "fixed rank"
    capabilities = ("linear", "conv2d")
    backbone_dtypes = EVERY_DTYPE
    waits_for = ("ranks_of", "parameters_of")

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    rank: int = Field(
        8, ge=1, description="rank of every adapted layer, at most its smaller side", json_schema_extra={"peft": "r"}
    )
    alpha: float = Field(
        16.0, gt=0, description="the update is scaled by alpha / rank", json_schema_extra={"peft": "lora_alpha"}
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the adapter's input", json_schema_extra={"peft": "lora_dropout"}
    )
    rslora: bool = Field(
        False, description="scale by alpha / sqrt(rank) instead", json_schema_extra={"peft": "use_rslora"}
    )
    dora: bool = Field(
        False,
        description="DoRA (Liu et al., 2024): the norm of each of W's rows is trained on its own",
        json_schema_extra={"peft": "use_dora"},
    )
    init: str = Field(
        "default",
        description="default, gaussian, orthogonal, olora, pissa or pissa_niter_N; true is default",
        json_schema_extra={"peft": "init_lora_weights"},
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=0)]] = Field(
        {},
        description="ends of layer names -> their rank, 0 for none; a full name goes before an end; each layer is "
        "scaled by alpha / rank, not by alpha / its own rank as in PEFT",
    )
    ranks: str | None = Field(
        None, description="run_id (in quotes if all digits): take the ranks that this run ended with"
    )
    ranks_of: str | None = Field(
        None,
        description="label in the same sweep: take the ranks that its run of this task and seed ended with",
        exclude_if=lambda value: value is None,  # as parameters_of: younger than the first records
    )
    shuffle_ranks: bool = Field(
        False, description="permute the ranks among layers of the same shape, drawn from the run's seed"
    )
    placement: Rule | None = Field(
        None,
        description="where all components are put, with none of the above: random (each alike, drawn from the run's "
        "seed), first or last (one to each layer, round and round, from that end on), attention or feed_forward "
        "(spread evenly over the layers of that kind)",
        exclude_if=lambda value: value is None,  # as components and draw: younger than the first records
    )
    components: int | None = Field(
        None,
        ge=1,
        description="with placement: rank-one components of all layers together; rank is the most that a layer gets",
        exclude_if=lambda value: value is None,
    )
    draw: int = Field(
        0,
        ge=0,
        le=999,  # each is drawn after those before it
        description="with placement: which draw of the run's seed it is, to compare several of one seed",
        exclude_if=lambda value: value == 0,
    )
    parameters: int | None = Field(
        None, ge=1, description="adapter parameters: take the rank for all layers that comes nearest"
    )
    parameters_of: str | None = Field(
        None, description="label in the same sweep: those of its run", exclude_if=lambda value: value is None
    )
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, description="ends of layer names; all if unset")

    @field_validator("init", mode="before")
    @classmethod
    def _peft_default(cls, init: Any) -> Any:
        """PEFT writes its default as true. Its false, for a model that is changed from the start, is none of ours."""
        if init is False:
            raise ValueError(f"false, both factors at random, changes the model before it is trained: give {INITS[0]}")
        return "default" if init is True else init

    @field_validator("init")
    @classmethod
    def _known_init(cls, init: str) -> str:
        number = re.fullmatch(r"pissa_niter_(-?[0-9]+)", init)
        if number and not (len(number[1]) < 9 and 1 <= int(number[1]) <= MOST_ITERATIONS):
            raise ValueError(f"'{init}' is not allowed: N of pissa_niter_N is 1 to {MOST_ITERATIONS}")
        if init not in INITS and not number:
            raise unknown("init", init, INITS)
        return init

    @model_validator(mode="after")
    def _fits_together(self) -> Lora:
        size = "parameters" if self.parameters is not None else "parameters_of"
        if (value := getattr(self, size)) is not None:
            for name in self.changed("ranks", "ranks_of", "rank_pattern", "shuffle_ranks", "rank", "parameters_of"):
                if name != size:
                    raise ValueError(f"{size} = {value} sets the rank, and so does {name}: give one")
        if self.shuffle_ranks and self.ranks is None and self.ranks_of is None and not self.rank_pattern:
            raise ValueError("shuffle_ranks = true has nothing to shuffle: give ranks_of, ranks or rank_pattern")
        for name in ("ranks", "rank_pattern"):
            if self.ranks_of is not None and getattr(self, name):
                raise ValueError(f"ranks_of = {self.ranks_of} sets the ranks, and so does {name}: give one")
        if self.dora and self.changes_backbone:
            raise ValueError(f"dora = true cannot be combined with init = {self.init}: give one of them")
        return self

    @model_validator(mode="after")
    def _placement_fits(self) -> Lora:
        if self.placement is None:
            for name in ("components", "draw"):
                if value := getattr(self, name):
                    raise ValueError(f"{name} = {value} needs placement: {', '.join(get_args(Rule))}")
            return self
        if self.components is None:
            raise ValueError(f"placement = {self.placement} needs components: how many in all layers together")
        for name in self.changed("ranks", "ranks_of", "rank_pattern", "parameters", "parameters_of"):
            raise ValueError(f"placement = {self.placement} sets the ranks, and so does {name}: give one")
        if self.draw and self.placement in BY_DEPTH:
            raise ValueError(f"draw = {self.draw} with placement = {self.placement}: nothing is drawn there")
        if self.init == "orthogonal":
            raise ValueError(f"init = orthogonal takes even ranks, and placement = {self.placement} odd ones, too")
        return self

    def peft_form(self, ranks: Mapping[str, int]) -> PeftForm | None:
        """See `Method.peft_form`: itself. Of `parameters_of`, a run's rank is known by its ranks alone."""
        if self.parameters_of is not None:
            rank = max(ranks.values(), default=0) or self.rank
            return self.model_copy(update={"parameters_of": None, "rank": rank}).peft_form(ranks)
        settings = {"use_dora": self.dora, "init_lora_weights": self.init == "default" or self.init}
        return lora_form(ranks, self.scale, self.model_dump(mode="json", include=OF_ALL_RANKS), **settings)

    @property
    def changes_backbone(self) -> bool:
        """Whether the init moves a part of the frozen weights into the adapter."""
        return self.init == "olora" or self.init.startswith("pissa")

    def resolve(self, backbone: Backbone, finished: FinishedRun) -> Lora:
        """See `Method.resolve`: `parameters` becomes `rank`, `ranks` a `rank_pattern` (whose origin it stays)."""
        targets = backbone.targets(self.target_modules)
        if self.parameters is not None and targets:
            rank = nearest_rank(backbone, targets, self.parameters, self.dora)
            return self.model_copy(update={"parameters": None, "rank": rank})
        if self.ranks is None:
            return self
        if self.rank_pattern:
            raise InputError("ranks and rank_pattern are both set; give one of them", "rank_pattern")
        found, name = finished(self.ranks).ranks, f"run '{self.ranks}'"
        if not found:
            raise InputError(f"{name} ended with no ranks: give the run of a method that has a rank", self.ranks)
        foreign = [layer for layer in found if layer not in backbone.layers]
        if foreign:
            raise InputError(
                f"{len(foreign)} of the {len(found)} layers of {name} are not in this backbone, the first of them "
                f"'{foreign[0]}': take a run on the same model",
                self.ranks,
            )
        return self.model_copy(update={"rank_pattern": pattern_of(found, targets)})

    def inherit(self, backbone: Backbone, parents: Mapping[str, Finished]) -> Lora:
        """See `Method.inherit`: `parameters_of` becomes `rank`, `ranks_of` a `rank_pattern` (whose origin it stays)."""
        targets = backbone.targets(self.target_modules)
        if "ranks_of" in parents:
            return self.model_copy(update={"rank_pattern": pattern_of(parents["ranks_of"].own_ranks(), targets)})
        if "parameters_of" not in parents:
            return self
        rank = nearest_rank(backbone, targets, parents["parameters_of"].adapter_parameters(), self.dora)
        return self.model_copy(update={"parameters_of": None, "rank": rank})

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        if not backbone.layers:
            return backbone.without_layers()
        if backbone.dtype in PACKED and (self.changes_backbone or self.dora):
            reads = f"init = {self.init}" if self.changes_backbone else "dora = true"
            return f"{reads} reads the weights, which are packed as {backbone.dtype}"
        linear_only = None if self.init in ("default", "gaussian") else f"init = {self.init}"
        if (placement := self._placement()) is not None:
            targets = backbone.targets(self.target_modules)
            reason = placement.misfit(backbone, targets)
            return reason or unfit(backbone, list(placement.candidates(backbone, targets)), linear_only)
        ranks = self.layer_ranks(backbone)
        if not any(ranks.values()):
            return "every layer has rank 0"
        for layer, rank in ranks.items():
            backbone.check_rank(rank, (layer,))
            if self.init == "orthogonal" and rank % 2:
                raise InputError(f"init = orthogonal takes even ranks; rank = {rank} of layer '{layer}' is odd", "init")
        return unfit(backbone, [layer for layer, rank in ranks.items() if rank], linear_only)

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`: what the ranks are where they differ."""
        if (placement := self._placement()) is not None:
            what = placement.told(backbone, backbone.targets(self.target_modules))
        elif self.rank_pattern:
            ranks = self.layer_ranks(backbone).values()
            what = f"{sum(ranks)} components in {sum(rank > 0 for rank in ranks)} of {len(ranks)} layers"
        else:
            return []
        return [f"{what}, each scaled by {self.scale:g}; {OWN_SCALE}"]

    @property
    def scale(self) -> float:
        """What the update B A is multiplied by, in every layer."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def layer_ranks(self, backbone: Backbone) -> dict[str, int]:
        """The rank of every targeted layer, 0 for one without an adapter; not yet shuffled.

        Raises InputError for a pattern that names no targeted layer, or before `resolve` and `inherit`.
        """
        if self.parameters or self.parameters_of or ((self.ranks or self.ranks_of) and not self.rank_pattern):
            raise InputError("filled in when a run is planned or starts: call Method.resolve and Method.inherit first")
        ranks = dict.fromkeys(backbone.targets(self.target_modules), self.rank)
        for end, rank in self.rank_pattern.items():
            named = [layer for layer in backbone.targets((end,)) if layer in ranks]
            if not named:
                raise InputError(f"rank_pattern names '{end}', which target_modules leaves out", end)
            ranks |= {layer: rank for layer in named if layer == end or layer not in self.rank_pattern}
        return ranks

    def _placement(self) -> Placement | None:
        if self.placement is None or self.components is None:
            return None
        return Placement(self.placement, self.components, self.rank, self.draw)

    def _drawn_ranks(self, backbone: Backbone, rng: torch.Generator) -> dict[str, int]:
        """The rank of every targeted layer, 0 for one without an adapter, with what the run's seed decides."""
        if (placement := self._placement()) is not None:
            return placement.ranks(backbone, backbone.targets(self.target_modules), rng)
        ranks = self.layer_ranks(backbone)
        return shuffled(ranks, backbone, rng) if self.shuffle_ranks else ranks

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        from methods.shared.lora_adaptation import LoraAdaptation

        ranks = self._drawn_ranks(backbone, rng)
        on_meta = next(backbone.module.parameters()).is_meta  # there, shapes alone: PEFT's inits need values
        init = True if on_meta or self.init == "default" else self.init
        model = lora_model(backbone, ranks, self.scale, self.dropout, init_lora_weights=init, use_dora=self.dora)
        optimizer = adamw(model, self.learning_rate, self.weight_decay)
        return LoraAdaptation(model, optimizer, backbone, tuple(ranks), self.changes_backbone)
