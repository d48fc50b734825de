"""The method interface: what a plugin author implements to have a method compared.

A `Method` is its hyperparameters. Starting it on a backbone gives an `Adaptation`, the state of one run. The
training loop knows nothing else about a method. To add one, write a file with these two classes and name the
`Method` in the entry-point group `harness.methods`.

This module imports torch only for type checking, and so should the module of a method (import it inside
functions), so that `python -m harness list` stays fast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from harness.backbone import EVERY_DTYPE as EVERY_DTYPE
from harness.backbone import FLOATS as FLOATS
from harness.backbone import PACKED as PACKED
from harness.backbone import Backbone as Backbone
from harness.backbone import BackboneDtype as BackboneDtype
from harness.backbone import as_matrix as as_matrix
from harness.backbone import in_modules as in_modules
from harness.backbone import is_adaptable as is_adaptable
from harness.backbone import is_transposed as is_transposed
from harness.backbone import number_of
from harness.backbone import weight_shape as weight_shape
from harness.parameters import Finished as Finished
from harness.parameters import Range, SearchSpace, Strict
from harness.peft_form import PeftForm as PeftForm
from harness.provenance import NOT_STATED
from harness.step import Indices as Indices
from harness.step import Step as Step
from harness.step import Stream as Stream
from harness.step import TrainData as TrainData
from harness.storage import save_tensors
from harness.trace import RANK as RANK
from harness.trace import RANKS as RANKS
from harness.trace import Trace as Trace

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from harness.spec import TrainSpec

FinishedRun = Callable[[str], Finished]  # by run_id; raises InputError, with the nearest match, where there is none


class Method(Strict, ABC):
    """A rank-adaptive or other fine-tuning method: nothing but its validated hyperparameters.

    The first line of a subclass's docstring is what `list` shows. Subclasses are final.
    """

    version: ClassVar[int] = 1  # raise it when the method's results change, so that its runs are made again
    data_rule: ClassVar[Literal["all", "halves"]] = "all"  # "halves": it draws from "lower" and "upper" as well
    provenance: ClassVar[str] = NOT_STATED  # where its code comes from, in a form of `harness.provenance`
    group: ClassVar[str] = "other"  # under which `list` shows it, one of `harness.provenance.GROUPS`
    own_format: ClassVar[bool] = False  # stock PEFT cannot load what it exports, as a rule: `list` says so
    loaders: ClassVar[Mapping[str, str]] = {}  # of such: the file that tells one -> the function that loads it, dotted
    capabilities: ClassVar[tuple[str, ...]] = ()  # words for `list`: "linear", "conv2d", "rank-adaptive"
    search_space: ClassVar[SearchSpace] = {"learning_rate": Range(1e-5, 1e-2, log=True)}  # of `--tune`
    traces: ClassVar[tuple[Trace, ...]] = ()  # what its `after_step` gives the history, and how it is drawn
    waits_for: ClassVar[tuple[str, ...]] = ()  # parameters that name another configuration of the sweep by its label
    repeatable_blocks: ClassVar[bool] = True  # a block gives the same again from its inputs: gradient checkpointing
    backbone_dtypes: ClassVar[tuple[BackboneDtype, ...]] = ("fp32",)  # that it works on, with all it trains in float32
    identity_at_start: ClassVar[bool] = True  # the adapted model computes what the backbone computes, before training

    learning_rate: float = Field(gt=0, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay, on matrices only")

    def changed(self, *names: str) -> dict[str, Any]:
        """Those of these settings that are not at their defaults, with their values."""
        fields = type(self).model_fields
        return {name: value for name in names if (value := getattr(self, name)) != fields[name].default}

    @property
    def upper_share(self) -> float:
        """Share of the training rows that the upper stream gets, between 0 and 1; the lower stream gets the others. A
        bilevel method that holds out another share than half overrides it, with a number or a hyperparameter."""
        return 0.5

    def resolve(self, backbone: Backbone, finished: FinishedRun) -> Method:
        """The method with everything written out that depends on the backbone or on an earlier run that it names by
        run_id, so that the run's spec needs neither later. Called for every cell when runs are planned, with the
        backbone on the meta device, and before `unsupported`. Raises InputError for what cannot be right there."""
        return self

    @property
    def parents(self) -> dict[str, str]:
        """The labels that this method's `waits_for` hold, by parameter; those that are not set are left out."""
        labels = {name: getattr(self, name) for name in self.waits_for}
        return {name: label for name, label in labels.items() if label is not None}

    def inherit(self, backbone: Backbone, parents: Mapping[str, Finished]) -> Method:
        """The method with what it takes from the runs that it waited for, by the parameter of `waits_for` that names
        their configuration: those of the same task and seed. Called when the run starts, so that ranks are not in its
        spec, and before `unsupported`; and once when runs are planned, with what the parents start with. Raises
        InputError for a parent that has not what is asked for."""
        return self

    @classmethod
    def details(cls) -> list[str]:
        """What `list NAME` says below the parameters, a line each."""
        return []

    @classmethod
    def in_todays_words(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        """The parameters of a record, of this version or an older one, by today's names and defaults: for its label."""
        return parameters

    @classmethod
    def singular_values(cls, folder: Path) -> Mapping[str, np.ndarray]:
        """Of what `Adaptation.export` wrote into `folder`: the singular values of each layer's update, (rank,), largest
        first, by the layer's name; {} where there are none to be had, as of a damaged export. NumPy alone: the report
        asks for them."""
        return {}

    def peft_form(self, ranks: Mapping[str, int]) -> PeftForm | None:
        """How stock PEFT trains a LoRA in place of the method's adapter with these ranks, by layer, 0 for none; None
        where the adapter is no LoRA. `advise` asks for it: import neither torch nor PEFT."""
        return None

    def unsupported(self, backbone: Backbone) -> str | None:
        """Why the method cannot work on this backbone (the cell is then reported with that reason), or None.

        Raises InputError for a hyperparameter that cannot be right on it (a rank above a layer's size, targets that
        match nothing). Called for every cell before anything runs, on the meta device: look at shapes and names."""
        return None

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """What a dry run should say of a run of `num_examples` training rows (ranks it can reach), a line each. Called
        for every cell before anything runs; raises InputError for what does not fit into the budget."""
        return []

    @abstractmethod
    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """Adapt the backbone in place and return the run's state.

        The head is trained by every method. `rng` and torch's global generator are seeded for this run; draw initial
        values from either. For a dry run the backbone is on the meta device: draw nothing from `data`."""


class Adaptation:
    """The state of one run of a method: model, optimizer and whatever the method keeps.

    Before the first update the loop calls `prepare`, once. Each update then runs, in this order: before_forward,
    forward and backward of a batch of `stream` within `for_batch`, penalty, before_step, gradient clipping, the
    optimizer's step, after_step, zeroing of gradients. The learning rate is `initial_lr` times the schedule's factor in
    every parameter group at every step, so groups may be added, sliced and replaced, and keep their ratios.

    Sizes may change in every hook. The loop counts them: after `start` and `prepare`, where an update changed the size
    of what the optimizer trains, where the method called `Step.resized`, every ten updates, and after `finish`.
    """

    stream: Stream = "all"

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, backbone: Backbone) -> None:
        self.model = model
        self.optimizer = optimizer
        self.head = backbone.head

    def prepare(self, step: Step) -> None:
        """Before the first update: a start that is taken from the data (initial values, ranks, layers to adapt).

        What it needs it reads with `harness.passes`: gradients of the backbone's weights, inputs of its layers. Every
        batch counts; the last one of the budget is kept for training, so that asking for it raises RuntimeError.
        The optimizer has no state yet: it may be replaced, or its parameter groups. Afterwards the loop clears the
        gradients and begins the learning-rate schedule, over what is left of the budget.

        A resumed run does not prepare again. So where sizes or groups change here, `load_state_dict` has to build them
        from the state before it calls its parent, which restores the values; frozen weights that change here belong to
        `state_dict`. A checkpoint keeps values and not their order in memory: make new parameters contiguous (a factor
        of an SVD is not), since sums of floats depend on it.
        """

    def penalty(self) -> Tensor | None:
        """A regulariser that is added to the training loss, and never to an evaluation."""
        return None

    def before_forward(self, step: Step) -> None:
        """Before a batch is drawn and put through the model."""

    def for_batch(self, step: Step) -> AbstractContextManager[None] | None:
        """For `with`, around forward and backward of the update's batch, all its micro batches at once: a scale or a
        mask that this batch alone sees. Afterwards the model is what it was, bit for bit. Evaluations, and batches that
        a hook puts through the model, run without. Draw random choices from `step.rng`."""
        return None

    def before_step(self, step: Step) -> None:
        """Gradients are there and not yet clipped: replace them here."""

    def after_step(self, step: Step) -> dict[str, Any]:
        """After the optimizer's step, gradients still there: rank allocation, Frank-Wolfe, truncation.

        Returns values for the run's history, which `Method.traces` declares: numbers, lists of them, or tensors without
        or with one dimension (which are fetched later, without a wait, as a number or a list).
        """
        return {}

    def finish(self, step: Step) -> None:
        """After the last update, before the evaluation: for methods that cut, merge or round what was trained."""

    def remarks(self) -> list[str]:
        """After the run: what its row of a table should say of how it went, a line each, the same for every seed."""
        return []

    def ranks(self) -> dict[str, int]:
        """Live rank of each adapted layer, by the layer's name in the backbone; {} where there is no rank."""
        return {}

    def adapter_parameters(self) -> int:
        """Parameters of the adapter in effect now, the head left out. By default those that train."""
        return sum(p.numel() for name, p in _trained(self.model) if not in_modules(name, self.head))

    def head_parameters(self) -> int:
        """Parameters of the task's head."""
        return sum(p.numel() for name, p in _trained(self.model) if in_modules(name, self.head))

    def head_bytes(self) -> int:
        """Bytes of the task's head as it is held."""
        return sum(p.nbytes for name, p in _trained(self.model) if in_modules(name, self.head))

    def other_parameters(self) -> int:
        """Parameters of the deployed model beside the adapter, the head's included. Asked after `start` and after
        `prepare`."""
        own = ((name, p) for name, p in self.model.named_parameters() if ".original_module." not in name)
        return sum(number_of(p) for name, p in own if not p.requires_grad or in_modules(name, self.head))

    def stored_bytes(self) -> int:
        """Bytes to keep of the run beside the shared backbone: those of adapter and head."""
        itemsize = max((p.element_size() for p in self.model.parameters()), default=4)
        return (self.adapter_parameters() + self.head_parameters()) * itemsize

    def optimizer_bytes(self) -> int:
        """Bytes of the tensors that the optimizer keeps between updates now, as moments. A method that keeps more for
        its optimization, as the bases of a projection, adds it."""
        from torch import Tensor

        values = (value for state in self.optimizer.state.values() for value in state.values())
        return sum(value.nbytes for value in values if isinstance(value, Tensor))

    def at_rank(self, rank: int) -> AbstractContextManager[None] | None:
        """For `with`: every layer's update cut to its `rank` most important components, of fewer to what it has, and
        afterwards as it was, bit for bit. None where the method has no such cut."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact resume needs, as nested dicts and lists of tensors and JSON values: trained
        parameters, buffers, optimizer, and what a subclass adds."""
        return {
            "trained": {name: p.detach() for name, p in _trained(self.model)},
            "buffers": dict(self.model.named_buffers()),
            "optimizer": self.optimizer.state_dict(),
            "stream": self.stream,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, on an adaptation that was started from the same spec. A method whose sizes
        change brings them to the saved ones first. Raises ValueError where a shape is another."""
        import torch

        with torch.no_grad():
            for source, own in (
                (state["trained"], dict(self.model.named_parameters())),
                (state["buffers"], dict(self.model.named_buffers())),
            ):
                for name, value in source.items():
                    if own[name].shape != value.shape:  # which `copy_` might broadcast
                        raise ValueError(f"'{name}' is {tuple(own[name].shape)}, and was saved as {tuple(value.shape)}")
                    own[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, values in self.optimizer.state.items():
            for name, value in values.items():  # torch's fused AdamW on a CPU pairs entries by their place in memory
                other_layout = isinstance(value, torch.Tensor) and value.stride() != parameter.stride()
                if other_layout and value.shape == parameter.shape:
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        self.stream = state["stream"]

    def export(self, path: Path) -> None:
        """Write what was trained into the folder `path`, as a stock PEFT adapter where the update is low-rank; here,
        for the other methods: the trained parameters under their names, `trained.safetensors`. Raises OSError where the
        folder cannot be written or the disk is full."""
        path.mkdir(parents=True, exist_ok=True)
        save_tensors(dict(_trained(self.model)), path / "trained.safetensors")


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
