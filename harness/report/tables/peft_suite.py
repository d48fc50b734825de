"""Results of PEFT's own method comparison, read from its files: reported elsewhere, one run each, never beside ours.

The schema is that of `method_comparison/MetaMathQA/results` in huggingface/peft: a JSON file an experiment.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from harness.errors import InputError, one_line
from harness.report.tables.table import Entry, Table
from harness.report.wording import NOTHING, human, score_text

SUITE = "PEFT's method_comparison/MetaMathQA"
TITLE = "Reported elsewhere: PEFT's method comparison"
OF_THE_EXPERIMENT = {"optimizer_type", "optimizer_kwargs", "autocast_adapter_dtype", "init_kv_cache_prefix"}
LARGEST_FILE, LARGEST_NUMBER = 50_000_000, 1e18  # bytes; in size
KINDS: dict[str, tuple[type, ...]] = {
    "a text": (str,),
    "a number": (int, float),
    "an object": (dict,),
    "an object or null": (dict, type(None)),
    "a list of objects": (list,),
}
HEADINGS = (
    ("experiment", ""),
    ("PEFT type", ""),
    ("test accuracy", "GSM8K"),
    ("forgetting", "nats a token"),
    ("parameters", "trainable, at the start"),
    ("stored", "bytes"),
    ("seconds", ""),
    ("memory", "reserved, peak"),
    ("learning rate", ""),
)


class Published(NamedTuple):
    """One file of the suite: one experiment, run once. None: not in the file, or there is none."""

    file: str
    experiment: str
    peft_type: str | None  # of full fine-tuning None
    status: str  # "success", or why there is no score
    created_at: str
    peft_version: str | None
    accelerator: str
    model: str
    settings: dict[str, Any]  # of training, without what is the experiment's own
    seed: int
    optimizer: str | None
    learning_rate: float | None
    test_accuracy: float | None
    forgetting: float | None  # mean loss per token on a sample of Wikipedia, after training less before
    parameters: float  # trainable ones, counted before training
    stored_bytes: float
    seconds: float  # training and the evaluation on the test set
    memory_bytes: float

    @property
    def setting(self) -> str:
        """8 hexadecimal digits: what the rows of one table share."""
        shared = json.dumps([self.settings, self.accelerator], sort_keys=True)
        return hashlib.sha256(shared.encode()).hexdigest()[:8]


def read(folder: Path) -> list[Published]:
    """Every result below `folder`, by file name. Raises InputError for a folder without any, and for a file of another
    schema: it names the file, the key and what is expected there."""
    if not folder.is_dir():
        raise InputError(f"'{folder}' is not a folder: give the one with the result files (*.json) of {SUITE}")
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".json" and path.is_file())
        if not paths:
            raise InputError(f"no *.json in '{folder}': give the folder results of {SUITE}")
        return [_published(path) for path in paths]
    except OSError as error:
        raise InputError(f"'{error.filename or folder}' cannot be read ({error.strerror or error})") from None


def tables(found: Iterable[Published]) -> list[Table]:
    """A table for each setting, the best accuracy first, which marks nothing: one run is no evidence."""
    by_setting: dict[str, list[Published]] = defaultdict(list)
    for each in found:
        by_setting[each.setting].append(each)
    ordered = sorted(by_setting.items(), key=lambda item: (-len(item[1]), item[0]))
    return [_table(key, sorted(rows, key=_order)) for key, rows in ordered]


def frame(found: Sequence[Published]) -> pd.DataFrame:
    """A row for each file, numbers unrounded; `reported_by` says in every row that nothing here was measured by us."""
    rows = [
        {"reported_by": SUITE, "setting": each.setting, "runs": 1, **each._asdict(), "settings": _json(each.settings)}
        for each in sorted(found, key=lambda each: (each.setting, *_order(each)))
    ]
    return pd.DataFrame(rows, dtype=object)


def _order(each: Published) -> tuple[bool, float, str]:
    return each.test_accuracy is None, -(each.test_accuracy or 0), each.experiment


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


def _published(path: Path) -> Published:
    get = _Reader(path)
    train = get("run_info.train_config", "an object")
    rate = get("run_info.train_config.optimizer_kwargs", "an object").get("lr")
    status, config = get.text("train_info.status"), get("run_info.peft_config", "an object or null")
    last = get.last("train_info.metrics", "test accuracy" if status == "success" else None)
    version = get("meta_info.package_info", "an object").get("peft-version")
    return Published(
        file=one_line(path.name),
        experiment=get.text("run_info.experiment_name"),
        peft_type=None if config is None else get.text("run_info.peft_config.peft_type"),
        status=status,
        created_at=get.text("run_info.created_at"),
        peft_version=None if version is None else one_line(str(version)),
        accelerator=get.text("meta_info.system_info.accelerator"),
        model=get.text("run_info.train_config.model_id"),
        settings={name: value for name, value in train.items() if name not in {*OF_THE_EXPERIMENT, "seed"}},
        seed=int(get.number("run_info.train_config.seed")),
        optimizer=None if train.get("optimizer_type") is None else one_line(str(train["optimizer_type"])),
        learning_rate=rate if _is_number(rate) else None,
        test_accuracy=last.get("test accuracy"),
        forgetting=last.get("forgetting"),
        parameters=get.number("train_info.num_trainable_params"),
        stored_bytes=get.number("train_info.file_size"),
        seconds=get.number("train_info.train_time"),
        memory_bytes=get.number("train_info.accelerator_memory_max"),
    )


class _Reader:
    """The values of one file by their keys, "run_info.experiment_name". Raises InputError where one is not there, or
    is not what is expected."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            raw = path.read_bytes() if path.stat().st_size <= LARGEST_FILE else b""
            self._content = json.loads(raw)
        except (ValueError, RecursionError):
            raise self._error(None, "a file of JSON") from None

    def __call__(self, key: str, kind: str) -> Any:
        value = self._content
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                raise self._error(key, kind, "is missing")
            value = value[part]
        if not isinstance(value, KINDS[kind]) or (kind == "a number" and not _is_number(value)):
            raise self._error(key, kind, f"= {json.dumps(value)[:60]}")
        return value

    def text(self, key: str) -> str:
        return one_line(self(key, "a text"))

    def number(self, key: str) -> float:
        value: float = self(key, "a number")
        return value

    def last(self, key: str, wanted: str | None) -> dict[str, float]:
        """The numbers of the last of a list of objects, `wanted` among them."""
        entries = self(key, "a list of objects")
        found = entries[-1] if entries else {}
        if not isinstance(found, dict):
            raise self._error(key, "a list of objects", f"ends with {json.dumps(found)[:60]}")
        numbers = {name: value for name, value in found.items() if _is_number(value)}
        if wanted is not None and wanted not in numbers:
            raise self._error(f"{key}[-1].{wanted}", "a number", "is missing")
        return numbers

    def _error(self, key: str | None, expected: str, what: str = "") -> InputError:
        place = "" if key is None else f": key '{key}' {what}"
        return InputError(f"'{self._path}' is no result of {SUITE}{place}; expected {expected}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST_NUMBER


def _table(key: str, rows: Sequence[Published]) -> Table:
    first, seeds = rows[0], sorted({each.seed for each in rows})
    versions = sorted({each.peft_version for each in rows if each.peft_version})
    files = "1 file" if len(rows) == 1 else f"{len(rows)} files"
    by = f" (PEFT {', '.join(versions)})" if versions else ""
    notes = (
        f"Not measured by this benchmark: read from {files} of {SUITE}{by}.",
        f"One run each (seed {', '.join(map(str, seeds))}): no interval, nothing is tested and no best is marked.",
        "Parameters are counted before training: of a method that prunes while it trains, as AdaLoRA, at its start.",
        "Forgetting: mean loss per token on a sample of Wikipedia after training, less that before; less is better.",
        "Seconds hold the evaluation on the test set. The stored bytes of full fine-tuning are the suite's estimate.",
    )
    return Table(key, TITLE, _caption(first), HEADINGS, tuple(map(_row, rows)), notes, left=2)


def _caption(first: Published) -> str:
    settings = {name: first.settings.get(name) for name in ("max_steps", "batch_size", "max_seq_length", "dtype")}
    words = ", ".join(f"{name} {one_line(str(value))}" for name, value in settings.items() if value is not None)
    return f"Model {first.model}; {words}, {first.accelerator}."


def _row(each: Published) -> tuple[Entry, ...]:
    score = Entry(NOTHING, mark=each.status) if each.test_accuracy is None else _number(each.test_accuracy, score_text)
    return (
        Entry(each.experiment),
        Entry(each.peft_type or NOTHING),
        score,
        _number(each.forgetting, score_text),
        _number(each.parameters, human),
        _number(each.stored_bytes, human),
        _number(each.seconds, lambda seconds: f"{seconds:,.0f}"),
        _number(each.memory_bytes, human),
        _number(each.learning_rate, lambda rate: f"{rate:g}"),
    )


def _number(value: float | None, text: Any) -> Entry:
    return Entry() if value is None else Entry(text(value), number=value)
