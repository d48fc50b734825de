"""What a trained adapter costs at inference, as it is and merged into the weights: one line a method.

    python scripts/bench_inference.py [METHOD ...] [--task rotten_tomatoes] [--batch-size 16] [--repeats 21]

    rank      mean live rank over the layers, after a short training
    ms        a forward of the adapted model over one batch
    x bare    over that of the bare backbone
    merged    the same with the adapter merged into the weights; "-" where it cannot be

The bare backbone, the adapted model and the merged one take turns within one process on the same batch; ratios are
those of the medians. Times are the process's CPU time: with one thread that is what a clock would show on a machine
with nothing else to do. The merged model has to give what the adapted one gives. Methods are written as on the command
line.
"""

from __future__ import annotations

import argparse
import copy
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_methods import SETTINGS, measure

from harness.contracts import Subject, start
from harness.errors import InputError
from harness.spec import Place

METHODS = ("head", "lora[rank=8]", "adalora", "debora", "padapter")
TOLERANCE = 1e-3  # between the logits of the adapted and of the merged model


def merged_copy(model: Any) -> Any | None:
    """The model with its adapter merged into the weights; None where it has none that can be."""
    if not hasattr(model, "merge_adapter"):
        return None
    merged = copy.deepcopy(model)
    try:
        merged.merge_adapter()
    except (AttributeError, NotImplementedError, ValueError):
        return None
    return merged


def line(method: str, options: argparse.Namespace) -> str:
    """The method's line. Raises InputError for one that does not fit, ValueError where merging changes the output."""
    place = Place(data_root=options.data_root, model=options.model)
    subject = Subject(method, Path(), task=options.task, batches=options.updates, place=place)
    started = start(subject)
    started.training.run(lambda training: None)
    inputs = started.task.collate(started.training.encoded, range(options.batch_size), None).inputs
    models = {"bare": started.before.module, "adapted": started.adaptation.model}
    models |= {"merged": merged} if (merged := merged_copy(started.adaptation.model)) is not None else {}
    sides: dict[str, Callable[[], Any]] = {
        name: functools.partial(model.eval(), **inputs) for name, model in models.items()
    }
    with torch.no_grad():
        if merged is not None and (sides["merged"]().logits - sides["adapted"]().logits).abs().max() > TOLERANCE:
            raise ValueError("the merged model gives something else than the adapted one")
        seconds = measure(sides, options.repeats)
    ranks = started.adaptation.ranks().values()
    rank = f"{sum(ranks) / len(ranks):.1f}" if ranks else "-"
    texts = [f"{method:42s}{rank:>7s}{1e3 * seconds['bare']:9.2f}"]
    for name in ("adapted", "merged"):
        known = name in seconds
        texts.append(f"{1e3 * seconds[name]:12.2f}{seconds[name] / seconds['bare']:9.3f}" if known else f"{'-':>21s}")
    return "".join(texts)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--task", default="rotten_tomatoes")
    parser.add_argument("--model", default=None)
    parser.add_argument("--data-root", default=None)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--updates", type=int, default=60, help="batches of the short training")
    parser.add_argument("--repeats", type=int, default=21, help="timed forwards of each side")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    print(f"{options.task}, batch {options.batch_size}, 1 thread, medians of {options.repeats}")
    print(f"{'':42s}{'rank':>7s}{'bare ms':>9s}{'ms':>12s}{'x bare':>9s}{'merged ms':>12s}{'x bare':>9s}")
    for name in options.methods or METHODS:
        try:
            print(line(SETTINGS.get(name, name), options), flush=True)
        except (InputError, ValueError) as error:
            print(f"{name:42s} {error}", flush=True)


if __name__ == "__main__":
    main()
