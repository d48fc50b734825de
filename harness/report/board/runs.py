"""The runs of a report: each record with its place in the tables.

Runs of one `setting` share everything but method, seed and task; within it, runs with one `label` are one configuration
of a method, and runs with one `column` one task on one data set. Nothing else may stand together.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.notation import value_text
from harness.record.record import RunRecord
from harness.report.board.labels import Naming, columns_of, labels_of
from harness.report.redact import error_text, model_name
from harness.spec import NOT_SETTING, Limits, RunSpec, TrainSpec

VERSIONED = ("torch", "peft", "transformers")  # packages whose versions the tables tell apart in a note


@dataclass(frozen=True)
class Run:
    """A finished run as the tables see it. None: not known, or there is none."""

    record: RunRecord
    label: str  # of its row
    column: str  # title of its column
    setting: str  # 8 hexadecimal digits
    setting_text: str  # the setting in words
    metric: str  # what the score is
    score: float | None  # of a run that is done
    metrics: Mapping[str, float]  # of the score's split
    split: str | None  # the evaluation split of the score
    tuning: str  # "tuned K" after K trials, "default" where every hyperparameter is at its default, else "as given"
    search_batches: int | None  # of the search's trials together: 0 without one, None where a trial's record is gone
    search_seconds: float | None  # of training
    search_peak_bytes: int | None
    is_further: bool = False  # whether the split is not the first one, so that the task has a column before this one
    counts: bool = True  # in averages, mean ranks and the order of rows
    cut: int | None = None  # the rank that the adapter was cut to for the score; None: as it was trained

    @property
    def run_id(self) -> str:
        return self.record.run_id

    @property
    def spec(self) -> RunSpec:
        return self.record.spec

    @property
    def seed(self) -> int:
        return self.spec.seed

    @property
    def method(self) -> str:
        return self.spec.method

    @property
    def task(self) -> str:
        return self.spec.task

    @property
    def model(self) -> str | None:
        """A Hub id, or the last part of a folder."""
        return model_name(self.spec.place.model)

    @property
    def status(self) -> str:
        return self.record.status

    @property
    def error(self) -> str | None:
        return error_text(self.record)

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher score is the better one."""
        return self.record.higher_is_better

    @property
    def batches(self) -> int:
        return self.record.batches

    @property
    def seconds_training(self) -> float:
        return self.record.seconds.training

    @property
    def peak_bytes(self) -> int | None:
        return self.record.peak_bytes

    @property
    def training_peak_bytes(self) -> int | None:
        """Of training alone; None in records of older versions."""
        return self.record.training_peak_bytes

    @property
    def training_reserved_bytes(self) -> int | None:
        """What torch's allocator held of the GPU in training, at most; None on a CPU."""
        return self.record.training_reserved_bytes

    @property
    def file_bytes(self) -> int | None:
        """Of the kept adapter and head on disk; None where none is kept."""
        return self.record.file_bytes

    @property
    def tokens_a_second(self) -> float | None:
        """Of training, padding apart; None where they were not counted."""
        tokens, seconds = self.record.tokens, self.seconds_training
        return tokens / seconds if tokens is not None and seconds else None

    @property
    def seconds_a_generated_token(self) -> float | None:
        """Of the trained model, see `Generation`; None where nothing is generated."""
        return None if self.record.generation is None else self.record.generation.trained

    @property
    def generation_to_backbone(self) -> float | None:
        """The same over that of the untouched backbone in the same run."""
        found = self.record.generation
        return None if found is None else found.trained / found.untouched

    @property
    def forgetting(self) -> float | None:
        """Rise of the loss per token on a text sample, in nats; None where it was not measured."""
        return None if self.record.forgetting is None else self.record.forgetting.rise

    @property
    def backbone_bytes(self) -> int | None:
        """Of the backbone's parameters as they are held, head included; None in records of older versions."""
        return self.record.backbone_bytes

    @property
    def optimizer_bytes(self) -> int | None:
        """The most that the optimizer kept between updates; None in records of older versions."""
        return self.record.optimizer_bytes

    @property
    def parameters_initial(self) -> int | None:
        """Of the adapter, at the start."""
        return self._count("adapter_initial")

    @property
    def parameters_peak(self) -> int | None:
        """Of the adapter, at most."""
        return self._count("adapter_peak")

    @property
    def parameters_final(self) -> int | None:
        """Of the adapter, after training."""
        return self._count("adapter_final")

    @property
    def head(self) -> int | None:
        """Parameters of the head."""
        return self._count("head")

    @property
    def stored_bytes(self) -> int | None:
        return self._count("stored_bytes")

    def _count(self, name: str) -> int | None:
        return getattr(self.record.parameters, name, None)

    @functools.cached_property
    def rank(self) -> float | None:
        """Mean live rank over the adapted layers."""
        ranks = self.record.ranks
        return sum(ranks.values()) / len(ranks) if ranks else None

    @property
    def versions(self) -> str:
        """Of the packages that results depend on."""
        packages = self.record.environment.packages
        named = [f"{name} {packages[name]}" for name in VERSIONED if name in packages]
        return ", ".join([f"harness {self.record.environment.harness}", *named])


