"""Defaults that follow from other hyperparameters: from the recipe, and from the geometry."""

from __future__ import annotations

from typing import Any, Literal

Recipe = Literal["ours", "paper", "v3"]

# The paper's own form (its Algorithm 1): what it states, and where it leaves a number open, ours that fits its steps.
PAPER: dict[str, Any] = {
    "hypergradient": "closed_form",
    "budget_scope": "layer",
    "steps": "away",
    "step_rule": "short",
    "step_size": 0.15,
    "momentum": 0.0,
    "factor_penalty": 0.0,
    "warm_up": 0.0,
    "search_fraction": 0.3,
    "cut_by": "s",
    "fold": False,
}
# There the closed form descends at fixed factors, so that the paper's step 6 can be tested.
PAPER_ON_MANIFOLDS: dict[str, Any] = {"step_rule": "backtracking"}
# The defaults of this method's version 3, which results/study was made with.
V3: dict[str, Any] = PAPER | {"hypergradient": "direct", "step_rule": "fixed", "tau": 16.0}
V3_ON_MANIFOLDS: dict[str, Any] = {"tau": 8.0}
# Columns of norm 1 cannot grow: s alone is an update's size there, a step turns them less, and a penalty on their norms
# is a constant.
ON_MANIFOLDS: dict[str, Any] = {"learning_rate": 3e-3, "factor_penalty": 0.0}

RECIPES: dict[Recipe, tuple[dict[str, Any], dict[str, Any]]] = {
    "ours": ({}, {}),
    "paper": (PAPER, PAPER_ON_MANIFOLDS),
    "v3": (V3, V3_ON_MANIFOLDS),
}


def defaults(recipe: Recipe, geometry: str) -> dict[str, Any]:
    """What a recipe and a geometry say of hyperparameters that are not given, by name."""
    values, on_manifolds = RECIPES[recipe]
    return values | (ON_MANIFOLDS | on_manifolds if geometry != "matrix" else {})


def in_todays_words(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a run of version 3 or below, from before there were recipes; others as they are."""
    if "recipe" in parameters:
        return parameters
    young = {name: V3[name] for name in ("steps", "factor_penalty", "warm_up", "cut_by", "fold", "momentum")}
    return young | {"recipe": "v3", **parameters}
