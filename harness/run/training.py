"""The one training loop. It knows no method and no task by name."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.errors import Diverged, InputError
from harness.method import Adaptation, Indices
from harness.run.sizes import Sizes
from harness.run.streams import TrainingData, derived_seed
from harness.spec import TrainSpec
from harness.task import Batch, Task

FETCH_EVERY = 10  # updates between fetches of the history from the device: a fetch waits for the device
COUNT_EVERY = 10  # updates between counts of the adapter's size, where nothing says that it has changed


class Training:
    """One run's training: the state of the loop, and the `Step` that a method's hooks see."""

    def __init__(
        self,
        adaptation: Adaptation,
        task: Task,
        encoded: Any,
        data: TrainingData,
        train: TrainSpec,
        device: torch.device,
        budget: int,
    ) -> None:
        self.adaptation = adaptation
        self.task = task
        self.encoded = encoded
        self.data = data
        self.train = train
        self.device = device
        self.budget = budget
        self.index = 0
        self.used = 0
        self.prepared = False
        self.seconds = 0.0
        self.tokens: int | None = None  # of all batches, padding apart; None where the task has none
        self.schedule_start = 0
        self.rewarm = (0, 0)  # of the last `restart_warmup`: batches used before it, and its length
        self.sizes = Sizes(adaptation)
        self.history: list[dict[str, Any]] = []
        self._random: tuple[int, Tensor, Tensor | None]  # of the last backward: its number, and torch's random states
        self._rng: tuple[int, torch.Generator] | None = None  # of an update, by its index
        self._kept = 0  # batches of the budget that are not for the preparation
        self._waiting: list[dict[str, Any]] = []  # history rows whose values may still be on the device

    def run(self, after_update: Callable[[Training], None]) -> None:
        """Update until the budget is used, then let the method finish. Raises Diverged at a non-finite loss.

        `after_update` is called after every update, the last time when the method has finished; its time is not
        counted as training, but for a `settle` in it.
        """
        while self.used < self.budget:
            started = time.perf_counter()
            self.update()
            if len(self._waiting) >= FETCH_EVERY or self.used >= self.budget:
                self.fetch()
            if self.used >= self.budget:
                self.sizes.count_optimizer()
                self.adaptation.finish(self)
                self.sizes.count_now(self.used)
                self._check_finite()
            self.seconds += time.perf_counter() - started
            after_update(self)

    def prepare(self) -> None:
        """Let the method prepare, before the first update; nothing where that is done."""
        if self.prepared:
            return
        self._kept = 1
        self.adaptation.prepare(self)
        self._kept = 0
        self.sizes.count_prepared(self.used)
        self.adaptation.optimizer.zero_grad(set_to_none=True)
        self.schedule_start = self.used
        self.prepared = True

    def update(self) -> None:
        """One update: draw, forward, backward, clip, step, and the method's hooks around them."""
        self.prepare()
        adaptation, optimizer = self.adaptation, self.adaptation.optimizer
        adaptation.before_forward(self)
        factor = self._schedule_factor()
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        with adaptation.for_batch(self) or contextlib.nullcontext():
            loss = self.backward(self.data.draw(adaptation.stream))
        penalty = adaptation.penalty()
        if penalty is not None:
            penalty.backward()
        del penalty  # its graph must not outlive the hooks: they may cut the parameters
        adaptation.before_step(self)
        self.sizes.count_if_resized(self.used)  # what this update trains; `after_step` may cut it
        row: dict[str, Any] = {"update": self.index, "loss": loss, "learning_rate_factor": factor}
        if self.train.clip_norm > 0:
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            row["gradient_norm"] = torch.nn.utils.clip_grad_norm_(trained, self.train.clip_norm)
        optimizer.step()
        if self.index % COUNT_EVERY == 0:  # the first one makes the state
            self.sizes.count_optimizer()
        row |= adaptation.after_step(self)
        optimizer.zero_grad(set_to_none=True)
        row["batches"] = self.used
        self._waiting.append(row)
        self.index += 1
        if self.index % COUNT_EVERY == 0:
            self.sizes.count_now(self.used)
        else:
            self.sizes.count_if_resized(self.used)

    def backward(self, batch: Indices) -> Tensor:
        """See `harness.method.Step`."""
        self._random = (self.used, torch.get_rng_state(), _cuda_rng_state(self.device))
        self.spend(1)
        total = torch.zeros((), device=self.device)
        for loss in self._losses(batch):
            if loss.requires_grad:  # not where a method has removed all it could train, and there is no head
                loss.backward()
            total += loss.detach()
        return total

    def loss(self, batch: Indices) -> Tensor:
        """See `harness.method.Step`."""
        self.spend(1)
        _, cpu, cuda = self._random
        with torch.random.fork_rng([] if cuda is None else [self.device]):
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda, self.device)
            return torch.stack(list(self._losses(batch))).sum()

    def spend(self, batches: int) -> None:
        """See `harness.method.Step`."""
        if self.used + batches > self.budget:
            raise RuntimeError(f"the budget of {self.budget} batches is used up: look at step.used before asking")
        if self.used + batches > self.budget - self._kept:
            raise RuntimeError(
                f"the preparation must leave one of the budget's {self.budget} batches to train with: "
                "raise the budget, or let it read fewer"
            )
        self.used += batches

    def _losses(self, batch: Indices) -> Iterator[Tensor]:
        """The batch's mean loss in pieces, which sum up to it."""
        generator = torch.Generator().manual_seed(derived_seed(self.data.seed, "batch", self._random[0]))
        piece = math.ceil(len(batch) / self.train.micro_batches)
        for first in range(0, len(batch), piece):
            rows = batch[first : first + piece]
            collated = self.task.collate(self.encoded, rows, generator)
            if (tokens := collated.tokens) is not None:
                self.tokens = (self.tokens or 0) + tokens
            inputs = to_device(collated, self.device)
            with autocast(self.train, self.device):
                loss = self.task.loss(self.adaptation.model, inputs, generator) * (len(rows) / len(batch))
            yield loss

    def restart_schedule(self) -> None:
        """See `harness.method.Step`."""
        self.schedule_start, self.rewarm = self.used, (0, 0)

    def restart_warmup(self, batches: int) -> None:
        """See `harness.method.Step`."""
        if batches < 1:
            raise ValueError(f"a warm-up takes at least 1 batch, not {batches}")
        self.rewarm = (self.used, batches)

    def resized(self) -> None:
        """See `harness.method.Step`."""
        self.sizes.told = True

    @property
    def rng(self) -> torch.Generator:
        """See `harness.method.Step`."""
        if self._rng is None or self._rng[0] != self.index:
            seed = derived_seed(self.data.seed, "update", self.index)
            self._rng = self.index, torch.Generator().manual_seed(seed)
        return self._rng[1]

    def _schedule_factor(self) -> float:
        """Linear warm-up from 0, then linear decay to 0, half a cosine to 0, or a constant, as in transformers'
        schedules; times the warm-up that a method has restarted."""
        start, length = self.rewarm
        again = min(1.0, (self.used - start) / length) if length else 1.0
        budget, done = self.budget - self.schedule_start, self.used - self.schedule_start
        warmup = math.ceil(self.train.warmup * budget)
        if done < warmup:
            return again * done / warmup
        left = max(0.0, (budget - done) / max(1, budget - warmup))
        decayed = {"linear": left, "cosine": 0.5 * (1.0 - math.cos(math.pi * left)), "constant": 1.0}
        return again * decayed[self.train.schedule]

    def settle(self) -> None:
        """Wait for what the device still has to do, and count that as training: before an evaluation."""
        started = time.perf_counter()
        self.fetch()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - started

    def fetch(self) -> None:
        """Move the history's waiting rows off the device. Raises Diverged where a loss is not finite."""
        tensors = [value for row in self._waiting for value in row.values() if isinstance(value, Tensor)]
        numbers = iter(torch.cat([t.detach().float().reshape(-1) for t in tensors]).tolist() if tensors else [])
        for row in self._waiting:
            self.history.append({key: _fetched(value, numbers) for key, value in row.items()})
        rows, self._waiting = self.history[len(self.history) - len(self._waiting) :], []
        for row in rows:
            if not math.isfinite(row["loss"]):
                raise Diverged(f"the loss is {row['loss']} at update {row['update']}")

    def _check_finite(self) -> None:
        """The last update has no loss after it that would tell."""
        trained = [p for p in self.adaptation.model.parameters() if p.requires_grad and p.numel()]
        if trained and not torch.stack([p.detach().isfinite().all() for p in trained]).all():
            raise Diverged(f"a trained parameter is not finite after the last update, {self.index - 1}")

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact resume needs; between two updates."""
        self.fetch()
        numpy_state: Any = np.random.get_state()
        return {
            "index": self.index,
            "used": self.used,
            "prepared": self.prepared,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "schedule_start": self.schedule_start,
            "rewarm": self.rewarm,
            "others": self.sizes.others,
            "trajectory": self.sizes.trajectory,
            "optimizer_bytes": self.sizes.optimizer_bytes,
            "history": self.history,
            "drawn": self.data.drawn,
            "adaptation": self.adaptation.state_dict(),
            "python": random.getstate(),
            "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
            "torch": torch.get_rng_state(),
            "device": self.device.type,
            "cuda": _cuda_rng_state(self.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, on a training that was built from the same spec.

        Raises InputError for a checkpoint from another kind of device, where the run would go on differently.
        """
        if state["device"] != self.device.type:
            raise InputError(f"the checkpoint was made on {state['device']}, this is {self.device.type}: delete it")
        self.adaptation.load_state_dict(state["adaptation"])
        for name in ("index", "used", "prepared", "seconds", "tokens", "schedule_start", "history"):
            setattr(self, name, state[name])
        self.rewarm = tuple(state["rewarm"])
        self.sizes.load(state["others"], state["trajectory"], state["optimizer_bytes"])
        self.data.drawn = state["drawn"]
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        np.random.set_state(tuple(state["numpy"]))
        torch.set_rng_state(state["torch"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)


def _plain(value: Any) -> Any:
    """A history value as JSON holds it: a method may give NumPy's numbers."""
    return value if isinstance(value, (bool, int, float, str)) else float(value)


def _fetched(value: Any, numbers: Iterator[float]) -> Any:
    """A history value as plain numbers: a tensor's are the next ones of `numbers`."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, Tensor):
        return _plain(value)
    return next(numbers) if value.dim() == 0 else [next(numbers) for _ in range(value.numel())]


def _cuda_rng_state(device: torch.device) -> Tensor | None:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def autocast(train: TrainSpec, device: torch.device) -> torch.autocast:
    """Mixed precision as the spec has it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=train.precision == "bf16")


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return Batch({name: value.to(device) for name, value in batch.inputs.items()}, batch.labels.to(device))
