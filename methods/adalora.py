"""AdaLoRA (Zhang et al., ICLR 2023, arXiv 2303.10512), as PEFT implements it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from harness.errors import InputError
from harness.method import EVERY_DTYPE, RANK, RANKS, Adaptation, Backbone, PeftForm, Step, Trace, TrainData
from harness.optimizer import adamw
from methods.shared.lora_method import LoraMethod
from methods.shared.peft_model import lora_form, peft_model, shared_parameters
from methods.shared.peft_names import ADAPTER
from methods.shared.shares import SHARE, check_shares, in_updates
from methods.shared.svd_lora import lora_pair, orthogonality

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from harness.spec import TrainSpec


class AdaLora(LoraMethod):
    """AdaLoRA (Zhang et al., 2023): updates P diag(E) Q, ranks cut by importance down to a common budget.

    Every layer starts with init_rank triplets (a column of P, an entry of E, a row of Q). For tinit updates all of them
    train. Then, every deltaT updates, the triplets of all layers are ranked by their importance (Section 3.2: smoothed
    sensitivity times uncertainty), and the E of the least important is set to 0, so that their number falls along a
    cubic (equation 12) to target_rank times the number of layers. The last tfinal updates train what is left.
    The update is scaled by alpha / init_rank throughout.

    Hyperparameters may be given by PEFT's names: adalora[init_r=12,target_r=8] is adalora[init_rank=12,target_rank=8].
    """

    provenance = "PEFT's"
    group = "ranks searched"
    capabilities: ClassVar[tuple[str, ...]] = ("linear", "conv2d", "rank-adaptive")
    backbone_dtypes = EVERY_DTYPE
    traces: ClassVar[tuple[Trace, ...]] = (RANK, RANKS)

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    init_rank: int = Field(
        12,
        ge=1,
        description="rank of every layer at the start, at most its smaller side",
        json_schema_extra={"peft": "init_r"},
    )
    target_rank: int = Field(
        8,
        ge=1,
        description="mean rank of the layers at the end, below init_rank",
        json_schema_extra={"peft": "target_r"},
    )
    components: int | None = Field(
        None,
        ge=1,
        description="triplets at the end over all layers, instead of target_rank times their number",
        exclude_if=lambda value: value is None,  # younger than the first records: without it, their run_ids stay
    )
    alpha: float = Field(
        32.0, gt=0, description="the update is scaled by alpha / init_rank", json_schema_extra={"peft": "lora_alpha"}
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the adapter's input", json_schema_extra={"peft": "lora_dropout"}
    )
    orthogonality: float = Field(
        0.1,
        ge=0,
        description="weight of the mean of ||P^T P - I||_F and ||Q Q^T - I||_F over the layers",
        json_schema_extra={"peft": "orth_reg_weight"},
    )
    beta1: float = Field(0.85, gt=0, lt=1, description="smoothing of the sensitivity")
    beta2: float = Field(0.85, gt=0, lt=1, description="smoothing of the uncertainty")
    tinit: float = Field(0.1, ge=0, description=f"before the ranks begin to fall: {SHARE}")
    tfinal: float = Field(0.5, ge=0, description=f"after the ranks have fallen: {SHARE}")
    deltaT: float = Field(1e-3, gt=0, description=f"between two allocations, at least one update: {SHARE}")  # noqa: N815
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, description="ends of layer names; all if unset")

    @model_validator(mode="after")
    def _fits_together(self) -> AdaLora:
        if self.components is None and self.init_rank <= self.target_rank:
            raise ValueError(f"init_rank = {self.init_rank} should be above target_rank = {self.target_rank}")
        check_shares(self, "tinit", "tfinal", "deltaT")
        return self

    def peft_form(self, ranks: Mapping[str, int]) -> PeftForm | None:
        """See `Method.peft_form`: LoRA with the triplets that stayed, E in one of its factors."""
        return lora_form(ranks, self.alpha / self.init_rank, shared_parameters(self, self.dropout))

    def schedule(self, updates: int) -> tuple[int, int, int]:
        """(tinit, tfinal, deltaT) in updates, for a run of `updates`. Raises InputError where they do not fit in."""
        tinit, tfinal, interval = in_updates(updates, self.tinit, self.tfinal, self.deltaT)
        if max(tinit, 1) + tfinal >= updates:  # importance is known after an update
            raise InputError(
                f"tinit = {self.tinit:g} and tfinal = {self.tfinal:g} are {tinit} and {tfinal} of {updates} updates: "
                f"their sum should be below {updates}, and tfinal at most {max(updates - 2, 0)}",
                "tinit" if self.tinit > self.tfinal else "tfinal",
            )
        return tinit, tfinal, max(interval, 1)

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        from torch import nn

        targets = backbone.targets(self.target_modules)
        if not targets:
            return backbone.without_layers()
        for name in targets:
            layer = backbone.module.get_submodule(name)
            if isinstance(layer, nn.Conv2d) and layer.groups != 1:
                return f"layer '{name}' is a convolution in {layer.groups} groups, which PEFT's AdaLoRA cannot adapt"
        backbone.check_rank(self.init_rank, targets, "init_rank")
        if self.components is not None and self.components >= self.init_rank * len(targets):
            raise InputError(
                f"components = {self.components} should be below the {self.init_rank * len(targets)} at the start",
                "components",
            )
        return None

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`: when the ranks fall."""
        updates = train.budget(num_examples)
        tinit, tfinal, interval = self.schedule(updates)
        return [f"ranks fall from update {tinit + 1} to {updates - tfinal} of {updates}, every {interval}"]

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        from peft import AdaLoraConfig

        updates = train.budget(data.size)
        tinit, tfinal, interval = self.schedule(updates)
        targets = backbone.targets(self.target_modules)
        config = AdaLoraConfig(
            init_r=self.init_rank,
            target_r=self.target_rank if self.components is None else 1,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            beta1=self.beta1,
            beta2=self.beta2,
            tinit=tinit,
            tfinal=tfinal,
            deltaT=interval,
            total_step=updates,
            orth_reg_weight=0.0,  # PEFT would add its penalty to any loss that the model returns, evaluations included
            target_modules=list(targets),
            modules_to_save=list(backbone.head) or None,
        )
        model: Any = peft_model(backbone.module, config)
        if self.components is not None:  # PEFT knows whole ranks a layer only
            model.base_model.rankallocator.target_bgt = self.components
        for name, parameter in model.named_parameters():
            if ".ranknum." in name:  # PEFT forgets on the meta device and where it casts to float32
                parameter.requires_grad_(False)
        optimizer = adamw(model, self.learning_rate, self.weight_decay)
        return AdaLoraAdaptation(model, optimizer, backbone, targets, self.orthogonality)


