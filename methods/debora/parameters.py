"""dEBORA's hyperparameters: what they are, what they are if they are not given, and which of them fit together."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from harness.spec import TrainSpec
from methods.debora.recipes import Recipe, defaults
from methods.debora.schedule import Schedule, batches_a_step
from methods.shared.lora_method import LoraMethod


class DeboraParameters(LoraMethod):
    """dEBORA's hyperparameters. See docs/debora.md for the mathematics."""

    recipe: Recipe = Field(
        "ours",
        description="defaults of what follows: what was found to identify ranks, the paper's own form, or what version "
        "3 of this method had (as paper, with hypergradient = direct and step_rule = fixed)",
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
        "searches; unset: by penalty_share; 0 with recipe = paper, where geometry is not matrix, and where a kernel "
        "has more than two factors",
    )
    penalty_share: float = Field(
        3.0,
        gt=0,
        description="lambda is such that the penalty's gradient is this many times the loss's mean gradient, before "
        "the first step",
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
        description="share of the budget before the first upper-level step; unset: a tenth of the search, and until "
        "the learning rate has peaked; 0 with recipe = paper",
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
    def _defaults_of_the_recipe(self) -> DeboraParameters:
        for name, value in defaults(self.recipe, self.geometry).items():
            if name not in self.model_fields_set:
                object.__setattr__(self, name, value)
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> DeboraParameters:
        check_parameters(self)
        return self

    @property
    def start_point(self) -> Literal["interior", "vertex"]:
        """Where s starts."""
        return self.start_at or ("vertex" if self.geometry == "stiefel" else "interior")

    @property
    def first_truncation(self) -> int | None:
        """Upper-level steps before the first truncation; None: only when the search ends."""
        return 5 if self.n0 is None and self.start_point == "interior" else self.n0

    @property
    def has_target(self) -> bool:
        """Whether the search has a size to reach."""
        return self.components is not None or self.adapter_parameters is not None

    def simplex_components(self, num_layers: int) -> int:
        """Components of a simplex at the start."""
        return self.rank * (num_layers if self.budget_scope == "global" else 1)

    def simplex_tau(self, num_layers: int) -> float:
        """tau, with its default filled in: an interior start then has the scale of a LoRA with alpha = 2 rank."""
        if self.tau is not None:
            return self.tau
        return (2.0 if self.geometry == "matrix" else 1.0) * self.simplex_components(num_layers)

    def schedule(self, train: TrainSpec) -> Schedule:
        """When the upper level moves: not before the learning rate has peaked, unless `warm_up` says so."""
        warm_up = self.warm_up
        if warm_up is None:
            warm_up = min(max(train.warmup, 0.1 * self.search_fraction), self.search_fraction)
        each = batches_a_step(self.hypergradient, self.step_rule, self.path_points)
        return Schedule(self.T_max, self.search_fraction, each, warm_up)

    def first_step_size(self, upper_steps: int) -> float:
        """`step_size`, with its default filled in: steps that fall to 0 sum to 4 then, that is 4 times all weight."""
        if self.step_size is not None:
            return self.step_size
        return min(1.0, max(0.01, 8 / max(1, upper_steps)))


def check_parameters(given: DeboraParameters) -> None:
    """Raises ValueError, in one line, for hyperparameters that do not fit together."""
    if given.tau is not None and given.eps * given.rank > given.tau:
        raise ValueError(f"eps * rank = {given.eps * given.rank:g} should be at most tau = {given.tau:g}")
    if given.components is not None and given.adapter_parameters is not None:
        raise ValueError(
            f"components = {given.components} and adapter_parameters = {given.adapter_parameters} are both set; give "
            "one of them"
        )
    _check_steps(given)
    if given.factor_penalty:
        if given.recipe != "ours":
            raise ValueError(
                f"factor_penalty = {given.factor_penalty:g} is no part of recipe = {given.recipe}: set recipe = ours, "
                "or leave it out"
            )
        if given.geometry != "matrix":
            raise ValueError(
                f"factor_penalty = {given.factor_penalty:g} does nothing where geometry = {given.geometry}, whose "
                "columns have length 1: leave it out, or set geometry = matrix"
            )
    _check_start(given)


def _check_steps(given: DeboraParameters) -> None:
    descends = given.hypergradient == "direct" or (given.hypergradient == "closed_form" and given.geometry != "matrix")
    if given.step_rule == "backtracking" and given.hypergradient == "free":
        raise ValueError(
            "hypergradient = free has no batch of the upper level, which step_rule = backtracking tries its points on: "
            "set hypergradient = direct, or another step_rule"
        )
    if given.step_rule == "backtracking" and not descends:
        raise ValueError(
            f"hypergradient = {given.hypergradient} with geometry = {given.geometry} gives no direction of descent at "
            "fixed factors, as step_rule = backtracking needs: set hypergradient = direct, or another step_rule"
        )
    if given.step_rule == "backtracking" and given.momentum:
        raise ValueError(
            f"momentum = {given.momentum:g} gives a direction that need not descend on the batch that step_rule = "
            "backtracking tries: set momentum = 0, or another step_rule"
        )
    if given.warm_up is not None and given.warm_up >= given.search_fraction:
        raise ValueError(
            f"warm_up = {given.warm_up:g} should be below search_fraction = {given.search_fraction:g}, or there is no "
            "upper-level step"
        )


def _check_start(given: DeboraParameters) -> None:
    if given.start_point == "interior" and given.geometry == "stiefel":
        raise ValueError("start_at = interior changes the model where geometry = stiefel: set start_at = vertex")
    if given.start_point == "interior" and given.geometry == "oblique" and given.rank % 2:
        raise ValueError(
            f"rank = {given.rank} should be even where geometry = oblique and start_at = interior, since components "
            "cancel in pairs"
        )
