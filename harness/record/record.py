"""RunRecord, the truth about one run."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from harness import storage
from harness.parameters import ParameterCount, Size, Strict
from harness.record.environment import Environment
from harness.spec import RunSpec
from harness.storage import Damaged

Status = Literal["done", "unsupported", "diverged", "out_of_memory", "failed"]
RETRIED: tuple[Status, ...] = ("failed", "out_of_memory")  # what --retry-failed runs again
SCHEMA, SEALED_FROM = 2, 2  # the version that is written, and the first that has checksums
STATUSES = get_args(Status)
RUN_ID = re.compile(r"[0-9a-f]{16}")
RECORD, HISTORY, PREDICTIONS = "record.json", "history.jsonl", "predictions.safetensors"  # of a run's folder
ADAPTER = "adapter"  # folder of the kept adapter; of one cut to rank 4, "adapter_rank_4"
FORGETTING = (
    "forgetting"  # losses on a text sample among the predictions: the trained model's, and as references those before
)
HOLDOUT = "holdout"  # the split that curves, tuning and selection use; never an evaluation split


def at(rank: int) -> str:
    """What names of the adapter cut to a rank end with: "adapter_rank_4", predictions as "validation/rank_4"."""
    return f"rank_{rank}"


class Seconds(Strict):
    """Wall-clock seconds of one run."""

    training: float = Field(
        0.0, ge=0, description="updates alone, to their end on the device: no loading, no evaluation"
    )
    evaluation: float = Field(0.0, ge=0, description="holdout and evaluation passes, a text sample, timed generation")
    total: float = Field(0.0, ge=0, description="everything")


class Forgetting(Strict):
    """Mean loss per token, in nats, on a fixed sample of text. Numbers of other windows are no match for it."""

    sample: str = Field(description="wikitext, or the file's name")
    fingerprint: str = Field(description="of the windows' token ids")
    windows: int = Field(ge=1)
    tokens: int = Field(ge=2, description="of a window")
    untouched: float = Field(ge=0, description="of the backbone before training, in the type that it is held in")
    trained: float = Field(ge=0, description="with the trained adapter")

    @property
    def rise(self) -> float:
        """What was forgotten; below 0 where the loss fell."""
        return self.trained - self.untouched


class Generation(Strict):
    """Seconds a generated token: of so many greedy tokens for each of some rows in one batch, with the reading of their
    prompts; a median. Both models generate as many, whatever they would say."""

    rows: int = Field(ge=1)
    tokens: int = Field(ge=1, description="generated for each row")
    untouched: float = Field(gt=0, description="seconds a token of the backbone before training")
    trained: float = Field(gt=0, description="with the trained adapter")


class RunRecord(Strict):
    """What one run gave. Tables, pictures and MLflow are views of these."""

    schema_version: Literal[1, 2] = 2
    run_id: str
    spec: RunSpec
    status: Status
    headline: str = Field(description="name of the metric that `score` is")
    higher_is_better: bool = Field(True, description="whether a higher score is the better one")
    score: float | None = Field(None, description="headline metric on the first evaluation split")
    metrics: dict[str, float] = Field({}, description="on the evaluation splits; a second split's carry its name")
    holdout: dict[str, float] = Field({}, description="on the holdout, at the end of training")
    rank_curve: dict[int, float] = Field(
        {}, description="rank -> headline metric on the first evaluation split, each layer cut to at most that rank"
    )
    forgetting: Forgetting | None = Field(None, description="None: not asked for, or no causal language model")
    generation: Generation | None = Field(
        None, description="None: a task that generates nothing, and in records of older versions"
    )
    parameters: ParameterCount | None = None
    ranks: dict[str, int] = Field({}, description="live rank per adapted layer at the end")
    shapes: dict[str, tuple[int, int]] = Field(
        {}, description="outputs and inputs of the same layers' weights, as matrices; {} in records of older versions"
    )
    trajectory: tuple[Size, ...] = Field(
        (), description="[batches used, adapter parameters, sum of the ranks] at the start and at every change"
    )
    batches: int = Field(0, ge=0, description="batches put through forward and backward: the budget's unit")
    updates: int = Field(0, ge=0, description="optimizer steps")
    rows: dict[str, int] = Field({}, description="rows per split, as used")
    data: dict[str, dict[str, Any]] = Field(
        {}, description="what the task says of each split: see harness.run.summary.facts_of and Task.facts"
    )
    seconds: Seconds = Seconds()
    tokens: int | None = Field(
        None,
        description="tokens of the batches put through the model in training, padding apart; None of a task without "
        "tokens, and in records of older versions",
    )
    peak_bytes: int | None = Field(None, description="peak memory of the run: resident on a CPU, allocated on a GPU")
    training_peak_bytes: int | None = Field(
        None, description="the same of training alone, evaluations apart; None in records of older versions"
    )
    training_reserved_bytes: int | None = Field(
        None, description="what torch's allocator held of the GPU in training, at most; None on a CPU"
    )
    optimizer_bytes: int | None = Field(
        None,
        description="the most that the optimizer kept between updates, as moments; looked at after the first update, "
        "then every ten and after the last one; None in records of older versions",
    )
    backbone_bytes: int | None = Field(
        None,
        ge=0,
        description="bytes of the backbone's parameters, head included, as they are held while the run trains",
        exclude_if=lambda value: value is None,
    )
    file_bytes: int | None = Field(
        None, description="of the kept adapter and head, their safetensors as they are on disk; None where none is kept"
    )
    environment: Environment
    started: str = Field(description="ISO 8601, UTC")
    notes: tuple[str, ...] = Field((), description="what a person should know of how the run went, a line each")
    error: str | None = Field(None, description="one line")
    traceback: str | None = None
    files: dict[str, str] = Field(
        {}, description="SHA-256 of each other file of the run, by its path in the run's folder"
    )

    @model_validator(mode="before")
    @classmethod
    def _content(cls, values: Any) -> Any:
        """A kept record has its checksum in it, which `parse` checks."""
        if isinstance(values, dict):
            return {name: value for name, value in values.items() if name != storage.CHECKSUM}
        return values

    @field_validator("started")
    @classmethod
    def _date(cls, started: str) -> str:
        datetime.fromisoformat(started)
        return started

    @classmethod
    def parse(cls, raw: bytes | str, what: str = "the record") -> RunRecord:
        """The record that a file holds; `what` is the file's name in messages.

        Raises Damaged where it does not hold together (its checksum, its fields, a run_id that is not its spec's), and
        Unreadable for one of a newer version.
        """
        content = storage.unseal(raw, SCHEMA, what, SEALED_FROM)
        try:
            record = cls.model_validate(content)
        except (ValidationError, RecursionError) as error:
            raise Damaged(f"{what}: {_first_line(error)}") from None
        check_identity(what, record.run_id, record.spec.run_id)
        return record

    def to_json(self) -> str:
        """The record as a file holds it, with its checksum."""
        return storage.sealed_text(self.model_dump(mode="json") | {storage.VERSION: SCHEMA})

    @property
    def may_do_better(self) -> bool:
        """Whether another attempt could end otherwise: a run that failed for its parent's sake fails without one."""
        return self.status == "failed" and self.traceback is not None

    def merit(self, score: float) -> float:
        """A value of the headline metric, turned so that more is better."""
        return score if self.higher_is_better else -score

    def result(self) -> dict[str, Any]:
        """The record without times and places: equal for equal runs."""
        return self.model_dump(
            mode="json",
            exclude={
                "seconds": True,
                "generation": True,
                "peak_bytes": True,
                "training_peak_bytes": True,
                "training_reserved_bytes": True,
                "file_bytes": True,
                "environment": True,
                "started": True,
                "notes": True,
                "files": True,
                "spec": {"place"},
            },
        )


def check_identity(what: str, run_id: str, expected: str) -> None:
    """A record belongs to the run that its folder and its spec name."""
    if run_id != expected:
        raise Damaged(f"{what}: run_id is {run_id}, but its folder or its spec gives {expected}")


def _first_line(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return "it is nested too deeply"
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
