"""The method interface: what a plugin author implements to have a method compared.

A `Method` is its hyperparameters. Starting it on a backbone gives an `Adaptation`, the state of one run. The
training loop knows nothing else about a method. To add one, write a file with these two classes and name the
`Method` in the entry-point group `harness.methods`.

This module imports torch only for type checking, and so should the module of a method (import it inside
functions), so that `python -m harness list` stays fast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import Field

from harness.backbone import Backbone as Backbone
from harness.backbone import in_modules as in_modules
from harness.backbone import is_adaptable as is_adaptable
from harness.backbone import is_transposed as is_transposed
from harness.parameters import ParameterCount, Range, SearchSpace, Strict
from harness.storage import save_tensors
from harness.trace import RANK as RANK
from harness.trace import RANKS as RANKS
from harness.trace import Trace as Trace

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from harness.record.record import RunRecord
    from harness.spec import TrainSpec

Stream = Literal["all", "lower", "upper"]
Indices = tuple[int, ...]  # one batch: positions in the training split
FinishedRun = Callable[[str], "RunRecord"]  # by run_id; raises InputError, with the nearest match, where there is none


class TrainData(Protocol):
    """The training split as a method sees it."""

    size: int

    def draw(self, stream: Stream) -> Indices:
        """The next batch of a stream. "all": the training split in this seed's order; "lower" and "upper": two random
        halves of equal size. Every draw is counted and is part of a checkpoint."""


class Step(Protocol):
    """One update of the training loop, as the hooks of an `Adaptation` see it."""

    index: int  # updates made before this one
    budget: int  # batches that the whole run may put through forward and backward
    used: int  # batches used so far, those of this step included

    def backward(self, batch: Indices) -> Tensor:
        """Forward and backward of one batch, adding to the gradients (autocast and accumulation included).

        Returns the detached mean loss (a scalar tensor). Uses one batch of the budget; raises RuntimeError when none is
        left, so look at `used` first."""

    def loss(self, batch: Indices) -> Tensor:
        """Forward of one batch: its mean loss, a scalar tensor, with a graph except under torch.no_grad.

        The random numbers (dropout, noise) are those of the last `backward`, so that losses at two points can be
        compared; call it after one. Nothing is kept of it, so it is for derivatives that `backward` does not give and
        for trial points. Uses one batch of the budget, with or without derivatives; RuntimeError as in `backward`."""

    def spend(self, batches: int) -> None:
        """Count passes that a method makes through a graph of `loss` (products with second derivatives) as batches of
        the budget. Raises RuntimeError where fewer are left."""

    def restart_schedule(self) -> None:
        """Begin the learning-rate schedule anew over what is left of the budget (for two-phase methods)."""


class Method(Strict, ABC):
    """A rank-adaptive or other fine-tuning method: nothing but its validated hyperparameters.

    The first line of a subclass's docstring is what `list` shows. Subclasses are final.
    """

    version: ClassVar[int] = 1  # raise it when the method's results change, so that its runs are made again
    data_rule: ClassVar[Literal["all", "halves"]] = "all"  # which streams it draws from
    capabilities: ClassVar[tuple[str, ...]] = ()  # words for `list`: "linear", "conv2d", "rank-adaptive"
    search_space: ClassVar[SearchSpace] = {"learning_rate": Range(1e-5, 1e-2, log=True)}  # of `--tune`
    traces: ClassVar[tuple[Trace, ...]] = ()  # what its `after_step` gives the history, and how it is drawn
    identity_at_start: ClassVar[bool] = True  # the adapted model computes what the backbone computes, before training

    learning_rate: float = Field(gt=0, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay, on matrices only")

    def resolve(self, backbone: Backbone, finished: FinishedRun) -> Method:
        """The method with everything written out that depends on the backbone or on an earlier run, so that the run's
        spec needs neither later. Called for every cell when runs are planned, with the backbone on the meta device,
        and before `unsupported`. Raises InputError for what cannot be right there."""
        return self

    @classmethod
    def details(cls) -> list[str]:
        """What `list NAME` says below the parameters, a line each."""
        return []

    @classmethod
    def singular_values(cls, folder: Path) -> Mapping[str, np.ndarray]:
        """Of what `Adaptation.export` wrote into `folder`: the singular values of each layer's update, (rank,), largest
        first, by the layer's name; {} where there are none to be had, as of a damaged export. NumPy alone: the report
        asks for them."""
        return {}

    def unsupported(self, backbone: Backbone) -> str | None:
        """Why the method cannot work on this backbone (the cell is then reported with that reason), or None.

        Raises InputError for a hyperparameter that cannot be right on it (a rank above a layer's size, targets
        that match nothing). Called for every cell before anything runs, with the backbone on the meta device, so
        look at shapes and names only.
        """
        return None

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """What a dry run should say of a run of `num_examples` training rows (ranks it can reach), a line each.
        Called for every cell before anything runs; raises InputError for what does not fit into the budget."""
        return []

    @abstractmethod
    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """Adapt the backbone in place and return the run's state.

        The head is trained by every method. `rng` and torch's global generator are seeded for this run; draw
        initial values from either. For a dry run the backbone is on the meta device: draw nothing from `data`.
        """


class Adaptation:
    """The state of one run of a method: model, optimizer and whatever the method keeps.

    Each update of the loop runs, in this order: before_forward, forward and backward of a batch of `stream`,
    penalty, before_step, gradient clipping, the optimizer's step, after_step, zeroing of gradients. The learning
    rate is `initial_lr` times the schedule's factor in every parameter group at every step, so groups may be
    added, sliced and replaced.
    """

    stream: Stream = "all"

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, backbone: Backbone) -> None:
        self.model = model
        self.optimizer = optimizer
        self.head = backbone.head
        self._adapter_initial = self._adapter_peak = self.adapter_numbers()
        self._others = sum(
            p.numel()
            for name, p in model.named_parameters()
            if ".original_module." not in name and (not p.requires_grad or in_modules(name, self.head))
        )

    def penalty(self) -> Tensor | None:
        """A regulariser that is added to the training loss, and never to an evaluation."""
        return None

    def before_forward(self, step: Step) -> None:
        """Before a batch is drawn and put through the model."""

    def before_step(self, step: Step) -> None:
        """Gradients are there and not yet clipped: replace them here."""

    def after_step(self, step: Step) -> dict[str, Any]:
        """After the optimizer's step, gradients still there: rank allocation, Frank-Wolfe, truncation.

        Returns values for the run's history, which `Method.traces` declares: numbers, lists of them, or tensors without
        or with one dimension (which are fetched later, without a wait, as a number or a list).
        """
        return {}

    def finish(self, step: Step) -> None:
        """After the last update, before the evaluation."""

    def ranks(self) -> dict[str, int]:
        """Live rank of each adapted layer, by the layer's name in the backbone; {} where there is no rank."""
        return {}

    def adapter_numbers(self) -> int:
        """Numbers of the adapter in effect now, the head left out."""
        return sum(
            p.numel()
            for name, p in self.model.named_parameters()
            if p.requires_grad and not in_modules(name, self.head)
        )

    def at_rank(self, rank: int) -> AbstractContextManager[None] | None:
        """For `with`: every layer's update cut to its `rank` most important components, of fewer to what it has, and
        afterwards as it was, bit for bit. None where the method has no such cut."""
        return None

    def parameters_without_optimizer(self) -> tuple[str, ...]:
        """Names of the model's parameters that the method changes itself, not through the optimizer."""
        return ()

    def parameter_count(self) -> ParameterCount:
        """Counts so far. Call it whenever the size changes: the peak is the largest size seen by it."""
        final = self.adapter_numbers()
        self._adapter_peak = max(self._adapter_peak, final)
        head = [p for name, p in self.model.named_parameters() if p.requires_grad and in_modules(name, self.head)]
        num_head = sum(p.numel() for p in head)
        itemsize = max((p.element_size() for p in self.model.parameters()), default=4)
        return ParameterCount(
            adapter_initial=self._adapter_initial,
            adapter_peak=self._adapter_peak,
            adapter_final=final,
            head=num_head,
            total=self._others + final,
            stored_bytes=(final + num_head) * itemsize,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact resume needs, as nested dicts and lists of tensors and JSON values: trained
        parameters, buffers, optimizer, and what a subclass adds."""
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        return {
            "trained": trained,
            "buffers": dict(self.model.named_buffers()),
            "optimizer": self.optimizer.state_dict(),
            "adapter_peak": self._adapter_peak,
            "stream": self.stream,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, on an adaptation that was started from the same spec."""
        import torch

        with torch.no_grad():
            for source, own in (
                (state["trained"], dict(self.model.named_parameters())),
                (state["buffers"], dict(self.model.named_buffers())),
            ):
                for name, value in source.items():
                    own[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self._adapter_peak = state["adapter_peak"]
        self.stream = state["stream"]

    def export(self, path: Path) -> None:
        """Write what was trained into the folder `path`, as a stock PEFT adapter where the update is low-rank;
        here, for the other methods: the trained numbers under their names, `trained.safetensors`. Raises OSError where
        the folder cannot be written or the disk is full."""
        path.mkdir(parents=True, exist_ok=True)
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        save_tensors(trained, path / "trained.safetensors")
