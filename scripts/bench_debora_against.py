"""What a step of dEBORA costs in this checkout, against another checkout of the project.

    git worktree add ../before COMMIT
    python scripts/bench_debora_against.py ../before [--sides "dEBORA lower"] [--geometry matrix] [--repeats 40]

The sides are those of bench_debora.py, which runs as it is here on both checkouts' methods: one process each, which
wait for one another, so that single steps take turns. Every step has its opposite right beside it: the ratio is the
median over these pairs, with its 95 % interval from the order of the pairs. The floor is the same code in both, and
shows how far the machine is to be trusted. "x floor" is what each checkout's median is of its own floor's.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]


class Checkout:
    """A process that imports the project from `root` and runs a side's step when it is told its name."""

    def __init__(self, root: Path, geometry: str) -> None:
        self.root = root
        command = [sys.executable, __file__, str(root), "--serve", "--geometry", geometry]
        environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.sides = self.told().split("\t")

    def seconds(self, side: str) -> float:
        """Processor seconds of one step: a busy machine stops a process, and that is not the step's cost."""
        assert self.process.stdin is not None
        print(side, file=self.process.stdin, flush=True)
        return float(self.told())

    def told(self) -> str:
        """The next line of the process. Raises SystemExit where it has ended; it has said why itself."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the sides do not run on {self.root}")
        return line.rstrip("\n")

    def close(self) -> None:
        """Let the process end."""
        self.process.communicate()


def serve(root: Path, geometry: str) -> None:
    """Print the sides' names; then run a step for every line, a side's name, and print its processor seconds."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    import torch
    from bench_debora import keep_freed_memory, make_sides

    import methods

    if Path(methods.__path__[0]).resolve() != root.resolve() / "methods":
        raise SystemExit(f"{root} is no checkout of the project")
    torch.set_num_threads(1)
    keep_freed_memory()
    sides = make_sides(geometry)
    print(*sides, sep="\t", file=answers, flush=True)
    for line in sys.stdin:
        started = time.process_time()
        sides[line.rstrip("\n")]()
        print(time.process_time() - started, file=answers, flush=True)


def compare(here: Checkout, there: Checkout, sides: list[str], repeats: int) -> None:
    """Print medians, and the median and interval of the ratios of pairs; two rounds warm up."""
    pairs: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for repeat in range(repeats + 2):
        for side in sides:
            first, second = (here, there) if repeat % 2 else (there, here)
            times = {first: first.seconds(side), second: second.seconds(side)}
            if repeat >= 2:
                pairs[side].append((times[here], times[there]))
    medians = {
        side: [1e3 * statistics.median(times) for times in zip(*found, strict=True)] for side, found in pairs.items()
    }
    print(f"{'':24s}{'here ms':>9s}{'there ms':>9s}{'x floor':>8s}{'x floor':>8s}{'ratio':>8s}   95 %, {repeats} pairs")
    for side, found in pairs.items():
        (ours, theirs), floors = medians[side], medians["floor"]
        ratios = sorted(a / b for a, b in found)
        low = max(0, math.floor(repeats / 2 - 0.98 * math.sqrt(repeats)))  # order statistics around the median
        bounds = f"{ratios[low]:.3f} to {ratios[repeats - 1 - low]:.3f}"
        of_floor = f"{ours / floors[0]:8.3f}{theirs / floors[1]:8.3f}"
        print(f"{side:24s}{ours:9.2f}{theirs:9.2f}{of_floor}{statistics.median(ratios):8.3f}   {bounds}")


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="the root of the other checkout")
    parser.add_argument("--sides", nargs="+", default=["dEBORA", "Frank-Wolfe"], help="starts of their names")
    parser.add_argument("--geometry", default="matrix", choices=["matrix", "oblique", "stiefel"])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.checkout, options.geometry)
    here, there = (Checkout(root, options.geometry) for root in (HERE, options.checkout.resolve()))
    sides = [side for side in here.sides if side.startswith(("floor", *options.sides))]
    print(f"{options.geometry}: {here.root} against {there.root}, one thread each, in turns")
    compare(here, there, sides, options.repeats)
    here.close()
    there.close()


if __name__ == "__main__":
    main()
