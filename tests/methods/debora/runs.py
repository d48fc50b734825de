"""Runs of the method on the synthetic task, stopped where a test wants them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch

from harness.contracts.subject import Started, Subject, start
from harness.notation import split_list
from methods.debora.adaptation import DeboraAdaptation
from methods.debora.upper_level import upper_gradient

# What a test does not set, so that a changed default changes no test.
BASE = {
    "learning_rate": 1e-3,
    "tau": 16,
    "hypergradient": "closed_form",
    "T_max": 10,
    "step_size": 0.1,
    "search_fraction": 0.5,
}
FAST = "rank=4,T_max=2,n0=0,step_size=0.5"  # truncates from the first upper-level steps on


def started(settings: str, updates: int = 0, batches: int = 24) -> Started:
    """The method on the synthetic task, after some updates, in evaluation mode so that nothing is random."""
    given = dict(part.split("=", 1) for part in split_list(settings))
    text = ",".join(f"{name}={value}" for name, value in (BASE | given).items())
    run = start(Subject(f"debora[{text}]", Path(), batches=batches))
    run.adaptation.model.eval()
    for _ in range(updates):
        run.training.update()
    return run


def adaptation_of(run: Started) -> DeboraAdaptation:
    assert isinstance(run.adaptation, DeboraAdaptation)
    return run.adaptation


def numbers(adaptation: DeboraAdaptation) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Copies of every layer's U, s and V."""
    return {
        name: tuple(part["default"].detach().clone() for part in (layer.debora_U, layer.debora_s, layer.debora_V))
        for name, layer in adaptation.layers.items()
    }


def hypergradient(adaptation: DeboraAdaptation, step) -> torch.Tensor:
    """G(s) on the next batch of the upper half."""
    layers = list(adaptation.layers.values())
    return upper_gradient(adaptation.hypergradient, layers, step, adaptation.data, adaptation.optimizer).value


def watch(adaptation: DeboraAdaptation, before: Callable[[torch.Tensor], None], after: Callable | None = None) -> None:
    """Call `before` with the hypergradient of every step of the search, and `after` with what became of the step."""
    step = adaptation.search.step

    def watched(value, *others):
        before(value)
        moved = step(value, *others)
        if after is not None:
            after(moved)
        return moved

    adaptation.search.step = watched


def empty(adaptation: DeboraAdaptation) -> float:
    """Let a step drop every component, as a hypergradient does that is positive everywhere (n0=0, step_size=1)."""
    moved = adaptation.search.step(torch.ones(len(adaptation.search.live)))
    return float(adaptation.cut(moved.dropped))


def dense(parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    U, s, V = parts
    return (U * s) @ V.T


@torch.no_grad()
def logits(run: Started) -> torch.Tensor:
    batch = run.task.collate(run.training.encoded, range(8), None)
    return run.adaptation.model(**batch.inputs).logits


@torch.no_grad()
def logits_without_adapter(run: Started) -> torch.Tensor:
    """The backbone with the trained head."""
    plain = copy.deepcopy(run.before.module).eval()
    for name in run.before.head:
        trained = adaptation_of(run).tuner.model.get_submodule(f"{name}.modules_to_save.default")
        plain.get_submodule(name).load_state_dict(trained.state_dict())
    batch = run.task.collate(run.training.encoded, range(8), None)
    return plain(**batch.inputs).logits
