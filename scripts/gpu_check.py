"""Whether all of this works on a GPU, and what a step costs there: tables in Markdown, on stdout and in --output.

    bash scripts/gpu_check.sh [--only contracts,packed,resume,ray,memory,steps] [--output FILE] [--device cpu]

contracts  every installed method keeps `harness.contracts` on the device, its backbone in float32 and in bfloat16
           (adapters and head stay in float32)
packed     the same for a backbone in int8 and in nf4, of methods that take one
resume     a run that is saved half-way and resumed by a new model has the losses of one that was not, bit for bit
ray        two runs on one GPU at a time, under Ray
memory     the peak in our records against torch's own counters
steps      a training step of LoRA, AdaLoRA and dEBORA, and of dEBORA with a third of its components left, against the
           floor: forward and backward of the frozen backbone through its activations alone, from the embeddings on. A
           BERT with random weights, without dropout. The sides take turns; times are medians. Peak memory is what a
           side holds at once: its own model, optimizer and activations.

Each check is a process of its own (scripts/gpu_check_parts.py), so that none spoils another. The exit code is 1 where
one failed. A checkout that is not installed will do.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PROJECT = "rank-adaptive-harness"
PARTS = ("contracts", "packed", "resume", "ray", "memory", "steps")
BACKBONES = ("fp32", "bf16")
PACKED = ("int8", "nf4")
ON_PACKED = ("lora", "adalora", "debora", "hadapter", "peft[type=lora]")
SIDE_BY_SIDE = ("contracts", "packed", "resume")
RESUMED = ("lora", "adalora", "debora[T_max=2]")
SECONDS = 300  # most of one check
MIB = 2**20


class Row(NamedTuple):
    """A line of the first table. result: "passed", "failed", "skipped" or "not applicable"."""

    part: str
    what: str
    backbone: str
    result: str
    detail: str = ""


class Cost(NamedTuple):
    """A line of the second table. peak: bytes; None on a CPU, where torch does not count."""

    step: str
    backbone: str
    seconds: float
    to_floor: float
    tokens_a_second: float
    peak: int | None


class Sizes(NamedTuple):
    """Of the model and the batches of `resume` and `steps`."""

    blocks: int
    width: int
    tokens: int
    batch_size: int
    repeats: int


class Job(NamedTuple):
    """A check: one of PARTS, of what, with which backbone; "" where a part has one check alone."""

    part: str
    what: str = ""
    backbone: str = ""


SIZES = {"cuda": Sizes(24, 1024, 128, 16, 20), "cpu": Sizes(2, 64, 32, 4, 3)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check what is asked for; the exit code."""
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        make_importable(Path(folder))
        options = options_of(arguments)
        default = SIZES[options.device]
        sizes = Sizes(*(getattr(options, name) or getattr(default, name) for name in Sizes._fields))
        started = time.perf_counter()
        lines: list[Row | Cost] = []
        text = ""
        for line in all_lines(jobs_of(options.only, options.methods), options, sizes):
            lines.append(line)
            text = tables(lines, options.device, sizes, time.perf_counter() - started)
            if options.output:  # at once: what is stopped half-way has been measured all the same
                options.output.write_text(text)
    print(text)
    return int(any(isinstance(line, Row) and line.result == "failed" for line in lines))


def make_importable(folder: Path) -> None:
    """Let this checkout be imported, here and in what is started from here. Where it is not installed, `folder` gets
    what says so of its methods."""
    paths = [str(ROOT)]
    try:
        importlib.metadata.version(PROJECT)
    except importlib.metadata.PackageNotFoundError:
        write_entry_points(folder)
        paths.append(str(folder))
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])


def write_entry_points(folder: Path) -> None:
    """Write into `folder` what an installation says of the project's methods and tasks."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / f"{PROJECT.replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PROJECT}\nVersion: {project['version']}\n")
    lines: list[str] = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    import torch

    from harness import registry

    methods = list(registry.registered(registry.METHODS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SIZES), default="cuda")
    parser.add_argument("--only", type=choices(PARTS), default=list(PARTS), metavar=",".join(PARTS))
    parser.add_argument("--methods", type=choices(methods), default=methods, metavar="A,B", help="of the contracts")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the tables there too, as they grow")
    parser.add_argument("--processes", type=int, metavar="N", help="checks of contracts at a time")
    for name in Sizes._fields:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help="of resume and steps")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU: --device cpu tries the same, smaller, on the CPU")
    return options


def choices(known: Sequence[str]) -> Callable[[str], list[str]]:
    """What an option's comma-separated words may be."""

    def parse(text: str) -> list[str]:
        for word in text.split(","):
            if word not in known:
                raise argparse.ArgumentTypeError(f"'{word}' is not one of {', '.join(known)}")
        return text.split(",")

    return parse


