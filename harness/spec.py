"""What one run is: RunSpec, and the training settings in it. Everything here is frozen and strict."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from harness.parameters import Strict

MOST = 1_000_000_000  # batches, rows, examples of a batch
NOT_SETTING = {"method", "method_version", "method_parameters", "task", "task_version", "task_parameters"}
NOT_SETTING |= {"data_fingerprint", "seed", "place", "search", "parents"}  # what may differ within one table


class TrainSpec(Strict):
    """The training settings that every method of a comparison shares.

    The budget's unit is one batch through forward and backward, whoever asks for it: a bilevel method's
    upper-level batches count like any other. Learning rate and weight decay belong to the method.
    """

    batches: int | None = Field(None, ge=1, le=MOST, description="budget in batches; give this or epochs")
    epochs: float | None = Field(None, gt=0, le=1e6, description="budget in passes over the training split (default 3)")
    batch_size: int = Field(32, ge=1, le=MOST, description="examples in a batch")
    micro_batches: int = Field(
        1, ge=1, le=MOST, description="pieces a batch is cut into to save memory (gradient accumulation)"
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="learning-rate decay after the warm-up: linear or cosine to 0, or constant"
    )
    warmup: float = Field(0.06, ge=0, lt=1, description="share of the budget over which the learning rate rises")
    clip_norm: float = Field(1.0, ge=0, description="largest gradient norm; 0 turns clipping off")
    group_by_length: bool = Field(False, description="put examples of similar length into one batch: less padding")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast; parameters stay in fp32")
    holdout_points: int = Field(
        1, ge=0, le=100_000, description="times the holdout is scored, evenly spaced, the last at the end"
    )

    @model_validator(mode="after")
    def _one_budget(self) -> TrainSpec:
        if self.batches is not None and self.epochs is not None:
            raise ValueError(f"batches = {self.batches} and epochs = {self.epochs} are both set; give one of them")
        if self.batches is None and self.epochs is None:
            object.__setattr__(self, "epochs", 3.0)
        if self.micro_batches > self.batch_size:
            raise ValueError(f"micro_batches = {self.micro_batches} is above batch_size = {self.batch_size}")
        return self

    def budget(self, num_examples: int) -> int:
        """The run's budget in batches, for a training split of `num_examples` rows."""
        if self.batches is not None:
            return self.batches
        assert self.epochs is not None
        return max(1, math.ceil(self.epochs * num_examples / self.batch_size))


class Place(Strict):
    """Where and how a run is carried out. Nothing here is part of a run's identity."""

    data_root: str | None = Field(None, description="folder in the Hub's layout, tried before the Hub")
    model: str | None = Field(None, description="model folder or Hub id; its content is in the identity, not its path")
    path: str | None = Field(None, description="the user's own data, of a task that is called with a path")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    trust_remote_code: bool = Field(False, description="let transformers run code that comes with a Hub model")
    evaluation_batch_size: int | None = Field(
        None, ge=1, le=MOST, description="examples in a batch of an evaluation; unset: twice the training's batch size"
    )
    gradient_checkpointing: bool = Field(
        False, description="keep the activations of no block, and compute them again: less memory, the same losses"
    )
    checkpoint_every: int = Field(
        0, ge=0, le=MOST, description="batches between whole-state checkpoints; 0 writes none"
    )
    save_adapter: bool = Field(False, description="keep the trained adapter and head in the run's folder")
    predict_test: bool = Field(False, description="keep predictions for unlabelled test splits, for a submission")
    rank_curve: tuple[Annotated[int, Field(ge=1, le=MOST)], ...] = Field(
        (), max_length=1000, description="score the trained adapter cut to these ranks as well: 1,2,4,8"
    )
    forgetting: str | None = Field(
        None,
        min_length=1,
        description="text on which a causal language model's loss is measured before and after training: a text file, "
        "or wikitext",
    )
    forgetting_windows: int = Field(
        64, ge=1, le=MOST, description="windows of 256 tokens that are taken of it; the number is part of the result"
    )


class Execution(Strict):
    """How the runs of a sweep are carried out. Nothing here changes a record, but for times and places."""

    executor: Literal["ray", "serial"] = Field("ray", description="Ray Tune's workers, or one run after the other")
    gpus_per_run: float | None = Field(
        None, ge=0, description="GPUs of each run, or a share of one: 0.5; unset: 1 where there are any, else 0"
    )
    address: str | None = Field(
        None, min_length=1, description="Ray cluster to join, auto or HOST:PORT; unset: this machine"
    )
    max_retries: int = Field(
        2, ge=0, le=1000, description="times that a failed run is resumed before it counts as failed"
    )
    run_timeout: float | None = Field(None, gt=0, le=1e8, description="seconds after which a run counts as hanging")
    show_logs: bool = Field(False, description="show the logs of Ray and of its workers")

    @model_validator(mode="after")
    def _fits_together(self) -> Execution:
        changed = [name for name in ("gpus_per_run", "address", "run_timeout") if getattr(self, name) is not None]
        if self.executor == "serial" and changed:
            option = f"--{changed[0].replace('_', '-')}"
            raise ValueError(f"{option} = {getattr(self, changed[0])} needs --executor ray")
        if self.gpus_per_run is not None and self.gpus_per_run > 1:
            raise ValueError(
                f"--gpus-per-run = {self.gpus_per_run:g} is not allowed: a run uses one GPU or a share of it"
            )
        return self


