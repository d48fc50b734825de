"""dEBORA (Zangrando et al., ICLR 2025): its hyperparameters and checks. The run itself is in `adaptation`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from harness.errors import InputError
from harness.method import RANK, RANKS, Adaptation, Backbone, Method, PeftForm, Trace, TrainData, is_adaptable
from harness.parameters import Range
from methods.debora.schedule import Schedule, batches_a_step
from methods.shared.peft_model import lora_form, shared_parameters

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    import torch

    from harness.spec import TrainSpec
    from methods.debora.search import Search
    from methods.debora.upper_level import HypergradientRule


class Debora(Method):
    """dEBORA (Zangrando et al., 2025): updates in CP form, s and ranks found by Frank-Wolfe on a second data half.

    Lower level: AdamW on the factors (on their manifold) and the head over one half of the training set. Upper level:
    after every T_max of those updates, one Frank-Wolfe step on s with a batch of the other half; from step n0 on,
    components whose s fell to eps are removed. When the face is identified, or search_fraction of the budget is used,
    s is frozen, every component at eps goes, and the factors and the head train on all the data.

    Budget: every batch through forward and backward counts, and so does each trial of the backtracking (a forward) and
    each product with second derivatives of `implicit`.
    """

    version: ClassVar[int] = 3
    data_rule: ClassVar[Literal["all", "halves"]] = "halves"
    capabilities: ClassVar[tuple[str, ...]] = ("linear", "conv2d", "rank-adaptive")
    traces: ClassVar[tuple[Trace, ...]] = (
        RANK,
        Trace("gap", "Frank-Wolfe gap", drawing="log_line"),
        Trace("active_components", "active components", drawing="steps"),
        Trace("hypergradient_norm", "norm of the hypergradient", drawing="log_line"),
        Trace("step_size", "step size"),
        Trace("jump", "norm of the removed update"),
        Trace("residual", "relative residual of the solve", drawing="log_line"),
        Trace("trials", "trials of the backtracking"),
        Trace("curvature", "curvature", drawing="log_line"),
        RANKS,
        Trace("away", "share of away steps", drawing=None),  # one of 0 and 1 on most steps: no line can be read
        Trace("drop", "share of drop steps", drawing=None),
        Trace("s", "s of the components that are left", drawing=None),  # fewer and fewer
    )
    search_space = {
        "learning_rate": Range(1e-4, 1e-2, log=True),
        "tau": Range(1.0, 64.0, log=True),
        "step_size": Range(0.02, 0.5, log=True),
    }

    recipe: Literal["ours", "paper"] = Field(
        "ours", description="defaults of everything below: what was found to identify ranks, or the paper's own form"
    )
    learning_rate: float = Field(
        1e-3, gt=0, description="peak learning rate of the lower level; unset: 3e-3 where geometry is not matrix"
    )
    weight_decay: float = Field(
        1e-3, ge=0, description="AdamW's decoupled weight decay, on unconstrained matrices only"
    )
    geometry: Literal["matrix", "oblique", "stiefel"] = Field(
        "matrix", description="factors' columns: free, of norm 1, or orthonormal (a kernel's small factors: norm 1)"
    )
    tau: float | None = Field(
        None,
        gt=0,
        le=1e30,
        description="bound on the sum of s - eps over a simplex; unset: 2 for each of its components, 1 where geometry "
        "is not matrix",
    )
    rank: int = Field(8, ge=1, description="rank of every layer at the start, at most its smaller side")
    components: int | None = Field(
        None, ge=1, description="target: the search ends where so many components are left, over all layers"
    )
    adapter_parameters: int | None = Field(
        None, ge=1, description="target: the same as most parameters of the adapter; or give components"
    )
    eps: float = Field(1e-3, gt=0, description="least value of an entry of s; eps times the components is at most tau")
    budget_scope: Literal["layer", "global"] = Field(
        "global", description="tau bounds each layer, or the whole network; unset with recipe = paper: layer"
    )
    start_at: Literal["interior", "vertex"] | None = Field(
        None,
        description="s at the start: tau shared out, or eps everywhere; unset: vertex for stiefel, else interior",
    )
    factor_penalty: float | None = Field(
        None,
        ge=0,
        le=1e30,
        description="lambda of lambda / 2 times the squared norms of the factors, in the lower level's loss while it "
        "searches; unset: by penalty_share; 0 with recipe = paper and where geometry is not matrix",
    )
    penalty_share: float = Field(
        0.3,
        gt=0,
        description="lambda is such that the penalty's gradient is this share of the loss's, before the first step",
    )
    hypergradient: Literal["closed_form", "direct", "implicit", "free", "path"] = Field(
        "free",
        description="Theorem 4.1's, the partial derivative in s alone, or a solve with the Hessian; ours: the partial "
        "derivative from the lower level's own batches, or its mean along the way from 0 to s; unset with recipe = "
        "paper: closed_form",
    )
    paper_coefficient: bool = Field(
        False, description="closed_form with the paper's coefficient 1 for kernels, instead of the exact 1 / (d - 1)"
    )
    damping: float = Field(1e-3, ge=0, description="implicit: added to the Hessian's diagonal, beside weight_decay")
    iterations: int = Field(10, ge=1, description="implicit: most products with the Hessian (MINRES), a batch each")
    path_points: int = Field(4, ge=1, description="path: points on the way from 0 to s, a batch each")
    momentum: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="share of the earlier hypergradients in the average that a step follows; 0: the newest alone, as "
        "with recipe = paper",
    )
    T_max: int | None = Field(
        None,
        ge=1,
        description="lower-level updates before each upper-level step; unset: about 400 such steps in the search where "
        "hypergradient is free, else 45",
    )
    warm_up: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="share of the budget before the first upper-level step; unset: a tenth of the search, and until the "
        "learning rate has peaked; 0 with recipe = paper",
    )
    n0: int | None = Field(
        None,
        ge=0,
        description="upper-level steps made before the first truncation; unset: 5, from a vertex none before the end",
    )
    p: float = Field(0.0, ge=0, description="a simplex with a Frank-Wolfe gap of at most p, in loss, stays where it is")
    face_steps: int | None = Field(
        None,
        ge=1,
        description="the search ends after so many steps without a change of the active set, if new hypergradients "
        "promise no descent beyond p and their noise",
    )
    steps: Literal["away", "pairwise"] = Field(
        "pairwise", description="away from a vertex or towards one, or from one to another; with recipe = paper: away"
    )
    step_rule: Literal["fixed", "linear", "diminishing", "short", "backtracking"] = Field(
        "linear",
        description="step n is step_size, falls from it to 0, is step_size * 2 / (n + 2), or the short-step rule from "
        "step_size on, with one curvature or with one found by trials; with recipe = paper: short, or backtracking "
        "where geometry is not matrix",
    )
    step_size: float | None = Field(
        None,
        gt=0,
        le=1,
        description="see step_rule; 1 goes all the way to a vertex; unset: all steps together move 4 times all the "
        "weight, at least 0.01; 0.15 with recipe = paper",
    )
    rho: float = Field(0.25, gt=0, le=0.5, description="backtracking: share of the first-order decrease to be reached")
    trials: int = Field(4, ge=1, description="backtracking: most trial points of a step, a batch each")
    search_fraction: float = Field(
        0.5, gt=0, le=1, description="share of the budget after which s is frozen at latest; 0.3 with recipe = paper"
    )
    cut_by: Literal["size", "s"] = Field(
        "size",
        description="what decides at the end of a search that did not reach its target: singular values, or s; with "
        "recipe = paper: s",
    )
    fold: bool = Field(
        True, description="after the search, s goes into the factors, which train free; with recipe = paper: false"
    )
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, description="ends of layer names; all if unset")

    @model_validator(mode="after")
    def _defaults_of_the_recipe(self) -> Debora:
        for name, value in defaults(self.recipe, self.geometry).items():
            if name not in self.model_fields_set:
                object.__setattr__(self, name, value)
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Debora:
        check_parameters(self)
        return self

    @classmethod
    def singular_values(cls, folder: Path) -> dict[str, np.ndarray]:
        """See `Method.singular_values`."""
        from methods.shared.spectrum import spectrum

        return spectrum(folder)

    def peft_form(self, ranks: Mapping[str, int]) -> PeftForm | None:
        """See `Method.peft_form`: LoRA with the components that stayed, each scaled by the share of tau that it starts
        with here; None on manifolds."""
        if self.geometry != "matrix":
            return None
        components = self.rank * (len(ranks) if self.budget_scope == "global" else 1)
        return lora_form(ranks, self.tau / components, shared_parameters(self))

    @property
    def start_point(self) -> Literal["interior", "vertex"]:
        """Where s starts."""
        return self.start_at or ("vertex" if self.geometry == "stiefel" else "interior")

    @property
    def first_truncation(self) -> int | None:
        """Upper-level steps before the first truncation; None: only when the search ends."""
        return 5 if self.n0 is None and self.start_point == "interior" else self.n0

    @property
    def schedule(self) -> Schedule:
        """When the upper level moves."""
        return Schedule(
            self.T_max, self.search_fraction, batches_a_step(self.hypergradient, self.step_rule, self.path_points)
        )

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        targets = backbone.targets(self.target_modules)
        if not targets:
            return backbone.without_layers()
        reason = next(filter(None, (_not_adaptable(backbone, name) for name in targets)), None)
        if reason is not None:
            return reason
        backbone.check_rank(self.rank, targets)
        for name in targets if self.geometry == "stiefel" else ():
            channels = min(backbone.module.get_parameter(f"{name}.weight").shape[:2])
            if 1 < channels < self.rank:
                raise InputError(
                    f"rank = {self.rank} is above the {channels} channels of layer '{name}': geometry = stiefel allows "
                    f"1 to {channels}"
                )
        least = self.eps * self.rank * len(targets)
        if self.budget_scope == "global" and least > self.tau:
            raise InputError(
                f"eps * rank * layers = {least:g} should be at most tau = {self.tau:g} where budget_scope = global"
            )
        return None

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`: which ranks the search can reach."""
        num_layers, budget = len(backbone.targets(self.target_modules)), train.budget(num_examples)
        steps, layerwise = self.schedule.upper_steps(budget), self.budget_scope == "layer"
        components = self.rank if layerwise else self.rank * num_layers
        where = f"each of {num_layers} simplices" if layerwise else f"the one simplex of {num_layers} layers"
        batches = min(budget, round(self.search_fraction * budget))
        found = [f"at most {steps} upper-level steps in {batches} of {budget} batches"]
        if self.start_point == "vertex":
            found.append(f"at most {min(steps, components)} of the {components} components of {where} can get weight")
        elif self.step_size == 1 or self.step_rule == "backtracking":
            found.append(f"a step may empty {where} but for one of its {components} components")
        else:
            found.append(f"at least {max(0, components - steps)} of the {components} components of {where} stay")
        if self.first_truncation is not None and self.first_truncation >= steps:
            found.append(f"n0 = {self.first_truncation}: nothing is removed before the search ends")
        return found

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        from methods.debora.adaptation import DeboraAdaptation, adapted
        from methods.debora.optimizer import manifold_adamw
        from methods.shared.peft_names import ADAPTER

        if data.size < 2:
            raise InputError(f"{data.size} training rows: two halves need at least 2")
        targets = backbone.targets(self.target_modules)
        geometry = {"geometry": self.geometry, "start": self.start_point}
        model, layers = adapted(backbone, targets, r=self.rank, tau=self.tau, eps=self.eps, **geometry)
        constrained = [
            pair
            for layer in layers.values()
            for pair in zip(layer.factors(ADAPTER), layer.manifolds(ADAPTER), strict=True)
        ]
        optimizer = manifold_adamw(model, constrained, self.learning_rate, self.weight_decay)
        search = self._search(len(layers), constrained[0][0].device)
        rule = self._hypergradient_rule()
        return DeboraAdaptation(model, layers, optimizer, backbone, data, search, self.schedule, rule)

    def _search(self, num_layers: int, device: torch.device) -> Search:
        from methods.debora.search import Rules, Search

        rules = Rules(
            tau=self.tau,
            eps=self.eps,
            step_size=self.step_size,
            step_rule=self.step_rule,
            momentum=self.momentum,
            tolerance=self.p,
            rho=self.rho,
            trials=self.trials,
            first_truncation=self.first_truncation,
            face_steps=self.face_steps,
        )
        one_simplex, interior = self.budget_scope == "global", self.start_point == "interior"
        return Search(num_layers, self.rank, rules, one_simplex=one_simplex, interior=interior, device=device)

    def _hypergradient_rule(self) -> HypergradientRule:
        from methods.debora.upper_level import HypergradientRule

        on_manifolds = self.geometry != "matrix"
        return HypergradientRule(
            kind=self.hypergradient,
            on_manifolds=on_manifolds,
            paper_coefficient=self.paper_coefficient,
            damping=self.damping + (0.0 if on_manifolds else self.weight_decay),
            iterations=self.iterations,
            path_points=self.path_points,
        )


def _not_adaptable(backbone: Backbone, name: str) -> str | None:
    """Why the layer can carry no adapter, or None."""
    from torch import nn

    layer = backbone.module.get_submodule(name)
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return (
            f"layer '{name}' is a convolution in {layer.groups} groups, which a CP form over all channels does not fit"
        )
    if not is_adaptable(layer):
        return f"layer '{name}' is a {type(layer).__name__}, neither linear nor nn.Conv2d"
    return None
