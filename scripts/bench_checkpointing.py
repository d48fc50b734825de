"""What gradient checkpointing saves of memory and costs of time, in the program's own loop.

    python scripts/bench_checkpointing.py [--method lora] [--blocks 24] [--width 64] [--tokens 512] [--device cuda]

A BERT with random weights. Two processes, one with checkpointing, update in turns; times are medians of interleaved
updates. Memory is that of the model and the optimizer's state, and what an update takes beside it at most: by resident
memory on a CPU, allocated on a GPU. What libraries load at the first update is not counted. Losses are compared bit by
bit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SIDES = {"without": False, "with": True}
MIB = 2**20


def main() -> None:
    """Print both sides and their ratios; or be a side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9, help="timed updates of each side")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side", choices=list(SIDES), help="be one of the two: an update for each line read")
    options = parser.parse_args()
    if options.side:
        be_a_side(options)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Let the sides take turns, the first update of each to warm up."""
    sides = {
        name: subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--side", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in SIDES
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    for repeat in range(options.repeats + 1):
        for name in SIDES if repeat % 2 else reversed(SIDES):
            found[name].append(ask(sides[name]))
    for side in sides.values():
        side.communicate()
    assert all(one["loss"] == other["loss"] for one, other in zip(*found.values(), strict=True)), "losses differ"
    seconds = {name: statistics.median(each["seconds"] for each in updates[1:]) for name, updates in found.items()}
    peaks = {name: max(each["peak"] for each in updates) for name, updates in found.items()}
    shape = f"{options.blocks} blocks of width {options.width}, {options.batch_size} x {options.tokens} tokens"
    print(f"{options.method} on {options.device}, {shape}; losses bit-equal")
    for name in SIDES:
        print(f"{name:8} {1e3 * seconds[name]:9.1f} ms an update (median of {options.repeats})", end="")
        print(f" {peaks[name] / MIB:9.1f} MiB at the peak")
    print(f"ratios   time {seconds['with'] / seconds['without']:.2f}, peak {peaks['with'] / peaks['without']:.2f}")


def ask(side: subprocess.Popen[str]) -> dict[str, float]:
    """One update of a side: loss, seconds, peak in bytes."""
    assert side.stdin is not None
    assert side.stdout is not None
    print(file=side.stdin, flush=True)
    answer: dict[str, float] = json.loads(side.stdout.readline())
    return answer


def be_a_side(options: argparse.Namespace) -> None:
    """Make an update for each line that comes, and answer."""
    import torch

    from harness.contracts import Subject, start
    from harness.run.memory import PeakMemory
    from harness.spec import Place
    from scripts.gpu_check_parts import RandomBert

    sizes: dict[str, Any] = {name: getattr(options, name) for name in ("blocks", "width", "tokens", "device")}
    subject = Subject(
        options.method,
        Path(),
        RandomBert(**sizes),
        batches=10**6,
        batch_size=options.batch_size,
        device=options.device,
        place=Place(gradient_checkpointing=SIDES[options.side]),
    )
    training = start(subject).training
    model, device = training.adaptation.model, torch.device(options.device)
    peak: PeakMemory | None = None
    for _ in sys.stdin:
        started = time.perf_counter()
        training.update()
        training.settle()
        seconds = time.perf_counter() - started
        taken = 0 if peak is None else peak.bytes() or 0
        at_rest = sum(p.nbytes for p in model.parameters()) + training.adaptation.optimizer_bytes()
        held = at_rest if device.type == "cpu" else 0  # torch's counter has it
        row = training.history[-1]
        print(json.dumps({"loss": row["loss"], "seconds": seconds, "peak": held + taken}), flush=True)
        peak = peak or PeakMemory(device)


if __name__ == "__main__":
    main()
