"""How much of one estimate of a hypergradient is signal: does it name the component that the average of many names?

    python scripts/hypergradient_noise.py --hypergradients direct free path --tasks glue/mnli --data-root DIR ...

takes the options of `python -m harness run` beside its own, trains dEBORA's runs as that would (`--methods` for other
settings than the defaults), one after the other, and keeps nothing. At some upper-level steps it takes each
hypergradient that was asked for on fresh batches, many times, and puts everything back. So all are measured at the same
points of one training, which follows its own.

    batches       of the budget that one estimate takes
    signal/noise  variance of the mean hypergradient over the components of a layer, over the variance of one estimate
    a step        the same of what a step follows: of `free`, the mean over the lower batches since the step before,
                  taken as independent samples
    per batch     that over the batches it takes; `free` takes none
    named         how often one estimate's largest entry in a layer, which an away step takes weight from, is the
                  mean's of the others
    chance        the same if it were any component

`free` is measured on lower batches at the present factors. In a run, the older ones of a step are of earlier factors.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from typing import Any, get_args, get_type_hints

import torch
from tabulate import tabulate
from torch import Tensor

from harness.cli import main
from harness.method import Step
from methods.debora.adaptation import DeboraAdaptation
from methods.debora.upper_level import FreeGradient, HypergradientRule, upper_gradient
from methods.shared.peft_names import ADAPTER

AT = (5, 10, 20, 30, 40)  # upper-level steps
KINDS = get_args(get_type_hints(HypergradientRule)["kind"])
HEADERS = ["hypergradient", "step", "components", "batches", "signal/noise", "a step", "per batch", "named", "chance"]


def estimate(adaptation: DeboraAdaptation, kind: Any, step: Step) -> Tensor:
    """One estimate on the next batches, (live components,)."""
    layers = [layer for layer in adaptation.layers.values() if layer.r[ADAPTER] > 0]
    data, optimizer = adaptation.data, adaptation.optimizer
    if kind != "free":
        return upper_gradient(adaptation.hypergradient._replace(kind=kind), layers, step, data, optimizer).value
    free = FreeGradient()
    optimizer.zero_grad(set_to_none=True)
    step.backward(data.draw(adaptation.stream))
    free.add(layers)
    optimizer.zero_grad(set_to_none=True)
    return free.take(adaptation.search.s)


def samples(adaptation: DeboraAdaptation, kind: str, step: Any, number: int) -> tuple[Tensor, float]:
    """So many estimates, (number, live components), and the batches that one takes on average. Batches, budget and
    random numbers are put back."""
    drawn, used, random = dict(step.data.drawn), step.used, torch.get_rng_state()
    step.used = -(10**6)  # nobody counts these
    values = torch.stack([estimate(adaptation, kind, step) for _ in range(number)])
    batches = 0.0 if kind == "free" else (step.used + 10**6) / number
    step.data.drawn, step.used = drawn, used
    torch.set_rng_state(random)
    return values, batches


def measured(values: Tensor, ranks: list[int]) -> tuple[float, float, float]:
    """(signal over noise, share named, chance) of estimates, (number, components), by layers of these ranks."""
    signal, noise, named, chance = [], [], [], []
    for part in values.double().split(ranks, 1):
        if part.shape[1] > 1:
            own = part - part.mean(dim=1, keepdim=True)  # what all share moves no weight between them
            mean, spread = own.mean(dim=0), own.var(dim=0)
            signal.append(float((mean**2 - spread / len(own)).sum()))  # without the part of the noise that is left
            noise.append(float(spread.sum()))
            others = (own.sum(dim=0) - own) / (len(own) - 1)
            named.append(float((own.argmax(dim=1) == others.argmax(dim=1)).double().mean()))
            chance.append(1 / part.shape[1])
    if not noise:
        return 0.0, 1.0, 1.0  # a component a layer: there is nothing to tell apart
    return max(0.0, sum(signal)) / sum(noise), sum(named) / len(named), sum(chance) / len(chance)


def watch(kinds: list[str], number: int, implicit_number: int) -> list[list[Any]]:
    """Look at these hypergradients before each of the steps AT, of every run from now on. Returns the rows to come."""
    rows: list[list[Any]] = []
    upper_step = DeboraAdaptation._upper_step

    def watched(self: DeboraAdaptation, step: Step) -> dict[str, Any]:
        count = self.search.steps + 1
        for kind in kinds if count in AT else ():
            many = implicit_number if kind == "implicit" else number
            values, batches = samples(self, kind, step, many)
            own, named, chance = measured(values, [rank for rank in self.search.ranks if rank])
            whole = own * (self.schedule.lower_updates(step.budget) if kind == "free" else 1)
            per_batch = whole / batches if batches else None
            rows.append([kind, count, values.shape[1], batches, own, whole, per_batch, named, chance])
        return upper_step(self, step)

    DeboraAdaptation._upper_step = watched  # type: ignore[method-assign]
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hypergradients", nargs="+", default=["direct"], choices=KINDS)
    parser.add_argument("--samples", type=int, default=48, help="estimates at each step")
    parser.add_argument("--implicit-samples", type=int, default=48, help="the same of implicit, which is dear")
    options, rest = parser.parse_known_args()
    if min(options.samples, options.implicit_samples) < 2:
        parser.error("a spread takes at least 2 samples")
    found = watch(options.hypergradients, options.samples, options.implicit_samples)
    with tempfile.TemporaryDirectory() as results:
        here = ["--results", results, "--executor", "serial", "--tracking-uri", "off"]
        code = main(["run", "--methods", "debora", *rest, *here])
    found.sort(key=lambda row: KINDS.index(row[0]))
    print(tabulate(found, HEADERS, floatfmt=("", "", "", ".1f", ".4f", ".4f", ".4f", ".2f", ".2f"), missingval="-"))
    sys.exit(code)
