"""What an update of each method costs: one line a method.

    python scripts/bench_methods.py [METHOD ...] [--task rotten_tomatoes] [--batch-size 16] [--updates 5] [--repeats 9]

    x LoRA   its update in our loop, over PEFT's LoRA of rank 8 in a bare loop
    x bare   its update in our loop, over the same update written out by hand with the library's own objects: the model
             of PEFT or transformers and its own loss (with AdaLoRA's penalty where the library adds it), AdamW,
             clipping, and PEFT's allocation after the step. At most 1.03 for a baseline. A method's passes of its own
             (dEBORA's upper level) are on our side only.
    peak MB  most bytes that an update allocates on top of what is there before it
    parameters  of the adapter at the start

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
from bench_debora import keep_freed_memory, peak_megabytes
from bench_loop import loop_updates, make_training

from harness import registry
from harness.errors import InputError
from harness.notation import parse_choice
from harness.run.training import Training

REFERENCE = "lora[rank=8]"
TARGET = 1.03
SETTINGS = {"adalora": "adalora[tinit=1,tfinal=1,deltaT=1]", "peft": "peft[type=ia3]"}  # of a name without brackets


def bare_updates(training: Training, updates: int) -> None:
    """The same updates by hand: no hooks, no budget, no history."""
    model: Any = training.adaptation.model
    optimizer = training.adaptation.optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    allocate = getattr(getattr(model, "base_model", None), "update_and_allocate", None)
    for _ in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * 1.0
        batch = training.task.collate(training.encoded, training.data.draw(training.adaptation.stream), None)
        loss = model(**batch.inputs, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        training.index += 1
        if allocate is not None:
            allocate(training.index)
        optimizer.zero_grad(set_to_none=True)
        loss.item()


def sides_of(method: str, options: argparse.Namespace) -> tuple[Training, Training]:
    """(ours, bare): the method started twice, from the same seed, and prepared, which is not timed."""
    ours, bare = (make_training(argparse.Namespace(**vars(options) | {"method": method})) for _ in range(2))
    for side in (ours, bare):
        side.prepare()
    penalty = getattr(registry.make_method(*parse_choice(method)), "orthogonality", None)
    if penalty is not None:
        bare.adaptation.model.peft_config["default"].orth_reg_weight = penalty  # our side adds it itself
    return ours, bare


def measure(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each, taking turns; the order turns round every time, and the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name in sides if repeat % 2 else reversed(sides):
            started = time.process_time()
            sides[name]()
            times[name].append(time.process_time() - started)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def line(method: str, reference: Training, options: argparse.Namespace) -> str:
    """The method's line."""
    ours, bare = sides_of(method, options)
    count = ours.sizes.parameters()
    reference.data.drawn = dict.fromkeys(reference.data.drawn, 0)
    updates = options.updates
    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: loop_updates(ours, updates),
        "bare": lambda: bare_updates(bare, updates),
        "LoRA": lambda: bare_updates(reference, updates),
    }
    seconds = measure(sides, options.repeats)
    ours.data.drawn = dict.fromkeys(ours.data.drawn, 0)
    megabytes = peak_megabytes(lambda: loop_updates(ours, 1))
    ratio = seconds["ours"] / seconds["bare"]
    return (
        f"{method:42s}{1e3 * seconds['ours'] / updates:9.1f}{seconds['ours'] / seconds['LoRA']:9.3f}{ratio:9.3f}"
        f"{'' if ratio <= TARGET else ' !':2s}{megabytes:8.1f}{count.adapter_initial:13,}"
    )


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
    print(f"{'':42s}{'ms':>9s}{'x LoRA':>9s}{'x bare':>9s}{'peak MB':>10s}{'parameters':>13s}")
    _, reference = sides_of(REFERENCE, options)
    for name in options.methods or registry.registered(registry.METHODS):
        method = SETTINGS.get(name, name)
        try:
            print(line(method, reference, options), flush=True)
        except InputError as error:
            print(f"{method:42s} {error}", flush=True)


if __name__ == "__main__":
    main()