def runs_of(records: Iterable[RunRecord], naming: Naming | None = None) -> list[Run]:
    """One for each run_id (of a run given twice, the last); trials of a search have none of their own.

    `naming`: see `labels_of`.
    """
    every = {record.run_id: record for record in records}
    unique = {run_id: record for run_id, record in every.items() if not record.spec.is_trial}
    labels, columns = labels_of(unique.values(), naming), columns_of(every.values())
    settings: dict[tuple[Any, ...], tuple[str, str]] = {}  # worked out once each: thousands of runs share a few
    defaults: dict[tuple[str, str], bool] = {}
    runs = []
    for run_id, record in unique.items():
        spec = record.spec
        setting = tuple(getattr(spec, name) for name in RunSpec.model_fields if name not in NOT_SETTING)
        if setting not in settings:
            settings[setting] = spec.setting_key, _setting_text(spec)
        method = spec.method, json.dumps(spec.method_parameters, sort_keys=True)
        if method not in defaults:
            named = (naming or {}).get(spec.method)
            defaults[method] = named is not None and not named(spec.method_parameters)
        runs.append(
            Run(
                record,
                labels[run_id],
                columns[run_id],
                *settings[setting],
                record.headline,
                record.score if record.status == "done" else None,
                record.metrics,
                next(iter(_splits(record)), None),
                _tuning(spec, defaults[method]),
                **_search_cost(spec, every),
            )
        )
    return runs


def every_split(runs: Sequence[Run], counted: Mapping[str, str] | None = None) -> list[Run]:
    """The runs, and each once more for every further evaluation split of its task, in a column of that split's own.

    A task counts once in averages and in the order of rows: by its first split, or by the one that `counted` names for
    it ({"glue/mnli": "validation_mismatched"}).
    """
    splits: dict[str, list[str]] = {}  # of a run that failed early nothing is known but by the others of its column
    for run in runs:
        splits[run.column] = max(splits.get(run.column, []), _splits(run.record), key=len)
    return [
        each for run in runs for each in _by_split(run, splits[run.column], (counted or {}).get(run.task, run.split))
    ]


def _by_split(run: Run, splits: Sequence[str], counted: str | None) -> list[Run]:
    prefixes = {name: f"{name}_" for name in splits[1:]}  # of the metrics of further splits
    own = {name: value for name, value in run.metrics.items() if not name.startswith(tuple(prefixes.values()))}
    found = [dataclasses.replace(run, metrics=own, counts=counted not in prefixes)]
    for split, prefix in prefixes.items():
        metrics = {name.removeprefix(prefix): value for name, value in run.metrics.items() if name.startswith(prefix)}
        further = dataclasses.replace(
            run,
            column=f"{run.column}, {split}",
            split=split,
            metrics=metrics,
            score=None if run.score is None else metrics.get(run.metric),
            is_further=True,
            counts=counted == split,
        )
        found.append(further)
    return found


def _splits(record: RunRecord) -> list[str]:
    """The evaluation splits, the score's first."""
    return [name for name in record.rows if name not in ("train", "holdout")]


def _tuning(spec: RunSpec, is_default: bool) -> str:
    """How the hyperparameters came about."""
    if spec.search is not None:
        return f"tuned {len(spec.search.trials)}"
    return "default" if is_default else "as given"


def _search_cost(spec: RunSpec, every: Mapping[str, RunRecord]) -> dict[str, Any]:
    """What the trials took by which a run's setting was chosen."""
    trials = [every.get(run_id) for run_id in (spec.search.trials if spec.search else ())]
    known = [trial for trial in trials if trial is not None]
    names = ("search_batches", "search_seconds", "search_peak_bytes")
    if len(known) < len(trials):
        return dict.fromkeys(names)
    seconds = math.fsum(trial.seconds.training for trial in known)
    peak = max((trial.peak_bytes or 0 for trial in known), default=0)
    return dict(zip(names, (sum(trial.batches for trial in known), seconds, peak), strict=True))


def _setting_text(spec: RunSpec) -> str:
    """The setting in words, the model left out; every value that is not a default is named."""
    train, threads = spec.train, spec.threads
    words = [
        f"{train.batches} batches" if train.batches is not None else f"{train.epochs:g} epochs",
        f"batch size {train.batch_size}",
        _limits_text(spec.limits),
        "1 thread" if threads == 1 else f"{threads} threads",
    ]
    for name, field in TrainSpec.model_fields.items():
        value = getattr(train, name)
        if name not in ("batches", "epochs", "batch_size") and value != field.default:
            words.append(f"{name} {value_text(value)}")
    known = {"limit", "evaluation_limit", "threads", "train", "model_fingerprint"}
    words += [f"{name} {value_text(value)}" for name, value in spec.setting.items() if name not in known]
    return ", ".join(words)


def _limits_text(limits: Limits) -> str:
    if limits.evaluation is None:
        return "all rows" if limits.train is None else f"at most {limits.train} rows of each split"
    training = "all training rows" if limits.train is None else f"at most {limits.train} training rows"
    return f"{training}, at most {limits.evaluation} rows of each evaluation split"
