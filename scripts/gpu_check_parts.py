"""The checks of scripts/gpu_check.py, which calls this: each a function of (job, device, sizes) that gives lines."""

from __future__ import annotations

import functools
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from harness.backbone_dtype import lower, unfit
from harness.contracts import METHOD_CONTRACTS, Subject, spec_of, start
from harness.contracts.subject import method_of
from harness.method import Backbone
from harness.record.store import RecordStore
from harness.run import checkpoint
from harness.run.memory import PeakMemory
from harness.run.run import run_one
from harness.run.training import Training
from harness.task import Batch, Classification, Examples
from scripts.gpu_check import MIB, ROOT, SECONDS, Cost, Job, Row, Sizes, failed


class RandomBert(Classification):
    """Random tokens and labels on a BERT with random weights, made on the device."""

    blocks: int
    width: int
    tokens: int
    device: str

    def load(self, data_root: str | None) -> tuple[Examples, dict[str, Examples]]:
        import numpy as np

        generator = np.random.default_rng(0)
        tokens = generator.integers(1000, 30000, size=(128, self.tokens))
        rows = Examples({"tokens": tokens}, generator.integers(0, 2, size=128))
        return rows, {"validation": rows}

    def backbone(self, model: str | None, *, meta: bool = False, trust_remote_code: bool = False) -> Backbone:
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            hidden_size=self.width,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.width // 16 if self.width < 256 else self.width // 64,
            intermediate_size=4 * self.width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        with torch.device("meta" if meta else self.device):
            module = BertForSequenceClassification(config)
        layers = [name for name, part in module.bert.encoder.named_modules() if isinstance(part, torch.nn.Linear)]
        return Backbone(module, ("bert.pooler", "classifier"), tuple(f"bert.encoder.{name}" for name in layers))

    def collate(self, encoded: Any, rows: Sequence[int], generator: torch.Generator | None) -> Batch:
        tokens = torch.from_numpy(encoded.columns["tokens"][list(rows)])
        return Batch({"input_ids": tokens}, torch.from_numpy(encoded.labels[list(rows)]))


def first_line(error: BaseException) -> str:
    """An exception as one line of a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".replace("|", "/")[:160]


def contracts(job: Job, device: str, sizes: Sizes) -> list[Row]:
    """One line: the contracts that a method breaks."""
    subject = Subject(job.what, Path(), device=device, backbone_dtype=job.backbone)
    backbone = subject.made_task().backbone(None, meta=True)
    lower(backbone, job.backbone)
    reason = unfit(method_of(job.what), backbone)
    if reason is not None:
        return [Row(*job, "not applicable", reason)]
    broken = []
    for contract in METHOD_CONTRACTS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                contract(replace(subject, folder=Path(folder)))
            except Exception as error:
                broken.append(f"{contract.__name__}: {first_line(error)}")
    if broken:
        more = f"; {len(broken) - 1} more" if broken[1:] else ""
        return [Row(*job, "failed", broken[0] + more)]
    return [Row(*job, "passed", f"{len(METHOD_CONTRACTS)} contracts")]


def packed(job: Job, device: str, sizes: Sizes) -> list[Row]:
    """As `contracts`, where there is the library that packs."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return [Row(*job, "skipped", "bitsandbytes is not installed")]
    return contracts(job, device, sizes)


def resume(job: Job, device: str, sizes: Sizes) -> list[Row]:
    """One line: whether a run that is resumed goes on as one that is not interrupted, on a quarter of the blocks."""
    sizes = sizes._replace(blocks=max(1, sizes.blocks // 4))
    batches, saved = 24, 9  # which is within dEBORA's search
    with tempfile.TemporaryDirectory() as folder:
        whole = begin(job, device, sizes, batches)
        update(whole, batches)
        halves = begin(job, device, sizes, batches)
        update(halves, saved)
        checkpoint.save(Path(folder), saved, halves.state_dict())
        halves = begin(job, device, sizes, batches)
        state = checkpoint.load_newest(Path(folder)).state
        assert state is not None
        halves.load_state_dict(state)
        update(halves, batches)
    pairs = zip(whole.history, halves.history, strict=True)
    apart = [(one["update"], abs(one["loss"] - two["loss"])) for one, two in pairs if one["loss"] != two["loss"]]
    if apart:
        detail = f"losses differ from update {apart[0][0]} on, by {max(by for _, by in apart):.1e} at most"
        return [Row(*job, "failed", detail)]
    return [Row(*job, "passed", f"{len(whole.history)} losses bit-equal")]


def begin(job: Job, device: str, sizes: Sizes, batches: int) -> Training:
    """A method on the random BERT, before its first update."""
    task = RandomBert(blocks=sizes.blocks, width=sizes.width, tokens=sizes.tokens, device=device)
    subject = Subject(
        job.what,
        Path(),
        task,
        batches=batches,
        batch_size=sizes.batch_size,
        device=device,
        backbone_dtype=job.backbone,
    )
    return start(subject).training


def update(training: Training, batches: int) -> None:
    """Update until so many batches are used."""
    while training.used < batches:
        training.update()
    training.fetch()


def ray(job: Job, device: str, sizes: Sizes) -> list[Row]:
    """One line: two runs at a time on one GPU."""
    what = "two runs on one GPU" if device == "cuda" else "two runs"
    if importlib.util.find_spec("ray") is None:
        return [Row("ray", what, "fp32", "skipped", "ray is not installed")]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "harness", "run", "--methods", "lora[rank=2]", "--tasks", "synthetic"]
        command += [*f"--seeds 0,1 --batches 300 --device {device} --tracking-uri off --results".split(), folder]
        command += ["--gpus-per-run", "0.5"] if device == "cuda" else []
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=SECONDS)
        records = list(RecordStore(Path(folder)).records())
    if done.returncode or [record.status for record in records] != ["done", "done"]:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        return [Row("ray", what, "fp32", "failed", f"exit code {done.returncode}: {' '.join(last)}")]
    return [Row("ray", what, "fp32", "passed", f"both done on {records[0].environment.device}")]


