"""Defaults that follow from other hyperparameters: those of the paper's own form, and of a geometry."""

from __future__ import annotations

from typing import Any

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
# Columns of norm 1 cannot grow: s alone is an update's size there, a step turns them less, and a penalty on their norms
# is a constant.
ON_MANIFOLDS: dict[str, Any] = {"learning_rate": 3e-3, "factor_penalty": 0.0}
# There the closed form descends at fixed factors, so that the paper's step 6 can be tested.
PAPER_ON_MANIFOLDS: dict[str, Any] = {"step_rule": "backtracking"}


def defaults(recipe: str, geometry: str) -> dict[str, Any]:
    """What a recipe and a geometry say of hyperparameters that are not given, by name."""
    values: dict[str, Any] = dict(PAPER) if recipe == "paper" else {}
    if geometry != "matrix":
        values |= ON_MANIFOLDS | (PAPER_ON_MANIFOLDS if recipe == "paper" else {})
    return values


def in_todays_words(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a run from before there were recipes (version 3 and below), which was the paper's form but for
    what it names; others as they are."""
    if "recipe" in parameters:
        return parameters
    return {name: PAPER[name] for name in ("steps", "factor_penalty", "warm_up", "cut_by", "fold", "momentum")} | {
        "recipe": "paper",
        **parameters,
    }
