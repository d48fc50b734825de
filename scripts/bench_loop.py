"""What the training loop costs over a bare PyTorch loop that does the same steps.

    python scripts/bench_loop.py [--method full] [--task rotten_tomatoes] [--batch-size 16] [--updates 10] [--repeats 7]

Both sides train the same model on the same batches: forward, backward, gradient clipping, AdamW, learning-rate
schedule, the loss kept for the record. A method that makes passes of its own (dEBORA's upper level) makes them on our
side only. They take turns within one process; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from harness import registry
from harness.contracts.subject import CPU
from harness.method import Backbone
from harness.notation import parse_choice
from harness.run.streams import TrainingData, seed_everything
from harness.run.training import Training
from harness.spec import TrainSpec
from harness.splits import make_splits


def main() -> None:
    """Print both medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="full")
    parser.add_argument("--task", default="rotten_tomatoes")
    parser.add_argument("--model", default=None)
    parser.add_argument("--data-root", default=None)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--updates", type=int, default=10, help="updates in each timed stretch")
    parser.add_argument("--repeats", type=int, default=7, help="timed stretches of each side")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    training = make_training(options)
    bare, ours = [], []
    for repeat in range(options.repeats + 1):
        sides = [(bare, bare_updates), (ours, loop_updates)]
        drawn = dict(training.data.drawn)
        for times, run in sides if repeat % 2 else reversed(sides):
            training.data.drawn = dict(drawn)  # both get the same batches: their lengths differ
            started = time.perf_counter()
            run(training, options.updates)
            if repeat:  # the first stretch of each warms up
                times.append((time.perf_counter() - started) / options.updates)
    ratios = [a / b for a, b in zip(ours, bare, strict=True)]
    print(f"{options.method} on {options.task}, batch {options.batch_size}, {options.threads} thread(s)")
    print(f"bare PyTorch loop  {1e3 * statistics.median(bare):9.2f} ms an update (median of {len(bare)})")
    print(f"harness's loop     {1e3 * statistics.median(ours):9.2f} ms an update")
    ratio = statistics.median(ours) / statistics.median(bare)
    print(f"ratio of medians   {ratio:.4f}   (pairs: {min(ratios):.3f} to {max(ratios):.3f})")


def make_training(options: argparse.Namespace) -> Training:
    """The harness's training state for the options."""
    method = registry.make_method(*parse_choice(options.method))
    task = registry.make_task(*parse_choice(options.task))
    model = options.model or task.default_model
    train = TrainSpec(batches=10**6, batch_size=options.batch_size, schedule="constant", warmup=0.0)
    splits = make_splits(task, options.data_root)
    seed_everything(0)
    backbone: Backbone = task.backbone(model)
    data = TrainingData(len(splits.train), train.batch_size, 0)
    adaptation = method.start(backbone, train, data, torch.Generator().manual_seed(0))
    task.set_training(adaptation.model)
    return Training(adaptation, task, task.encode(splits.train, model), data, train, CPU, 10**6)


def loop_updates(training: Training, updates: int) -> list[float]:
    """The losses of the harness's own updates, the history fetched as in a run."""
    for _ in range(updates):
        training.update()
    training.fetch()
    losses = [row["loss"] for row in training.history]
    training.history.clear()
    return losses


def bare_updates(training: Training, updates: int) -> None:
    """The same updates written out by hand, without hooks, budget or history."""
    model, optimizer, task = training.adaptation.model, training.adaptation.optimizer, training.task
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses = []
    for _ in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * 1.0
        batch = task.collate(training.encoded, training.data.draw("all"), None)
        loss = task.loss(model, batch, None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())


if __name__ == "__main__":
    main()