Pattern = Annotated[str, Field(min_length=1, max_length=1000)]


class Selection(Strict):
    """Which rows and columns a report shows, and how. Changes no record and no figure."""

    rows: tuple[Pattern, ...] = Field(
        (), description='only these rows, in this order: "lora[rank=4]", with * and ? for any signs: "debora*"'
    )
    columns: tuple[Pattern, ...] = Field(
        (), description="only these columns, in this order: tasks, a further split as glue/mnli:mismatched, parameters"
    )
    group: dict[Pattern, Pattern] = Field(
        {}, description='rows under a heading of their own: "controls" = "ranks_of|size_of" (patterns or parameters)'
    )
    baseline: Pattern | None = Field(None, description="a row of the table: a further one has all differences to it")


EVERYTHING = Selection()


class Limits(NamedTuple):
    """Most rows that a run takes of its data. None: all; for `evaluation`, as many as `train` says."""

    train: int | None = None  # the holdout is cut from these
    evaluation: int | None = None  # of each evaluation split


class Search(Strict):
    """What a run has to do with a search for hyperparameters. A trial is scored on the holdout and never sees the
    evaluation splits; a run of the chosen setting names the trials that it was chosen by."""

    role: Literal["trial", "chosen"]
    parameters: tuple[str, ...] = Field(description="hyperparameters that are searched over")
    trials: tuple[str, ...] = Field((), description="run_ids of the trials, of a chosen setting")


class RunSpec(Strict):
    """One cell of a comparison: one method on one task with one seed.

    `method_parameters` and `task_parameters` hold every parameter, defaults filled in, so that a changed
    default is a different run. (A parameter younger than the first records may leave itself out where it is off, by
    pydantic's `exclude_if`: their run_ids then stay.) The two fingerprints are content hashes of the data and of the
    model.
    """

    method: str
    method_version: int
    method_parameters: dict[str, Any]
    task: str
    task_version: int
    task_parameters: dict[str, Any]
    data_fingerprint: str
    model_fingerprint: str
    limit: int | None = Field(None, ge=2, le=MOST)
    evaluation_limit: int | None = Field(
        None,
        ge=2,
        le=MOST,
        description="as Limits has it",
        exclude_if=lambda value: value is None,  # younger than the first records: without it, their run_ids stay
    )
    seed: int = Field(ge=0)
    threads: int = Field(1, ge=1, description="CPU threads: results are bit-identical only at the same number")
    train: TrainSpec = TrainSpec()
    search: Search | None = Field(None, description="None: the hyperparameters are the user's, or the defaults")
    parents: dict[str, str] = Field(
        {},
        description="run_ids of the runs that it takes ranks or sizes from, by the method's parameter that names them",
        exclude_if=lambda value: not value,  # younger than the first records: without it, their run_ids stay
    )
    place: Place = Place()

    @property
    def limits(self) -> Limits:
        """How many rows of the data the run may take."""
        return Limits(self.limit, self.evaluation_limit)

    @property
    def is_trial(self) -> bool:
        """Whether the run is one of a search's."""
        return self.search is not None and self.search.role == "trial"

    @property
    def setting(self) -> dict[str, Any]:
        """What the runs of one table share, as JSON has it: all but method, task, seed, search, parents and place."""
        return self.model_dump(mode="json", exclude=NOT_SETTING)

    @property
    def setting_key(self) -> str:
        """8 hexadecimal digits of the SHA-256 of `setting`."""
        return hashlib.sha256(json.dumps(self.setting, sort_keys=True).encode()).hexdigest()[:8]

    @functools.cached_property
    def run_id(self) -> str:
        """16 hexadecimal digits: SHA-256 of all above but `place`, of `search` and `parents` where there are any."""
        return identity_hash(self.model_dump(mode="json"))

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """The spec with some fields changed: another run."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("run_id", None)
        return copied


def identity_hash(spec: dict[str, Any]) -> str:
    """The run_id that a spec has, from its JSON."""
    identity = {name: value for name, value in spec.items() if name != "place" and (name != "search" or value)}
    if not identity["train"].get("group_by_length"):  # younger than the first records: at its default their ids stay
        identity["train"] = {name: value for name, value in identity["train"].items() if name != "group_by_length"}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
