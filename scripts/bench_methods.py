"""What an update of each method costs: one line a method.

    python scripts/bench_methods.py [METHOD ...] [--task rotten_tomatoes] [--batch-size 16] [--updates 5] [--repeats 9]

    x LoRA   its update in our loop, over PEFT's LoRA of rank 8 in a bare loop
    x bare   its update in our loop, over the same update written out by hand, see scripts/bench_bare.py: with the
             library's own objects where it has them (with AdaLoRA's penalty where the library adds it). At most 1.03
             for a baseline, 1.05 for the others. A method's passes of its own (dEBORA's upper level) are on our side
             only.
    peak MB  most bytes that an update allocates on top of what is there before it
    parameters  of the adapter in the first update
    before   batches spent before the first update; both sides make that start, and it is not timed
    start MB most bytes that the start allocates on top of what is there before it
    apart    largest difference of the two sides' losses over the first updates, from equal random numbers: about 1e-7
             where they compute the same

For each method, the three sides take turns within one process on the same batches; ratios are those of the medians.
Times are the process's CPU time: with one thread that is what a clock would show on a machine with nothing else to do.
Methods are written as on the command line; without any, all that are registered. "adalora" allocates at every update.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from bench_bare import bare_updates, written_out
from bench_debora import keep_freed_memory, peak_megabytes
from bench_loop import loop_updates, make_training

from harness import registry
from harness.errors import InputError
from harness.notation import parse_choice
from harness.run.training import Training

REFERENCE = "lora[rank=8]"
BASELINES = ("head", "full", "bitfit", "lora", "adalora", "hadapter", "padapter", "peft")
OWN_EXCHANGE = ("elalora", "flexlora")  # in AdaLoRA's layers, without its allocation
TARGET, BASELINE_TARGET = 1.05, 1.03
SETTINGS = {"adalora": "adalora[tinit=1,tfinal=1,deltaT=1]", "peft": "peft[type=ia3]"}  # of a name without brackets


def start(method: str, options: argparse.Namespace) -> Training:
    """The method, started from a fixed seed."""
    return make_training(argparse.Namespace(**vars(options) | {"method": method}))


def start_bare(method: str, options: argparse.Namespace) -> tuple[Training, Callable[[int], list[float]]]:
    """The method started from the same seed, prepared; and so many of its updates by hand, giving their losses."""
    training = start(method, options)
    training.prepare()
    name, settings = parse_choice(method)
    penalty = getattr(registry.make_method(name, settings), "orthogonality", None)
    if penalty is not None:
        model: Any = training.adaptation.model
        model.peft_config["default"].orth_reg_weight = penalty  # our side adds it itself
    draw = written_out(name, training)
    return training, lambda updates: bare_updates(training, updates, draw, name not in OWN_EXCHANGE)


def measure(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each, taking turns; the order turns round every time, and the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name in sides if repeat % 2 else reversed(sides):
            started = time.process_time()
            sides[name]()
            times[name].append(time.process_time() - started)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def line(method: str, options: argparse.Namespace) -> str:
    """The method's line."""
    ours, updates = start(method, options), options.updates
    start_megabytes = peak_megabytes(ours.prepare)
    before, parameters = ours.used, ours.sizes.parameters().adapter_final
    (bare, bare_side), (reference, reference_side) = (start_bare(name, options) for name in (method, REFERENCE))
    first = [seeded(lambda: loop_updates(ours, updates)), seeded(lambda: bare_side(updates))]
    apart = max(abs(a - b) for a, b in zip(*first, strict=True))
    rewind(ours, bare, reference)
    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: loop_updates(ours, updates),
        "bare": lambda: bare_side(updates),
        "LoRA": lambda: reference_side(updates),
    }
    seconds = measure(sides, options.repeats)
    rewind(ours)
    megabytes = peak_megabytes(lambda: loop_updates(ours, 1))
    ratio = seconds["ours"] / seconds["bare"]
    target = BASELINE_TARGET if parse_choice(method)[0] in BASELINES else TARGET
    return (
        f"{method:42s}{1e3 * seconds['ours'] / updates:9.1f}{seconds['ours'] / seconds['LoRA']:9.3f}{ratio:9.3f}"
        f"{'' if ratio <= target else ' !':2s}{megabytes:8.1f}{parameters:12,}{before:8d}{start_megabytes:10.1f}"
        f"{apart:10.1e}"
    )


def rewind(*sides: Training) -> None:
    """Have the next updates get the first batches again."""
    for side in sides:
        side.data.drawn = dict.fromkeys(side.data.drawn, 0)


def seeded(updates: Callable[[], list[float]]) -> list[float]:
    """The losses of updates whose dropout is drawn from a fixed seed."""
    torch.manual_seed(0)
    return updates()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD")
    parser.add_argument("--task", default="rotten_tomatoes")
    parser.add_argument("--model", default=None)
    parser.add_argument("--data-root", default=None)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--updates", type=int, default=5, help="updates in each timed stretch")
    parser.add_argument("--repeats", type=int, default=9, help="timed stretches of each side")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    print(f"{options.task}, batch {options.batch_size}, {options.threads} thread(s), medians of {options.repeats}")
    columns = f"{'ms':>9s}{'x LoRA':>9s}{'x bare':>9s}{'peak MB':>10s}{'parameters':>12s}"
    print(f"{'':42s}{columns}{'before':>8s}{'start MB':>10s}{'apart':>10s}")
    for name in options.methods or registry.registered(registry.METHODS):
        method = SETTINGS.get(name, name)
        try:
            print(line(method, options), flush=True)
        except InputError as error:
            print(f"{method:42s} {error}", flush=True)


if __name__ == "__main__":
    main()
