"""AdaMSS (adaptive multi-subspaces), as PEFT implements it: updates in subspaces, one for each cluster of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from harness.errors import InputError
from harness.method import RANK, RANKS, Adaptation, Backbone, PeftForm, Step, Trace, TrainData
from harness.optimizer import adamw
from methods.shared.adamss import as_lora, importance, largest_components, load_importance, score, subspaces
from methods.shared.lora_method import LoraMethod
from methods.shared.peft_model import lora_form, peft_model, shared_parameters, with_values
from methods.shared.peft_names import ADAPTER
from methods.shared.shares import SHARE, check_shares, in_updates

if TYPE_CHECKING:
    import torch
    from torch import nn

    from harness.spec import TrainSpec


class AdaMss(LoraMethod):
    """AdaMSS: the rows of each weight in clusters, a small update B_i A_i V^T for each, V the weight's own directions.

    V^T, (basis_rank, inputs + 1), holds right singular vectors of the weight with its bias as one more column; it is
    frozen. The rows of the left ones are put into `subspaces` clusters by k-means. Those of cluster i get B_i A_i V^T,
    with A_i (subspace_rank, basis_rank) from the cluster's own directions and B_i (rows, subspace_rank) = 0. So a
    layer's rank is at most subspaces * subspace_rank, and its bias is adapted too, where it has one.

    Without a target all subspaces train to the end. `target_subspaces` is PEFT's allocation: by importance, between
    init_warmup and final_warmup, it stops training all but about that many over all layers. What is stopped keeps its
    values and stays in effect. PEFT drops the last one that it should keep with the others: of a target K mostly K - 1
    train on. `components` is ours: by the same importance and schedule exactly so many components stay, and what is
    stopped is removed.
    """

    provenance = "PEFT's; components, which removes what the allocation stops, is ours"
    group = "ranks searched"
    capabilities: ClassVar[tuple[str, ...]] = ("linear", "rank-adaptive")
    backbone_dtypes = ("fp32",)  # it takes subspaces out of the weights by their SVD, and puts the rest in their place
    traces: ClassVar[tuple[Trace, ...]] = (
        RANK,
        RANKS,
        Trace("training_subspaces", "subspaces in training", drawing="steps"),
    )

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    basis_rank: int = Field(
        100, ge=1, description="directions of each weight, at most its smaller side", json_schema_extra={"peft": "r"}
    )
    subspaces: int = Field(
        5, ge=1, description="clusters of each weight's rows", json_schema_extra={"peft": "num_subspaces"}
    )
    subspace_rank: int = Field(1, ge=1, description="rank of the update of each cluster")
    target_subspaces: int | None = Field(
        None,
        ge=1,
        description="PEFT's allocation: its target K over all layers, of which mostly K - 1 train on",
        json_schema_extra={"peft": "asa_target_subspaces"},
    )
    components: int | None = Field(
        None, ge=1, description="components that stay in the end, over all layers: a multiple of subspace_rank"
    )
    init_warmup: float = Field(0.025, ge=0, description=f"before the allocation begins: {SHARE}")
    final_warmup: float = Field(0.5, gt=0, description=f"at which it ends: {SHARE}")
    mask_interval: float = Field(0.05, gt=0, description=f"between two allocations, at least one update: {SHARE}")
    exponent: float = Field(3.0, gt=0, description="of the fall from all subspaces to the target")
    beta1: float = Field(0.85, ge=0, lt=1, description="smoothing of the importance")
    beta2: float = Field(0.85, ge=0, lt=1, description="smoothing of its uncertainty")
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, description="ends of layer names; all if unset")

    @model_validator(mode="after")
    def _fits_together(self) -> AdaMss:
        if self.components is not None:
            given = f"components = {self.components}"
            if self.target_subspaces is not None:
                raise ValueError(f"{given} and target_subspaces = {self.target_subspaces} are both set; give one")
            if self.components % self.subspace_rank:
                raise ValueError(f"{given} should be a multiple of subspace_rank = {self.subspace_rank}")
        check_shares(self, "init_warmup", "final_warmup", "mask_interval")
        if self.init_warmup > 0 and (self.init_warmup < 1) != (self.final_warmup < 1):
            raise ValueError("init_warmup and final_warmup should both be shares below 1, or both numbers of updates")
        if self.init_warmup >= self.final_warmup:
            raise ValueError(f"init_warmup = {self.init_warmup:g} should be below final_warmup = {self.final_warmup:g}")
        return self

    @property
    def rank(self) -> int:
        """Of every layer at the start."""
        return self.subspaces * self.subspace_rank

    @property
    def allocates(self) -> bool:
        """Whether subspaces are stopped on the way."""
        return self.components is not None or self.target_subspaces is not None

    @property
    def target(self) -> int:
        """Subspaces at the end of the allocation, over all layers; PEFT's number with target_subspaces."""
        return self.target_subspaces or (self.components or 0) // self.subspace_rank

    def schedule(self, updates: int) -> tuple[int, int, int]:
        """(first, last, interval) of the allocation, by updates before it: it is made at `last` and every `interval`
        before, down to `first`. Raises InputError where that does not fit into so many updates."""

        def fits(number: int) -> bool:
            first, last = in_updates(number, self.init_warmup, self.final_warmup)
            return first < last < number

        if not fits(updates):
            fitting = filter(fits, range(updates + 1, updates + 100_000))
            setting = f"init_warmup = {self.init_warmup:g} to final_warmup = {self.final_warmup:g}"
            raise InputError(
                f"{setting} do not fit into {updates} updates: they take at least {next(fitting, 'far more')}",
                "final_warmup",
            )
        first, last, interval = in_updates(updates, self.init_warmup, self.final_warmup, self.mask_interval)
        return first, last, max(interval, 1)

    def peft_form(self, ranks: Mapping[str, int]) -> PeftForm | None:
        """See `Method.peft_form`: LoRA with these ranks, from its own start."""
        return lora_form(ranks, 1.0, shared_parameters(self))

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        from torch import nn

        if not backbone.layers:
            return backbone.without_layers()
        targets = backbone.targets(self.target_modules)
        for name in targets:
            layer = backbone.module.get_submodule(name)
            if not isinstance(layer, nn.Linear):
                return f"layer '{name}' is of kind {type(layer).__name__}, and PEFT's AdaMSS adapts nn.Linear alone"
        rank = f"subspaces * subspace_rank = {self.rank}"
        if self.rank > self.basis_rank:
            raise InputError(f"{rank} is above basis_rank = {self.basis_rank}", "subspaces")
        for name in targets:
            if self.rank > (smaller := min(backbone.shape(name))):
                raise InputError(f"{rank} is above the smaller side of layer '{name}', {smaller}", "subspaces")
        sizes = {"components": self.rank * len(targets), "target_subspaces": self.subspaces * len(targets)}
        for name, most in sizes.items():
            if (given := getattr(self, name) or 0) > most:
                raise InputError(f"{name} = {given} is above the {most} that there are", name)
        return None

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`: the ranks, and when they fall."""
        targets = backbone.targets(self.target_modules)
        start = f"{self.rank * len(targets)} components in {len(targets)} layers"
        if not self.allocates:
            return [start]
        first, last, interval = self.schedule(updates := train.budget(num_examples))
        end = f"{self.components} are left" if self.components else f"PEFT's target is {self.target} subspaces, reached"
        return [f"{start}; {end} after update {last + 1} of {updates}, every {interval} from {first + 1}"]

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        from peft import AdamssConfig

        first, last, interval = self.schedule(train.budget(data.size)) if self.allocates else (0, 1, 1)
        shift = -last % interval  # PEFT allocates at multiples of the interval: so `last` is one
        targets, module = backbone.targets(self.target_modules), backbone.module
        config = AdamssConfig(
            r=self.basis_rank,
            num_subspaces=self.subspaces,
            subspace_rank=self.subspace_rank,
            use_asa=self.allocates,
            asa_target_subspaces=max(self.target, 1),
            init_warmup=first + shift,
            final_warmup=last + shift,
            mask_interval=interval,
            asa_schedule_exponent=self.exponent,
            asa_importance_beta=self.beta1,
            asa_uncertainty_beta=self.beta2,
            target_modules=list(targets),
            modules_to_save=list(backbone.head) or None,
        )
        if next(module.parameters()).is_meta:  # PEFT decomposes the weights
            module = with_values(module)
        model = peft_model(module, config)
        optimizer = adamw(model, self.learning_rate, self.weight_decay)
        return AdaMssAdaptation(self, model, optimizer, backbone, targets, (first, last, interval))


class AdaMssAdaptation(Adaptation):
    """A PEFT AdaMSS model in training.

    A subspace is stopped where its parameters require no gradient, and then removed, all 0, or frozen; see `AdaMss`.
    """

    def __init__(
        self,
        method: AdaMss,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        backbone: Backbone,
        targets: tuple[str, ...],
        schedule: tuple[int, int, int],
    ) -> None:
        super().__init__(model, optimizer, backbone)
        peft: Any = model
        self.method, self.tuner, self.schedule = method, peft.base_model, schedule
        self.layers: dict[str, Any] = {name: self.tuner.model.get_submodule(name) for name in targets}

    def after_step(self, step: Step) -> dict[str, Any]:
        """See `Adaptation.after_step`. Where subspaces were stopped the history has how many train, and the ranks."""
        if not self.method.allocates:
            return {}
        before = self._in_training()
        if self.method.components is None:
            shift = -self.schedule[1] % self.schedule[2]
            self.tuner.update_and_allocate(step.index + shift)
        else:
            self._allocate(step)
        left = self._in_training()
        if left == before:
            return {}
        ranks = list(self.ranks().values())
        return {"training_subspaces": len(left), "rank": sum(ranks), "ranks": ranks}

    def _allocate(self, step: Step) -> None:
        """PEFT's importance and schedule; of K subspaces exactly K stay, and the others are removed."""
        first, last, interval = self.schedule
        if not first <= step.index <= last:
            return
        for layer in self.layers.values():
            layer.update_importance(ADAPTER, self.method.beta1, self.method.beta2)
        if (last - step.index) % interval:
            return
        left = (last - step.index) / (last - first)
        total = sum(len(subspaces(layer)) for layer in self.layers.values())
        kept = int(self.method.target + (total - self.method.target) * left**self.method.exponent)
        order = sorted(self._in_training(), key=lambda place: -score(*place))
        for layer, number in order[kept:]:  # of equals the first stays
            for parameter in subspaces(layer)[number]:
                parameter.requires_grad_(False).zero_()
                parameter.grad = None
            step.resized()
        for layer in self.layers.values():
            layer.reset_importance(ADAPTER)

    def _in_training(self) -> list[tuple[Any, int]]:
        """Layer and number of each subspace that is not stopped."""
        layers = self.layers.values()
        return [
            (layer, number) for layer in layers for number, (B, _) in enumerate(subspaces(layer)) if B.requires_grad
        ]

    def _in_effect(self, layer: Any) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """A layer's subspaces that are not removed."""
        return [pair for pair in subspaces(layer) if pair[0].requires_grad or self.method.components is None]

    def ranks(self) -> dict[str, int]:
        """See `Adaptation.ranks`. What PEFT stops is in effect, and counts."""
        return {name: sum(len(A) for _, A in self._in_effect(layer)) for name, layer in self.layers.items()}

    def adapter_parameters(self) -> int:
        """Parameters of the subspaces in effect, those that are stopped and not removed included."""
        layers = self.layers.values()
        return sum(B.numel() + A.numel() for layer in layers for B, A in self._in_effect(layer))

    def stored_bytes(self) -> int:
        """See `Adaptation.stored_bytes`: of the LoRA that `export` writes, which needs no V."""
        size = self.head_parameters()
        for name, rank in self.ranks().items():
            base = self.layers[name].get_base_layer()
            size += rank * sum(base.weight.shape) + (0 if base.bias is None or not rank else len(base.bias))
        return size * next(iter(self.layers.values())).get_base_layer().weight.element_size()

    def at_rank(self, rank: int) -> AbstractContextManager[None]:
        """See `Adaptation.at_rank`: the largest components of each layer; see `largest_components`."""
        from methods.shared.truncation import swapped

        return swapped({own: value for layer in self.layers.values() for own, value in largest_components(layer, rank)})

    def state_dict(self) -> dict[str, Any]:
        """See `Adaptation.state_dict`. The clusters are in it: k-means need not give the same on another machine."""
        return super().state_dict() | {
            "stopped": {name: p for name, p in self._adapter() if not p.requires_grad},
            "importance": importance(self.model),
            "rows": {name: layer.scatter_index[ADAPTER] for name, layer in self.layers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Adaptation.load_state_dict`."""
        super().load_state_dict(state)
        parameters = dict(self._adapter())
        for name, value in state["stopped"].items():
            parameters[name].requires_grad_(False).copy_(value)
        load_importance(self.model, state["importance"])
        for name, layer in self.layers.items():
            layer.scatter_index[ADAPTER].copy_(state["rows"][name])

    def _adapter(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if ".adamss_" in name)

    def export(self, path: Path) -> None:
        """A stock LoRA adapter with the head: `lora_bias` holds what the update does to the biases."""
        from methods.shared.stock_lora import export_stock_lora

        pairs, biases = {}, {}
        for name, layer in self.layers.items():
            B, A, bias = as_lora(layer)
            pairs[name] = B, A
            if layer.get_base_layer().bias is not None and self.ranks()[name]:
                biases[name] = bias
        export_stock_lora(path, pairs, self.model, self.head, biases)
