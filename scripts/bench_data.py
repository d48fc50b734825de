"""What data cost: the share of a training step that collating its batch takes, and the time to tokenise a split once.

    python scripts/bench_data.py [--data-root DIR] [--method lora] [--updates 20] [--repeats 5] CASE...

A CASE is TASK@MODEL ("glue/sst2@DIR/models/bert-tiny"; TASK alone takes its own model). For each: rows, seconds to
encode the training split from nothing and again from the cache, milliseconds of an update and of `collate` in it, and
their ratio (median over the repeats; the target is at most 5 %). One thread for the model; the tokenizer takes its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from typing import Any

import torch

from harness import registry
from harness.contracts.subject import CPU
from harness.notation import parse_choice
from harness.run.streams import TrainingData, seed_everything
from harness.run.training import Training
from harness.spec import TrainSpec
from harness.splits import make_splits
from harness.task import Task


def main() -> None:
    """Print one line a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", metavar="CASE")
    parser.add_argument("--data-root", default=os.environ.get("HARNESS_DATA_ROOT"))
    parser.add_argument("--method", default="lora")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--updates", type=int, default=20, help="updates in each timed stretch")
    parser.add_argument("--repeats", type=int, default=5, help="timed stretches")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    torch.set_num_threads(1)
    print("case                                       rows  encode (wall, CPU)   cached   update   collate   share")
    for case in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["HARNESS_CACHE"] = folder
            measure(case, options)


def measure(case: str, options: argparse.Namespace) -> None:
    """Encode from nothing and from the cache, then train."""
    name, _, model = case.partition("@")
    task = registry.make_task(*parse_choice(name))
    model = model or task.default_model
    splits = make_splits(task, options.data_root)
    wall, cpu = time.perf_counter(), time.process_time()
    task.encode(splits.train, model)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    started = time.perf_counter()
    encoded = task.encode(splits.train, model)
    cached = time.perf_counter() - started
    update, collate = step_and_collate(task, model, encoded, len(splits.train), options)
    print(
        f"{name:38} {len(splits.train):8,}  {wall:7.2f} s, {cpu:6.2f} s {cached:6.2f} s {1e3 * update:6.1f} ms "
        f"{1e3 * collate:6.2f} ms  {collate / update:6.1%}"
    )


def step_and_collate(
    task: Task, model: str | None, encoded: Any, rows: int, options: argparse.Namespace
) -> tuple[float, float]:
    """Median CPU seconds of an update, and of `collate` within it."""
    spent = 0.0

    class Timed:
        """The task, its `collate` timed."""

        def __getattr__(self, name: str) -> Any:
            return getattr(task, name)

        def collate(self, *arguments: Any) -> Any:
            nonlocal spent
            started = time.process_time()
            batch = task.collate(*arguments)
            spent += time.process_time() - started
            return batch

    train = TrainSpec(batches=10**6, batch_size=options.batch_size)
    seed_everything(0)
    method = registry.make_method(*parse_choice(options.method))
    data = TrainingData(rows, train.batch_size, 0)
    adaptation = method.start(task.backbone(model), train, data, torch.Generator().manual_seed(0))
    task.set_training(adaptation.model)
    training = Training(adaptation, Timed(), encoded, data, train, CPU, 10**6)  # type: ignore[arg-type]
    updates, collates = [], []
    for repeat in range(options.repeats + 1):
        spent, started = 0.0, time.process_time()
        for _ in range(options.updates):
            training.update()
        if repeat:  # the first stretch warms up
            updates.append((time.process_time() - started) / options.updates)
            collates.append(spent / options.updates)
    return statistics.median(updates), statistics.median(collates)


if __name__ == "__main__":
    main()