def memory(job: Job, device: str, sizes: Sizes) -> list[Row]:
    """Two lines: a block of known size, and a whole run."""
    place = torch.device(device)
    block = 64 * MIB
    before = torch.cuda.memory_allocated(place) if device == "cuda" else 0
    peak = PeakMemory(place)
    torch.ones(block, dtype=torch.uint8, device=place)
    found = peak.bytes()
    if found is None:
        return [Row("memory", "64 MiB", "", "skipped", "not measured on this machine")]
    told = f"{(found - before) / MIB:.1f} MiB for a block of 64"
    rows = [Row("memory", "64 MiB", "", "passed" if abs(found - before - block) < 8 * MIB else "failed", told)]
    if device != "cuda":
        return [*rows, Row("memory", "a run", "fp32", "skipped", "torch counts no memory of a CPU")]
    counted: list[tuple[int, int]] = []  # torch's counters, the last ones at the end of training
    keys = ("allocated_bytes.all.peak", "reserved_bytes.all.peak")
    with tempfile.TemporaryDirectory() as folder:
        store = RecordStore(Path(folder))
        store.make_ready()
        spec = spec_of(Subject("lora[rank=4]", Path(folder), device=device))
        spec = spec.model_copy(update={"train": spec.train.model_copy(update={"holdout_points": 0})})
        record = run_one(spec, store, lambda progress: counted.append(_counters(place, keys)))
    ours = record.training_peak_bytes, record.training_reserved_bytes
    told = f"record {ours[0]} allocated, {ours[1]} reserved; torch {counted[-1][0]}, {counted[-1][1]}"
    return [*rows, Row("memory", "a run's training", "fp32", "passed" if ours == counted[-1] else "failed", told)]


def _counters(place: torch.device, keys: tuple[str, str]) -> tuple[int, int]:
    counters = torch.cuda.memory_stats(place)
    return counters[keys[0]], counters[keys[1]]


NO_UPPER_STEP = "T_max=1000000,search_fraction=1,warm_up=0"
METHODS = {
    "LoRA, rank 8": "lora[rank=8]",
    "AdaLoRA, 12 to 8": "adalora[init_rank=12,target_rank=8,tinit=1,tfinal=1,deltaT=1]",
    "dEBORA, rank 8": f"debora[rank=8,{NO_UPPER_STEP}]",
    "dEBORA, a third left": f"debora[rank=8,{NO_UPPER_STEP}]",
}
THIRD = (2, 3, 3)  # of 8, over the layers in turn


def steps(job: Job, device: str, sizes: Sizes) -> list[Cost]:
    """The cost of each side's step."""
    sides: dict[str, Callable[[], Any]] = {}
    peaks: dict[str, int | None] = {}
    for name, make in {"floor": floor, **{name: functools.partial(side, name) for name in METHODS}}.items():
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        sides[name] = make(job.backbone, device, sizes)
        sides[name]()
        gc.collect()
        peaks[name] = None
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            sides[name]()
            peaks[name] = torch.cuda.max_memory_allocated() - before
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(sizes.repeats + 2):
        for name in sides if repeat % 2 else reversed(sides):
            seconds = timed(sides[name], device)
            if repeat >= 2:
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    tokens = sizes.batch_size * sizes.tokens
    return [
        Cost(name, job.backbone, seconds, seconds / medians["floor"], tokens / seconds, peaks[name])
        for name, seconds in medians.items()
    ]


def timed(step: Callable[[], Any], device: str) -> float:
    """Seconds of one step, to its end on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def side(what: str, backbone: str, device: str, sizes: Sizes) -> Callable[[], Any]:
    """A method's update in the harness's own loop."""
    training = begin(Job("steps", METHODS[what], backbone), device, sizes, 10**6)
    if what.endswith("third left"):
        adaptation: Any = training.adaptation
        ranks = [THIRD[position % len(THIRD)] for position in range(len(adaptation.layers))]
        adaptation.cut(adaptation.search.drop([component >= rank for rank in ranks for component in range(8)]))
    return training.update


def floor(backbone: str, device: str, sizes: Sizes) -> Callable[[], Any]:
    """Forward and backward of the frozen model."""
    training = begin(Job("steps", "head", backbone), device, sizes, 10**6)
    model: Any = training.adaptation.model
    model.requires_grad_(False)
    model.bert.embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return lambda: training.backward(training.data.draw("all"))


CHECKS = {"contracts": contracts, "packed": packed, "resume": resume, "ray": ray, "memory": memory, "steps": steps}


def lines_of(job: Job, device: str, sizes: Sizes) -> Sequence[Row | Cost]:
    """A check's lines; one that says so of a check that raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            lines: Sequence[Row | Cost] = CHECKS[job.part](job, device, sizes)
        except Exception as error:
            lines = [failed(job, first_line(error))]
    return lines


def main() -> None:
    """Carry out the check that the only argument names, and print its lines as JSON, each with its kind."""
    job, device, sizes = json.loads(sys.argv[1])
    print(json.dumps([(type(line).__name__, line) for line in lines_of(Job(*job), device, Sizes(*sizes))]))


if __name__ == "__main__":
    main()