def jobs_of(parts: Sequence[str], methods: Sequence[str]) -> list[Job]:
    """Everything that is to be checked, in the order of the tables."""
    from tests.support.contract_settings import PARAMETERS

    jobs: list[Job] = []
    for part in parts:
        if part in SIDE_BY_SIDE:
            names = {"contracts": methods, "packed": ON_PACKED, "resume": RESUMED}[part]
            backbones = PACKED if part == "packed" else BACKBONES
            whole = [name if part == "resume" else PARAMETERS.get(name, name) for name in names]
            jobs += [Job(part, name, backbone) for name in whole for backbone in backbones]
        else:
            jobs += [Job(part, "", backbone) for backbone in (BACKBONES if part == "steps" else ("",))]
    return jobs


def all_lines(jobs: Sequence[Job], options: argparse.Namespace, sizes: Sizes) -> Iterator[Row | Cost]:
    """The lines of all checks, as they come. Contracts and resumed runs go side by side, the others one at a time: they
    are timed, or count memory."""
    processes = options.processes or max(1, min(8, (os.cpu_count() or 1) // 2))
    for alone in (False, True):
        chosen = [job for job in jobs if (job.part not in SIDE_BY_SIDE) == alone]
        with ThreadPoolExecutor(1 if alone else processes) as pool:
            for found in pool.map(lambda job: lines_of(job, options.device, sizes), chosen):
                for line in found:
                    print(*line[:4], file=sys.stderr, flush=True)
                    yield line


def lines_of(job: Job, device: str, sizes: Sizes) -> Sequence[Row | Cost]:
    """The lines of a check, from a process of its own; one that says so where it came to no end."""
    command = [sys.executable, "-m", "scripts.gpu_check_parts", json.dumps([job, device, sizes])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return [failed(job, f"not done after {SECONDS} seconds")]
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode or not last.startswith("["):
        reason = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        return [failed(job, f"exit code {done.returncode}: {reason}")]
    kinds: dict[str, type[Row | Cost]] = {kind.__name__: kind for kind in (Row, Cost)}
    return [kinds[kind](*fields) for kind, fields in json.loads(last)]


def failed(job: Job, reason: str) -> Row:
    """The line of a check that came to no result."""
    return Row(job.part, job.what or job.part, job.backbone, "failed", reason.replace("|", "/")[:200])


def tables(lines: Sequence[Row | Cost], device: str, sizes: Sizes, seconds: float) -> str:
    """Everything as Markdown."""
    import torch

    rows = [line for line in lines if isinstance(line, Row)]
    costs = [line for line in lines if isinstance(line, Cost)]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "peft", "transformers")]
    precision = f"products of fp32 in precision '{torch.get_float32_matmul_precision()}'"
    text = ["## GPU check", "", f"{machine(device)}; {', '.join(versions)}; {precision}; {seconds:.0f} seconds."]
    if rows:
        text += ["", "| check | of | backbone | result | |", "|---|---|---|---|---|"]
        text += [f"| {row.part} | `{row.what}` | {row.backbone} | {row.result} | {row.detail} |" for row in rows]
    if costs:
        model = f"{sizes.blocks} blocks of width {sizes.width}, batches of {sizes.batch_size} x {sizes.tokens} tokens"
        text += ["", f"Steps on a BERT of {model}; medians of {sizes.repeats}.", ""]
        text += ["| step | backbone | ms | x floor | tokens a second | peak MiB |", "|---|---|--:|--:|--:|--:|"]
        for cost in costs:
            peak = "" if cost.peak is None else f"{cost.peak / MIB:,.0f}"
            figures = f"{1e3 * cost.seconds:.1f} | {cost.to_floor:.2f} | {cost.tokens_a_second:,.0f} | {peak}"
            text.append(f"| {cost.step} | {cost.backbone} | {figures} |")
    return "\n".join(text) + "\n"


@functools.cache
def machine(device: str) -> str:
    """The card and its driver, or that it is a CPU."""
    import torch

    if device != "cuda":
        return f"CPU, {os.cpu_count()} cores"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    card = torch.cuda.get_device_properties(0)
    return f"{card.name}, {card.total_memory / 2**30:.0f} GiB, driver {driver}, CUDA {torch.version.cuda}"


if __name__ == "__main__":
    sys.exit(main())
