"""dEBORA (Zangrando et al., ICLR 2025). Its hyperparameters are in `parameters`, a run of it in `adaptation`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from harness.errors import InputError
from harness.method import (
    EVERY_DTYPE,
    RANK,
    RANKS,
    Adaptation,
    Backbone,
    BackboneDtype,
    PeftForm,
    Trace,
    TrainData,
    is_adaptable,
    weight_shape,
)
from harness.parameters import Range
from methods.debora.parameters import DeboraParameters
from methods.debora.recipes import in_todays_words
from methods.debora.target import component_parameters, largest_step_sizes, reachable
from methods.shared.peft_model import lora_form, shared_parameters

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from harness.spec import TrainSpec
    from methods.debora.search import Search
    from methods.debora.upper_level import HypergradientRule


class Debora(DeboraParameters):
    """dEBORA (Zangrando et al., 2025): updates in CP form, s and ranks found by Frank-Wolfe.

    Lower level: AdamW on the factors (on their manifold) and the head. Upper level: after every T_max of those updates,
    one Frank-Wolfe step on s; from step n0 on, components whose s fell to eps are removed. When the target is reached,
    the face identified or search_fraction of the budget used, s is frozen, every component at eps goes, and the factors
    and the head train on.

    The default is ours, and differs from the paper in what makes the search identify: a penalty on the factors,
    hypergradients that the lower level's batches give, averaged, pairwise steps that fall, and a warm-up before them.
    `recipe = paper` is the paper's own: one half of the training set for each level, one batch's closed form for a
    step, away steps. docs/debora.md says more.

    Budget: every batch through forward and backward counts, and so does each trial of the backtracking (a forward) and
    each product with second derivatives of `implicit`.
    """

    version: ClassVar[int] = 4
    provenance = "from the paper; no official code; the default recipe is ours"
    group = "ranks searched"
    data_rule: ClassVar[Literal["all", "halves"]] = "halves"
    capabilities: ClassVar[tuple[str, ...]] = ("linear", "conv2d", "rank-adaptive")
    backbone_dtypes: ClassVar[tuple[BackboneDtype, ...]] = EVERY_DTYPE
    traces: ClassVar[tuple[Trace, ...]] = (
        RANK,
        Trace("gap", "Frank-Wolfe gap", drawing="log_line"),
        Trace("active_components", "active components", drawing="steps"),
        Trace("hypergradient_norm", "norm of the hypergradient", drawing="log_line"),
        Trace("unbiased_slope", "slope that new hypergradients confirm"),
        Trace("step_size", "step size"),
        Trace("jump", "norm of the removed update"),
        Trace("residual", "relative residual of the solve", drawing="log_line"),
        Trace("trials", "trials of the backtracking"),
        Trace("curvature", "curvature", drawing="log_line"),
        RANKS,
        Trace("away", "share of away steps", drawing=None),  # one of 0 and 1 on most steps: no line can be read
        Trace("drop", "share of drop steps", drawing=None),
        Trace("swap", "share of drop steps to a vertex without weight", drawing=None),
        Trace("factor_penalty", "penalty on the factors", drawing=None),  # one number, at the first step
        Trace("cut", "components removed for the target", drawing=None),  # one number, at the end of the search
        Trace("s", "s of the components that are left", drawing=None),  # fewer and fewer
    )
    search_space = {"learning_rate": Range(1e-4, 1e-2, log=True)}

    @classmethod
    def in_todays_words(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        """See `Method.in_todays_words`."""
        return in_todays_words(parameters)

    def peft_form(self, ranks: Mapping[str, int]) -> PeftForm | None:
        """See `Method.peft_form`: LoRA with the components that stayed, each scaled by the share of tau that it starts
        with here; None on manifolds."""
        if self.geometry != "matrix":
            return None
        num_layers = len(ranks)
        share = self.simplex_tau(num_layers) / self.simplex_components(num_layers)
        return lora_form(ranks, share, shared_parameters(self))

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
            channels = min(weight_shape(backbone.module.get_submodule(name))[:2])
            if 1 < channels < self.rank:
                raise InputError(
                    f"rank = {self.rank} is above the {channels} channels of layer '{name}': geometry = stiefel allows "
                    f"1 to {channels}"
                )
        self._check_simplex(len(targets))
        self._check_target(self._costs(backbone, targets))
        return None

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`: which ranks the search can reach."""
        targets, budget = backbone.targets(self.target_modules), train.budget(num_examples)
        schedule, layerwise = self.schedule(train), self.budget_scope == "layer"
        steps, components = schedule.upper_steps(budget), self.simplex_components(len(targets))
        where = f"each of {len(targets)} simplices" if layerwise else f"the one simplex of {len(targets)} layers"
        batches = min(budget, round(self.search_fraction * budget))
        found = [f"at most {steps} upper-level steps in {batches} of {budget} batches"]
        sizes = largest_step_sizes(self.step_rule, self.first_step_size(steps), steps)
        least = reachable(components, sizes, self.steps)
        if self.start_point == "vertex":
            found.append(f"at most {min(steps, components)} of the {components} components of {where} can get weight")
        elif least <= 1:
            found.append(f"the steps may empty {where} but for one of its {components} components")
        else:
            found.append(f"at least {least} of the {components} components of {where} stay")
        if self.has_target:
            size = self.components or f"{self.adapter_parameters} parameters"
            what = f"target: {size}{' components' if self.components else ''} of {self.rank * len(targets)} components"
            found.append(f"{what}; what the steps leave beyond it is cut by {self.cut_by} when the search ends")
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
        layer_tau = self.simplex_tau(len(targets)) * self.rank / self.simplex_components(len(targets))
        model, layers = adapted(
            backbone,
            targets,
            r=self.rank,
            tau=layer_tau,
            eps=self.eps,
            geometry=self.geometry,
            start=self.start_point,
        )
        constrained = [
            pair
            for layer in layers.values()
            for pair in zip(layer.factors(ADAPTER), layer.manifolds(ADAPTER), strict=True)
        ]
        optimizer = manifold_adamw(model, constrained, self.learning_rate, self.weight_decay)
        schedule, device = self.schedule(train), constrained[0][0].device
        search = self._search(self._costs(backbone, targets), schedule.upper_steps(train.budget(data.size)), device)
        rule = self._hypergradient_rule()
        return DeboraAdaptation(self, model, layers, optimizer, backbone, data, search, schedule, rule)

    def _costs(self, backbone: Backbone, targets: Sequence[str]) -> list[int]:
        """What a component of each layer counts against the target."""
        if self.adapter_parameters is None:
            return [1] * len(targets)
        shapes = [weight_shape(backbone.module.get_submodule(name)) for name in targets]
        return [component_parameters(shape) + (not self.fold) for shape in shapes]

    def _check_simplex(self, num_layers: int) -> None:
        """Raises InputError for a global simplex that is no set, or that pairwise steps cannot move in."""
        components = self.simplex_components(num_layers)
        if self.eps * components > self.simplex_tau(num_layers):
            raise InputError(
                f"eps * components = {self.eps * components:g} should be at most tau = "
                f"{self.simplex_tau(num_layers):g} where budget_scope = {self.budget_scope}"
            )
        if self.steps == "pairwise" and self.start_point == "vertex" and components == 1:
            raise InputError(
                "steps = pairwise exchanges weight between components, and from start_at = vertex with rank = "
                f"{self.rank} a simplex has one: set steps = away, or a higher rank",
                "steps",
            )

    def _check_target(self, costs: Sequence[int]) -> None:
        """Raises InputError for a target above what there is, or below one component."""
        if self.components is not None and self.components > self.rank * len(costs):
            raise InputError(
                f"components = {self.components} is not allowed: rank {self.rank} in {len(costs)} layers allows 1 to "
                f"{self.rank * len(costs)}",
                "components",
            )
        if self.adapter_parameters is not None:
            least, most = min(costs), self.rank * sum(costs)
            if not least <= self.adapter_parameters <= most:
                raise InputError(
                    f"adapter_parameters = {self.adapter_parameters} is not allowed: one component has {least}, and "
                    f"all {self.rank * len(costs)} have {most}",
                    "adapter_parameters",
                )

    def _search(self, costs: list[int], upper_steps: int, device: torch.device) -> Search:
        from methods.debora.search import Rules, Search

        num_layers = len(costs)
        rules = Rules(
            tau=self.simplex_tau(num_layers),
            eps=self.eps,
            step_size=self.first_step_size(upper_steps),
            step_rule=self.step_rule,
            momentum=self.momentum,
            tolerance=self.p,
            rho=self.rho,
            trials=self.trials,
            first_truncation=self.first_truncation,
            face_steps=self.face_steps,
            steps=self.steps,
        )
        return Search(
            num_layers,
            self.rank,
            rules,
            one_simplex=self.budget_scope == "global",
            interior=self.start_point == "interior",
            costs=costs,
            target=self.adapter_parameters if self.components is None else self.components,
            device=device,
        )

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
