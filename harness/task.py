"""The task interface: what a plugin author implements to have methods compared on a problem.

A `Task` is its parameters; it gives the data, the backbone, the loss and the metrics, and knows no method. To add
one, write a file with a final subclass and name it in the entry-point group `harness.tasks`. Import torch and other
heavy packages inside functions, so that `python -m harness list` stays fast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from harness.errors import Diverged, InputError
from harness.metric import ACCURACY, Metric, declared
from harness.parameters import Strict

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from harness.method import Backbone


class Batch(NamedTuple):
    """`inputs` go into the model as keyword arguments; `labels` (one row an example) never do."""

    inputs: dict[str, Tensor]
    labels: Tensor

    @property
    def tokens(self) -> int | None:
        """Tokens that the model reads, padding apart, by the names that transformers has for them; None where the
        inputs are none."""
        if "input_ids" not in self.inputs:
            return None
        mask = self.inputs.get("attention_mask")
        return self.inputs["input_ids"].numel() if mask is None else int(mask.count_nonzero())


@dataclass(frozen=True)
class Examples:
    """Rows of one split, as columns of equal length. `labels` holds int64 classes or float64 targets.

    `groups` holds a value per row; rows that share one (a movie, a premise) are never parted between the training
    split and the holdout. None: every row stands alone. `left_out` names what the source has and the rows lack, since
    it could not be read. `notes`: what a person should know of how the rows were read, a line each.
    """

    columns: Mapping[str, Sequence[Any] | np.ndarray]
    labels: np.ndarray
    groups: np.ndarray | None = None
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: np.ndarray) -> Examples:
        """The given rows, in the given order."""
        import numpy as np

        columns = {
            name: values[rows] if isinstance(values, np.ndarray) else [values[row] for row in rows]
            for name, values in self.columns.items()
        }
        groups = None if self.groups is None else self.groups[rows]
        return Examples(columns, self.labels[rows], groups, self.left_out, self.notes)


@dataclass(frozen=True)
class Splits:
    """A task's data. The holdout is cut from the training rows, the same for every method and seed; tuning,
    selection and curves use it. `evaluation` is read once, at the end of a run; its first entry gives the score."""

    train: Examples
    holdout: Examples
    evaluation: dict[str, Examples]
    fingerprint: str

    @property
    def by_name(self) -> dict[str, Examples]:
        """All of them: "train", "holdout", then the evaluation splits."""
        return {"train": self.train, "holdout": self.holdout, **self.evaluation}


class Task(Strict, ABC):
    """A problem: data, backbone, loss and metrics. The first line of a subclass's docstring is what `list` shows.

    A task family ("glue") lists its `members`; each is a task of its own ("glue/cola"), and the family's name
    stands for all of them. A task on the user's own data has a field `path` and is called with it ("text:PATH").
    """

    version: ClassVar[int] = 1  # raise it when the task's data or scores change, so that its runs are made again
    members: ClassVar[tuple[str, ...]] = ()
    default_model: ClassVar[str | None] = None  # None: the task builds its own model and takes no --model
    capabilities: ClassVar[tuple[str, ...]] = ()  # words for `list`: "text", "image", "regression"
    measures: ClassVar[tuple[Metric, ...]] = ()  # its metrics, beside the common ones of harness.metric
    stratified: ClassVar[bool] = False  # whether the holdout has each class in its proportion

    @property
    def headline(self) -> str:
        """The metric that is the run's score; here: the first of `measures`."""
        return self.measures[0].name

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics of a split, the headline first."""
        return (self.headline,)

    @property
    def higher_is_better(self) -> bool:
        """The sense of the headline, as its metric has it."""
        metric = declared(self.headline, self.measures)
        return metric is None or metric.higher_is_better

    @property
    def reported(self) -> tuple[Metric, ...]:
        """The metrics of `metric_names`, of those that are declared."""
        found = (declared(name, self.measures) for name in self.metric_names)
        return tuple(metric for metric in found if metric is not None)

    def references(self, examples: Examples) -> dict[str, int] | tuple[float, float] | None:
        """What is said of a split's references, and checked: rows by class, in the order of the classes, 0 for one that
        the split lacks; or the lowest and the highest value; None where they are neither."""
        return None

    @abstractmethod
    def load(self, data_root: str | None) -> tuple[Examples, dict[str, Examples]]:
        """(training rows, evaluation splits), read from `data_root` (a folder in the Hub's layout) if the task's
        data is there, else from the task's own source.

        Raises InputError for a missing folder or column, a label out of range or an empty split.
        """

    def test(self, data_root: str | None) -> dict[str, Examples]:
        """The splits whose labels are kept from the public (their labels here mean nothing), by name; predictions for
        them go into a benchmark's submission. {} where there are none. Raises InputError as `load` does."""
        return {}

    @classmethod
    def submission(cls, predictions: Mapping[str, Mapping[str, np.ndarray]]) -> tuple[dict[str, str], list[str]]:
        """The files of the benchmark's official submission, content by name, from predictions by task and test split,
        and what is to be said of them, a line each.

        Raises InputError where the benchmark has none, or the predictions do not fit it.
        """
        raise InputError(f"{cls.__name__} has no official submission")

    @classmethod
    def average(cls, metrics: Mapping[str, Mapping[str, float]]) -> float | None:
        """A family's one number, from the metrics of its members by name ("cola"); None where the family has no such
        number or a member is missing."""
        return None

    def model_name(self, model: str | None) -> str:
        """The model, or else the task's default. Raises InputError where there is neither."""
        name = model or self.default_model
        if name is None:
            raise InputError(f"{type(self).__name__} has no default model; give --model a folder or a Hub id")
        return name

    def model_fingerprint(self, model: str | None, *, trust_remote_code: bool = False) -> str:
        """Content hash of the pretrained model (weights, configuration, tokenizer, trusted code); raises InputError
        where there is none. Here: of nothing, for a task that builds its own model."""
        return "built-in"

    def model_notes(self, model: str | None) -> list[str]:
        """What is to be said of the pretrained model before anything runs, a line each. Raises InputError where it
        cannot serve."""
        return []

    @abstractmethod
    def backbone(self, model: str | None, *, meta: bool = False, trust_remote_code: bool = False) -> Backbone:
        """The model with a new head. torch's global generator is seeded with the run's seed, so that every method
        starts from the same head. `meta`: shapes only, on the meta device, no weights read."""

    def encode(self, examples: Examples, model: str | None) -> Any:
        """Whatever `collate` reads, made once per split and model (token ids, decoded images)."""
        return examples

    def lengths(self, encoded: Any) -> np.ndarray | None:
        """(rows,) what each row costs, where rows differ: an evaluation then puts similar ones into one batch."""
        return None

    def facts(self, encoded: Any) -> dict[str, Any]:
        """What should be said of an encoded split in the record and before the runs, as JSON values: the share of texts
        cut. What can be said without encoding are its `references` and the notes of its Examples."""
        return {}

    @abstractmethod
    def collate(self, encoded: Any, rows: Sequence[int], generator: torch.Generator | None) -> Batch:
        """The batch of these rows, on the CPU. `generator` is keyed by seed and batch, the same for every method:
        augmentation and noise come from it. None in evaluations: no augmentation."""

    def set_training(self, model: nn.Module) -> None:
        """Put the model in training mode."""
        model.train()

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator | None) -> Tensor:
        """Mean loss over the batch, a scalar."""

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """One prediction per example (classes or values), first dimension the batch's. Rows may be of another width in
        each batch: they are filled up with -1."""

    def gold(self, examples: Examples, encoded: Any) -> np.ndarray:
        """What the predictions of a split are compared with, first dimension the rows; here: the labels. `examples` may
        have lost its columns."""
        return examples.labels

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """What the model says of each row, (rows, ...), which must not depend on the rows beside it: before the first
        run it is compared with what it says of the row alone. None where rows of a batch are all of one size."""
        return None

    @property
    def longest_answer(self) -> int:
        """Most tokens that `predict` generates for a row, in `generate`'s way; 0: none."""
        return 0

    def generate(self, model: nn.Module, batch: Batch, tokens: int) -> None:
        """Generate exactly so many tokens for each row of an evaluation's batch, to see what it costs."""
        raise NotImplementedError(f"{type(self).__name__} generates no tokens")

    def text_windows(
        self, sample: str, count: int, module: nn.Module, model: str | None, data_root: str | None
    ) -> np.ndarray | None:
        """(windows, tokens) token ids of the first `count` windows of a text: "wikitext", or a file's path. `module`:
        the model, which may be on the meta device. None where the task has no causal language model. Raises InputError
        for a text that cannot be read, or is shorter than one window."""
        return None

    def window_losses(self, model: nn.Module, ids: Tensor) -> Tensor:
        """(windows,) mean loss in nats of each window's tokens after the first; `ids`: some of `text_windows`."""
        raise NotImplementedError(f"{type(self).__name__} has no text windows")

    def metrics(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        """Every metric of one split, of what `predict` and `gold` give; `headline` among them. Here: the values of
        those that are declared."""
        return {metric.name: float(metric.value(predictions, references)) for metric in self.reported}

    def artifacts(self, model: nn.Module, source: str | None, folder: Path) -> None:
        """Write what is worth a look (pictures, generated text) into `folder`, which is made by whoever writes.

        Called twice in a run, with the backbone before a method has touched it and with the trained model; the files
        are kept with the run, below artifacts/before and artifacts/after. `source` is the model as `backbone` took it.
        torch's global generator may be drawn from, and the model be left in evaluation mode.
        """


class Classification(Task):
    """Abstract base of tasks whose model returns `logits`: cross-entropy, the most probable class, accuracy."""

    measures: ClassVar[tuple[Metric, ...]] = (ACCURACY,)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes in the order of their numbers; () where they have no names."""
        return ()

    def references(self, examples: Examples) -> dict[str, int] | tuple[float, float] | None:
        import numpy as np

        labels = examples.labels
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
            return None
        counts = np.bincount(labels, minlength=len(self.class_names)).tolist()
        return dict(zip(self.class_names or map(str, range(len(counts))), counts, strict=False))

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator | None) -> Tensor:
        from torch.nn.functional import cross_entropy

        return cross_entropy(model(**batch.inputs).logits.float(), batch.labels)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(**batch.inputs).logits
        if not logits.isfinite().all():  # argmax would make a class of it
            raise Diverged("a prediction is not finite")
        return logits.argmax(-1)
