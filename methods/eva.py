"""EVA (Paischer et al., 2024, arXiv 2410.07170), as PEFT implements it, with its batches counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from harness.errors import InputError
from harness.method import RANK, RANKS, Adaptation, Backbone, PeftForm, Step, Trace, TrainData
from harness.optimizer import adamw
from methods.shared.lora_method import LoraMethod
from methods.shared.peft_model import lora_form, lora_model, shared_parameters, unfit
from methods.shared.prepared_lora import PreparedLora

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from harness.spec import TrainSpec

LEAST_BATCHES = 3  # one tells which layers have equal inputs; directions are compared between two


class Eva(LoraMethod):
    """EVA (Paischer et al., 2024): LoRA whose A and ranks are taken from the inputs of its layers; PEFT's.

    Before the first update, batches go forward through the model, and an incremental principal component analysis of
    each layer's inputs runs along. A direction has converged when its cosine with that of the batch before is tau or
    more. Of up to rank * rho directions a layer, those with the largest shares of their layer's variance are taken,
    rank times the number of layers over the whole network. They are the rows of A, orthonormal unless whitened, and
    B = 0, so that the model's function stays. A layer without a direction has no adapter. Then it is a LoRA.

    The batches count in the budget. How many it takes, the data say; a run that has none left to train with fails.
    Layers are linear ones. Hyperparameters may be given by PEFT's names: eva[r=4,lora_alpha=8].
    """

    provenance: ClassVar[str] = "PEFT's"
    group: ClassVar[str] = "ranks from data"
    capabilities: ClassVar[tuple[str, ...]] = ("linear", "rank-adaptive")
    traces: ClassVar[tuple[Trace, ...]] = (RANK, RANKS)

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    rank: int = Field(8, ge=1, description="mean rank of the layers", json_schema_extra={"peft": "r"})
    alpha: float = Field(
        16.0,
        gt=0,
        description="the update is scaled by alpha / rank (see adjust_scaling_factors)",
        json_schema_extra={"peft": "lora_alpha"},
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the adapter's input", json_schema_extra={"peft": "lora_dropout"}
    )
    rho: float = Field(
        2.0, ge=1, allow_inf_nan=False, description="a layer has at most rank * rho components; 1: all have rank"
    )
    tau: float = Field(0.99, ge=0, le=1, description="cosine between two batches from which a direction has converged")
    whiten: bool = Field(False, description="divide each row of A by the square root of its singular value")
    adjust_scaling_factors: bool = Field(
        True, description="every layer is scaled by alpha / rank; false: by alpha / its own rank"
    )
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, description="ends of layer names; all if unset")

    def peft_form(self, ranks: Mapping[str, int]) -> PeftForm | None:
        """See `Method.peft_form`: LoRA with these ranks; None where each layer has a scale of its own."""
        if not self.adjust_scaling_factors and len(set(ranks.values()) - {0}) > 1:
            return None
        rank = self.rank if self.adjust_scaling_factors else max(ranks.values(), default=1)
        return lora_form(ranks, self.alpha / max(1, rank), shared_parameters(self, self.dropout))

    @property
    def most_components(self) -> int:
        """The most components that a layer can get."""
        return round(self.rank * self.rho)

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        if not backbone.layers:
            return backbone.without_layers("linear layer")
        targets = backbone.targets(self.target_modules)
        reason = unfit(backbone, list(targets), "EVA")
        if reason is not None:
            return reason
        for layer in targets:
            outputs, inputs = backbone.shape(layer)
            most = min(outputs, inputs // 2)  # PEFT's analysis takes twice as many directions as it looks for
            if self.most_components > most:
                raise InputError(
                    f"rank = {self.rank} and rho = {self.rho:g} let a layer have {self.most_components} components, "
                    f"and '{layer}' has {outputs} outputs and {inputs} inputs: rank times rho is at most {most} "
                    "(the outputs, or half the inputs)",
                    "rho" if self.rank <= most else "rank",
                )
        return None

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`: what it reads at least, and the ranks that can come out."""
        budget, layers = train.budget(num_examples), len(backbone.targets(self.target_modules))
        if budget <= LEAST_BATCHES:
            raise InputError(
                f"eva reads at least {LEAST_BATCHES} batches before the first update, and the budget is {budget}: give "
                f"at least {LEAST_BATCHES + 1}"
            )
        read = f"at least {LEAST_BATCHES} of {budget} batches are read before the first update, until tau is reached"
        return [f"{self.rank * layers} components in {layers} layers, at most {self.most_components} in one; {read}"]

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        from peft.tuners.lora.config import EvaConfig

        targets = backbone.targets(self.target_modules)
        config = EvaConfig(
            rho=self.rho,
            tau=self.tau,
            whiten=self.whiten,
            adjust_scaling_factors=self.adjust_scaling_factors,
        )
        ranks = dict.fromkeys(targets, self.rank)
        model = lora_model(
            backbone, ranks, self.alpha / self.rank, self.dropout, init_lora_weights="eva", eva_config=config
        )
        optimizer = adamw(model, self.learning_rate, self.weight_decay)
        return EvaAdaptation(self, model, optimizer, backbone, targets, data)


class EvaAdaptation(PreparedLora):
    """One run: EVA's start, and LoRA at the ranks that it found."""

    method: Eva

    def prepare(self, step: Step) -> None:
        """See `Adaptation.prepare`. A and the ranks come from the layers' inputs."""
        from methods.shared.eva import eva_directions, start_from

        directions = eva_directions(step, self.model, self.data)
        if self.method.whiten:
            whiten_once(directions.values())
        start_from(directions, self.model, self.optimizer, self.method.weight_decay)
        self.follow()

    def build(self, ranks: Mapping[str, int]) -> None:
        """See `PreparedLora.build`."""
        from methods.shared.eva import no_directions, start_from

        start_from(no_directions(self.model, ranks), self.model, self.optimizer, self.method.weight_decay)


def whiten_once(directions: Iterable[Tensor]) -> None:
    """Make of PEFT's whitened directions, (rank, inputs) each, v / sqrt(singular value), in place.

    Layers with equal inputs share the memory of their directions, and PEFT 0.21 divides it for every one of them: with
    c layers a row v ends as v / sigma^(c/2) in all. |v| = 1, so its length tells sigma.
    """
    import torch

    sharing: dict[int, list[Tensor]] = {}
    for rows in directions:
        sharing.setdefault(rows.data_ptr(), []).append(rows)
    for group in sharing.values():
        longest = max(group, key=len)
        times = torch.stack([torch.arange(len(longest)) < len(rows) for rows in group]).sum(0).to(longest.device)
        lengths = longest.norm(dim=1)
        longest *= (lengths ** (1 / times - 1))[:, None]
