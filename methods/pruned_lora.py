"""A LoRA pruned once, by a simple rule: the control for what a search for ranks is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from harness.errors import InputError
from harness.method import RANK, Adaptation, Backbone, Finished, PeftForm, Step, Trace, TrainData
from harness.optimizer import adamw
from methods.shared.cut_lora import CutLoraAdaptation
from methods.shared.lora_method import LoraMethod
from methods.shared.peft_model import lora_form, lora_model, shared_parameters, unfit
from methods.shared.peft_names import ADAPTER
from methods.shared.placement import permutation

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from harness.spec import TrainSpec

KEEP = 0.3  # about what dEBORA is reported to keep of a rank of 8 on GLUE


class PrunedLora(LoraMethod):
    """LoRA at one rank, pruned once over the whole network, at random, by magnitude or by sensitivity, and trained on.

    When `prune_at` of the budget is used, every layer is brought to the singular value decomposition of its update,
    since raw columns are any basis of it; see `methods.shared.canonical`. Component i is then the i-th column b of B
    with the i-th row a of A, and all but `components` (or `keep`) of all layers together are removed for good, with
    their optimizer state. "magnitude" keeps the largest singular values of (alpha / rank) B A, "random" draws from the
    run's seed, each alike, and "sensitivity" keeps those whose removal raises the loss most, to first order: with the
    smallest b . d_b f, averaged over the last batches before; see `PrunedLoraAdaptation`. With `prune_at` 0, for
    "random" alone, the components that stay are those that there are from the start.

    A control for dEBORA's matrix geometry, with the same defaults of rank, learning rate, decay, scale at the start
    (alpha = tau) and length of the search (prune_at = search_fraction). Until the pruning it draws from the half of the
    rows that dEBORA's lower level sees, then from all; the learning-rate schedule goes on. What differs beside the
    choice: dEBORA gives a part of its batches to the upper level, moves the scale of each component, and may remove
    components one after the other.
    """

    version: ClassVar[int] = 2  # 1 chose among raw columns
    provenance = "ours: a control"
    group = "controls"
    data_rule: ClassVar[Literal["all", "halves"]] = "halves"
    capabilities = ("linear", "conv2d", "rank-adaptive")
    waits_for = ("size_of",)

    traces: ClassVar[tuple[Trace, ...]] = (RANK,)

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(1e-3, ge=0, description="AdamW's decoupled weight decay, on matrices only")
    rank: int = Field(
        8,
        ge=1,
        description="rank of every adapted layer before the pruning, at most its smaller side",
        json_schema_extra={"peft": "r"},
    )
    alpha: float = Field(
        16.0,
        gt=0,
        description="the update is scaled by alpha / rank, before and after the pruning",
        json_schema_extra={"peft": "lora_alpha"},
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the adapter's input", json_schema_extra={"peft": "lora_dropout"}
    )
    size_of: str | None = Field(
        None,
        description="label in the same sweep: as many components stay as its run of this task and seed ended with",
        exclude_if=lambda value: value is None,  # younger than the first records: without it, their run_ids stay
    )
    selection: Literal["magnitude", "random", "sensitivity"] = Field(
        "magnitude", description="which components stay: the largest, any, or those whose removal costs most"
    )
    draw: int = Field(
        0,
        ge=0,
        description='"random": which draw of the run\'s seed it is, to compare several of one seed',
        exclude_if=lambda value: value == 0,  # younger than the first records
    )
    components: int | None = Field(None, ge=1, description="components that stay, over all layers; or give keep")
    keep: float | None = Field(None, gt=0, le=1, description=f"share that stays; {KEEP} where neither is given")
    prune_at: float = Field(
        0.3, ge=0, lt=1, description="share of the budget after which components are removed; 0: from the start"
    )
    window: float = Field(
        0.5,
        gt=0,
        le=1,
        exclude_if=lambda value: value == 0.5,  # younger than the first records
        description='"sensitivity": share of the batches before the pruning, the last ones, that it averages over',
    )
    first_rows: Literal["lower", "all"] = Field(
        "lower", description="rows before the pruning: those of a bilevel method's lower level, or all"
    )
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, description="ends of layer names; all if unset")

    @model_validator(mode="after")
    def _fits_together(self) -> PrunedLora:
        if self.components is not None and self.keep is not None:
            raise ValueError(f"components = {self.components} and keep = {self.keep:g} are both set; give one of them")
        for name in ("components", "keep"):
            if self.size_of is not None and getattr(self, name) is not None:
                raise ValueError(f"size_of = {self.size_of} and {name} are both set; give one of them")
        if self.draw and self.selection != "random":
            raise ValueError(f"draw = {self.draw} with selection = {self.selection}: nothing is drawn there")
        if self.prune_at == 0 and self.selection != "random":
            raise ValueError(
                f"prune_at = 0 with selection = {self.selection}: nothing is trained yet to choose by; "
                "set selection = random, or prune_at above 0"
            )
        return self

    def inherit(self, backbone: Backbone, parents: Mapping[str, Finished]) -> PrunedLora:
        """See `Method.inherit`: the sum of the parent's ranks becomes `components`, whose origin `size_of` stays."""
        if "size_of" not in parents:
            return self
        return self.model_copy(update={"components": sum(parents["size_of"].own_ranks().values())})

    def peft_form(self, ranks: Mapping[str, int]) -> PeftForm | None:
        """See `Method.peft_form`: LoRA with the components that stayed."""
        return lora_form(ranks, self.alpha / self.rank, shared_parameters(self, self.dropout))

    def num_kept(self, num_layers: int) -> int:
        """Components that stay of the rank * num_layers, at least 1; 0 for the size of a run that ended with none.

        Raises InputError where `inherit` has still to be called.
        """
        if self.components is not None:
            return self.components
        if self.size_of is not None:
            raise InputError("size_of is filled in when a run starts: call Method.inherit first")
        return max(1, round((KEEP if self.keep is None else self.keep) * self.rank * num_layers))

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        if not backbone.layers:
            return backbone.without_layers()
        targets = backbone.targets(self.target_modules)
        backbone.check_rank(self.rank, targets)
        most, kept = self.rank * len(targets), self.num_kept(len(targets))
        if self.size_of is not None and not 0 < kept <= most:
            return f"{self.size_of} has {kept} components, and rank {self.rank} can have 1 to {most}"
        if kept > most:
            raise InputError(f"components = {self.components} is above the {most} that there are", "components")
        return unfit(backbone, list(targets))

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`."""
        num_layers, budget = len(backbone.targets(self.target_modules)), train.budget(num_examples)
        kept, update = self.num_kept(num_layers), math.ceil(self.prune_at * budget)
        when = f"left after batch {update} of {budget}" if self.prune_at else "there from the start"
        return [f"{kept} of {self.rank * num_layers} components are {when}"]

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        import torch

        targets = backbone.targets(self.target_modules)
        ranks = dict.fromkeys(targets, self.rank)
        # Drawn at the start, so that a resumed run has the same.
        drawn = permutation(self.rank * len(targets), rng, self.draw)[: self.num_kept(len(targets))]
        if self.prune_at == 0:
            left = torch.bincount(drawn // self.rank, minlength=len(targets)).tolist()
            ranks = dict(zip(targets, left, strict=True))
        model = lora_model(backbone, ranks, self.alpha / self.rank, self.dropout)
        optimizer = adamw(model, self.learning_rate, self.weight_decay)
        return PrunedLoraAdaptation(self, model, optimizer, backbone, targets, drawn)


class PrunedLoraAdaptation(CutLoraAdaptation):
    """One run: LoRA on the method's `first_rows`, one pruning, LoRA at the ranks that are left.

    drawn: for "random", the components that stay, positions among those of all layers in turn.
    effects: for "sensitivity", the sum of B^T d_B f over the batches of the window, (layers, rank, rank).

    B^T d_B f = B^T dW A^T tells of every basis at once: where B becomes B Q and A becomes R^T A it becomes
    Q^T (B^T d_B f) R, whose diagonal holds the b . d_b f. So the batches' matrices are added up as they come, while
    B and A move, and only their sum goes to the basis of the pruning. That is the mean effect of the components that
    are there in the end, each followed back through the window in its own coordinates. Were layers rotated before the
    window instead, components would have drifted apart from the decomposition by its end; were they rotated at every
    batch, one place would hold other components where singular values cross.
    """

    method: PrunedLora

    def __init__(
        self,
        method: PrunedLora,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        backbone: Backbone,
        targets: tuple[str, ...],
        drawn: Tensor,
    ) -> None:
        import torch

        super().__init__(method, model, optimizer, backbone, targets)
        self.drawn = drawn
        self.pruned = method.prune_at == 0
        self.stream = "all" if self.pruned else method.first_rows
        self.effects: Tensor | None = None
        if method.selection == "sensitivity":
            device = next(iter(self.layers.values())).lora_A[ADAPTER].weight.device
            self.effects = torch.zeros(len(targets), method.rank, method.rank, device=device)

    def before_step(self, step: Step) -> None:
        """See `Adaptation.before_step`: the batches' own gradients, before clipping."""
        method = self.method
        if self.effects is None or self.pruned or step.used <= (1 - method.window) * method.prune_at * step.budget:
            return
        from methods.shared.optimizer_state import gradient_of

        for effect, (B, _) in zip(self.effects, self.pairs(), strict=True):
            effect += B.detach().flatten(1).T @ gradient_of(B).flatten(1)

    def after_step(self, step: Step) -> dict[str, Any]:
        """See `Adaptation.after_step`. The history of the update that prunes has the `rank` of all layers together."""
        if self.pruned or step.used < self.method.prune_at * step.budget:
            return {}
        values = self._worth()
        kept = self.drawn  # positions among the components of all layers in turn
        if self.method.selection != "random":
            kept = values.argsort(descending=True, stable=True)[: len(self.drawn)].cpu()
        rank = self.method.rank
        self.keep([sorted((kept[kept // rank == number] % rank).tolist()) for number in range(len(self.targets))])
        self.pruned, self.stream = True, "all"
        return {"rank": len(kept)}

    def state_dict(self) -> dict[str, Any]:
        """See `Adaptation.state_dict`."""
        return super().state_dict() | {"pruned": self.pruned, "effects": self.effects}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Adaptation.load_state_dict`."""
        super().load_state_dict(state)
        self.pruned = state["pruned"]
        if self.effects is not None:
            self.effects.copy_(state["effects"])

    def _worth(self) -> Tensor:
        """Bring every layer to the SVD of its update. Returns what each component is worth, layer after layer,
        (layers * rank,) float64: its singular value (all layers have one scale), or minus the sum of its effects."""
        import torch

        bases = self.rotate()
        if self.effects is None:
            return torch.cat([basis.sizes for basis in bases])
        values = []
        for effects, basis in zip(self.effects, bases, strict=True):
            map_B, map_A = basis.maps  # with s = 1 these are R^T and Q^T
            values.append(-(map_A @ effects.double() @ map_B.T).diagonal())
        return torch.cat(values)