class AdaLoraAdaptation(Adaptation):
    """A PEFT AdaLoRA model in training.

    layers: the adapted layers by their names in the backbone. `lora_A` is Q, (r, inputs); `lora_E` is E, (r, 1);
    `lora_B` is P, (outputs, r), with r = init_rank throughout: PEFT masks, and never shrinks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        backbone: Backbone,
        targets: tuple[str, ...],
        orthogonality: float,
    ) -> None:
        super().__init__(model, optimizer, backbone)
        tuner: Any = model.base_model
        self.tuner = tuner
        self.config = tuner.peft_config[ADAPTER]
        self.layers: dict[str, Any] = {name: tuner.model.get_submodule(name) for name in targets}
        self.orthogonality = orthogonality

    def penalty(self) -> Tensor | None:
        """See `Adaptation.penalty`. Equation 4, averaged over the factors as PEFT does."""
        weight = self.orthogonality
        return weight * orthogonality(self.layers.values()) if weight else None

    def after_step(self, step: Step) -> dict[str, Any]:
        """See `Adaptation.after_step`. After an allocation the history has `rank`, their sum, and `ranks`."""
        before = self.config.rank_pattern
        # It is given the updates made, so that the last tfinal of them train what is left.
        self.tuner.update_and_allocate(step.index + 1)
        if self.config.rank_pattern is before:
            return {}
        step.resized()
        ranks = list(self.ranks().values())
        return {"rank": sum(ranks), "ranks": ranks}

    def ranks(self) -> dict[str, int]:
        """See `Adaptation.ranks`. From the last allocation, since masked entries revive until the next one."""
        pattern = {name.partition(".lora_E")[0]: kept for name, kept in (self.config.rank_pattern or {}).items()}
        return {name: sum(pattern[name]) if pattern else layer.r[ADAPTER] for name, layer in self.layers.items()}

    def at_rank(self, rank: int) -> AbstractContextManager[None]:
        """See `Adaptation.at_rank`: the triplets with the largest |E|."""
        from methods.shared.truncation import largest, swapped

        return swapped({E: largest(E, rank) for E in (layer.lora_E[ADAPTER] for layer in self.layers.values())})

    def adapter_parameters(self) -> int:
        """Parameters of the triplets that are left: outputs + inputs + 1 each."""
        sizes = {
            name: len(layer.lora_B[ADAPTER]) + layer.lora_A[ADAPTER].shape[1] for name, layer in self.layers.items()
        }
        return sum(rank * (sizes[name] + 1) for name, rank in self.ranks().items())

    def other_parameters(self) -> int:
        """See `Adaptation.other_parameters`. A layer's ranknum, a parameter for PEFT, is no part of the model."""
        return super().other_parameters() - len(self.layers)

    def state_dict(self) -> dict[str, Any]:
        """See `Adaptation.state_dict`."""
        allocator = self.tuner.rankallocator
        return super().state_dict() | {
            "sensitivity": allocator.exp_avg_ipt,
            "uncertainty": allocator.exp_avg_unc,
            "rank_pattern": self.config.rank_pattern,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Adaptation.load_state_dict`."""
        super().load_state_dict(state)
        parameters = dict(self.tuner.model.named_parameters())
        allocator = self.tuner.rankallocator
        for name, smoothed in (("exp_avg_ipt", state["sensitivity"]), ("exp_avg_unc", state["uncertainty"])):
            setattr(allocator, name, {key: value.to(parameters[key].device) for key, value in smoothed.items()})
        # PEFT reads no value of it, but starts the averages anew without it.
        allocator.ipt = dict(allocator.exp_avg_ipt)
        self.config.rank_pattern = state["rank_pattern"]

    def export(self, path: Path) -> None:
        """A stock LoRA adapter with the head, at these ranks (PEFT's own form of it warns at a layer without rank).

        Raises ValueError for a dilated convolution, or one that pads with other than zeros, as stock LoRA does neither.
        """
        from methods.shared.stock_lora import export_stock_lora

        pairs = {name: lora_pair(name, layer) for name, layer in self.layers.items()}
        export_stock_lora(path, pairs, self.model, self.head)
