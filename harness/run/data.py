"""A task's data as its runs use it: loaded and encoded once a process, or once a machine."""

from __future__ import annotations

from typing import Any, NamedTuple

from harness.errors import InputError
from harness.run import summary
from harness.spec import Limits
from harness.splits import make_splits
from harness.task import Examples, Splits, Task

KEPT = 16  # tasks whose data stays in the process


class Key(NamedTuple):
    """What the rows and their encoding depend on."""

    task: str
    parameters: str
    data_root: str | None
    limits: Limits
    model: str | None


class Data:
    """The splits of one task and what its `encode` makes of each, made when it is first asked for."""

    def __init__(self, task: Task, splits: Splits, model: str | None) -> None:
        self.splits = splits
        self._task = task
        self._model = model
        self._encoded: dict[str, Any] = {}
        self._facts: dict[str, dict[str, Any]] = {}

    def encoded(self, split: str) -> Any:
        """What `Task.collate` reads for "train", "holdout" or an evaluation split."""
        if split not in self._encoded:
            self._encoded[split] = self._task.encode(self._examples[split], self._model)
        return self._encoded[split]

    def facts(self, split: str) -> dict[str, Any]:
        """What a record has of a split, and what is printed before the runs: see `summary.facts_of`."""
        if split not in self._facts:
            told = type(self._task).facts is not Task.facts  # else there is no need to encode
            try:
                of_encoded = self._task.facts(self.encoded(split)) if told else {}
            except InputError as error:  # a dry run needs no tokenizer; a run tells
                of_encoded = {"notes": [f"how many texts are cut is not known: {error}"]}
            found = summary.facts_of(self._task, self.splits, split)
            notes = [*found.get("notes", ()), *of_encoded.get("notes", ())]
            self._facts[split] = found | of_encoded | ({"notes": notes} if notes else {})
        return self._facts[split]

    def summary(self, name: str) -> list[str]:
        """What is printed of the task before its runs: see `summary.lines`."""
        return summary.lines(name, self._task, self.splits, {split: self.facts(split) for split in self._examples})

    def without_texts(self) -> Data:
        """The same with every split encoded and the rows' own columns left out: what other processes need."""
        whole = Data(self._task, self.splits, self._model)
        whole._encoded = {split: self.encoded(split) for split in self._examples}
        whole._facts = {split: self.facts(split) for split in self._examples}
        bare = {split: Examples({}, rows.labels, rows.groups) for split, rows in self._examples.items()}
        train, holdout = bare.pop("train"), bare.pop("holdout")
        whole.splits = Splits(train, holdout, bare, self.splits.fingerprint)
        return whole

    @property
    def _examples(self) -> dict[str, Examples]:
        return self.splits.by_name


_KEPT: dict[Key, Data] = {}


def key_of(task: Task, data_root: str | None, limits: Limits, model: str | None) -> Key:
    """The key of a task's data; hashable, and the same in every process."""
    return Key(f"{type(task).__module__}.{type(task).__qualname__}", task.model_dump_json(), data_root, limits, model)


def data_of(task: Task, data_root: str | None, limits: Limits, model: str | None) -> Data:
    """The task's data, loaded at the first call of the process. Raises InputError as `make_splits` does."""
    key = key_of(task, data_root, limits, model)
    if key not in _KEPT:
        keep(key, Data(task, make_splits(task, data_root, limits), model))
    return _KEPT[key]


def is_kept(key: Key) -> bool:
    """Whether the data is in this process."""
    return key in _KEPT


def keep(key: Key, data: Data) -> None:
    """Have `data_of` give this data from now on; the oldest goes where there is too much."""
    while len(_KEPT) >= KEPT:
        _KEPT.pop(next(iter(_KEPT)))
    _KEPT[key] = data
