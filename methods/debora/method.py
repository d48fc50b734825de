"""dEBORA (Zangrando et al., ICLR 2025): its hyperparameters and checks. The run itself is in `adaptation`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from harness.errors import InputError
from harness.method import Adaptation, Backbone, Method, TrainData

if TYPE_CHECKING:
    import torch

    from harness.spec import TrainSpec


class Debora(Method):
    """dEBORA (Zangrando et al., 2025): U diag(s) V^T, with s and the ranks found by Frank-Wolfe on a second data half.

    Lower level: AdamW on U, V and the head over one half of the training set. Upper level: after every T_max of those
    updates, one Frank-Wolfe step on s with a batch of the other half; from step n0 on, components whose s fell to eps
    are removed. When search_fraction of the budget is used, s is frozen and U, V and the head train on all the data.
    """

    data_rule: ClassVar[Literal["all", "halves"]] = "halves"
    capabilities: ClassVar[tuple[str, ...]] = ("linear", "rank-adaptive")

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of the lower level")
    weight_decay: float = Field(1e-3, ge=0, description="AdamW's decoupled weight decay, on matrices only")
    tau: float = Field(16.0, gt=0, description="bound on the sum of s - eps over a simplex")
    rank: int = Field(8, ge=1, description="rank of every layer at the start, at most its smaller side")
    eps: float = Field(1e-3, gt=0, description="least value of an entry of s; eps * rank is at most tau")
    budget_scope: Literal["layer", "global"] = Field("layer", description="tau bounds each layer, or the whole network")
    start_at: Literal["interior", "vertex"] = Field(
        "interior", description="s at the start: tau shared out evenly, or eps everywhere"
    )
    hypergradient: Literal["closed_form", "direct"] = Field(
        "closed_form", description="Theorem 4.1's, or the partial derivative in s alone"
    )
    T_max: int = Field(10, ge=1, description="lower-level updates before each upper-level step")
    n0: int = Field(5, ge=0, description="upper-level steps made before the first truncation")
    p: float = Field(0.0, ge=0, description="a simplex with a Frank-Wolfe gap of at most p, in loss, stays where it is")
    step_rule: Literal["fixed", "diminishing"] = Field(
        "fixed", description="Frank-Wolfe step n is step_size, or step_size * 2 / (n + 2)"
    )
    step_size: float = Field(0.1, gt=0, le=1, description="see step_rule; 1 goes all the way to a vertex")
    search_fraction: float = Field(0.5, gt=0, le=1, description="share of the budget after which s is frozen")
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, description="ends of layer names; all if unset")

    @model_validator(mode="after")
    def _eps_fits(self) -> Debora:
        if self.eps * self.rank > self.tau:
            raise ValueError(f"eps * rank = {self.eps * self.rank:g} should be at most tau = {self.tau:g}")
        return self

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        targets = backbone.targets(self.target_modules)
        backbone.check_rank(self.rank, targets)
        least = self.eps * self.rank * len(targets)
        if self.budget_scope == "global" and least > self.tau:
            raise InputError(
                f"eps * rank * layers = {least:g} should be at most tau = {self.tau:g} where budget_scope = global"
            )
        kernels = [name for name in targets if backbone.module.get_parameter(f"{name}.weight").dim() > 2]
        if kernels:
            return f"the CP adapter for convolutions is not there yet (layer '{kernels[0]}')"
        return None

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        from methods.debora.adaptation import adapt

        return adapt(self, backbone, data)
