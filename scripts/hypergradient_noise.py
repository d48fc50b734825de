"""How much of one batch's hypergradient is signal: does it name the component that the average over many batches names?

    python scripts/hypergradient_noise.py --tasks glue/mnli --model DIR/models/bert-tiny --data-root DIR --batches 1000

takes the options of `python -m harness run`, trains dEBORA's runs as that would, one after the other, and keeps
nothing. At some upper-level steps it takes the hypergradient on 48 more batches of the upper half, and puts everything
back.

    signal/noise  variance of the mean hypergradient over the components of a layer, over the variance of one batch's
    named         how often one batch's largest entry in a layer, which an away step takes weight from, is the mean's of
                  the other 47
    chance        the same if it were any component
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from tabulate import tabulate

from harness.cli import main
from harness.method import Step, TrainData
from methods.debora import adaptation
from methods.debora.tuner.layer import DeboraLayer
from methods.debora.upper_level import HypergradientRule, UpperGradient, upper_gradient
from methods.shared.peft_names import ADAPTER

AT = (5, 10, 20, 30, 40)  # upper-level steps
BATCHES = 48
rows: list[list[Any]] = []
counted: WeakKeyDictionary[torch.optim.Optimizer, int] = WeakKeyDictionary()  # upper-level steps of a run, by its own


def watched(
    rule: HypergradientRule,
    layers: Sequence[DeboraLayer],
    step: Step,
    data: TrainData,
    optimizer: torch.optim.Optimizer,
) -> UpperGradient:
    """`upper_gradient`, with a look at what other batches say. Batches, budget and random numbers are put back."""
    count = counted[optimizer] = counted.get(optimizer, 0) + 1
    if count in AT:
        training: Any = step
        drawn, used, random = training.data.drawn["upper"], training.used, torch.get_rng_state()
        training.used = -(10**6)  # nobody counts these
        values = [upper_gradient(rule, layers, step, data, optimizer).value for _ in range(BATCHES)]
        training.data.drawn["upper"], training.used = drawn, used
        torch.set_rng_state(random)
        rows.append([count, *measured(torch.stack(values).double().split([layer.r[ADAPTER] for layer in layers], 1))])
    return upper_gradient(rule, layers, step, data, optimizer)


def measured(by_layer: tuple[torch.Tensor, ...]) -> tuple[int, float, float, float]:
    """(components, signal over noise, share named, chance), from (batches, rank) hypergradients of every layer."""
    signal, noise, named, chance = [], [], [], []
    for values in by_layer:
        if values.shape[1] > 1:
            own = values - values.mean(dim=1, keepdim=True)  # what all share moves no weight between them
            mean, spread = own.mean(dim=0), own.var(dim=0)
            signal.append(float((mean**2 - spread / len(own)).sum()))  # without the part of the noise that is left
            noise.append(float(spread.sum()))
            others = (own.sum(dim=0) - own) / (len(own) - 1)
            named.append(float((own.argmax(dim=1) == others.argmax(dim=1)).double().mean()))
            chance.append(1 / values.shape[1])
    count = sum(values.shape[1] for values in by_layer)
    return count, max(0.0, sum(signal)) / sum(noise), sum(named) / len(named), sum(chance) / len(chance)


if __name__ == "__main__":
    adaptation.upper_gradient = watched
    with tempfile.TemporaryDirectory() as results:
        here = ["--results", results, "--executor", "serial", "--tracking-uri", "off"]
        code = main(["run", "--methods", "debora", *sys.argv[1:], *here])
    print(
        tabulate(
            rows, ["step", "components", "signal/noise", "named", "chance"], floatfmt=("", "", ".4f", ".2f", ".2f")
        )
    )
    sys.exit(code)
