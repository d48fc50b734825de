"""The model card of one run: what it is, how good, how it was made, how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from harness.record.record import RunRecord
from harness.report.board.leaderboard import Board
from harness.report.board.rows import Cell
from harness.report.forms.text import escape
from harness.report.redact import handed_on, one_line
from harness.report.wording import human, summary_text

OF_THE_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)  # an owner's model

PEFT = """```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "PATH/TO/THIS/FOLDER")
```

`base_model` is the model above with a head of the task's size (`AutoModelForSequenceClassification` for text); the
head's weights are in the adapter. Texts were tokenised with `split_special_tokens=True`. For batches of a model whose
configuration names no padding token, set `base_model.config.pad_token_id`; a row alone needs nothing."""
TRAINED = """```python
from safetensors.torch import load_file

model.load_state_dict(load_file("PATH/TO/THIS/FOLDER/trained.safetensors"), strict=False)
```

The file holds the trained weights under the names they have in the model above."""
OWN = """```python
from pathlib import Path

from {module} import {function}

model = {function}(model, Path("PATH/TO/THIS/FOLDER"))
```

`model` is the model above with a head of the task's size, as it was before training; this gives it with the trained
adapter and head. It needs this package: stock PEFT cannot hold what the method adds."""
UNKNOWN = "The format is the method's own, and the package that has the method was not there when this was written."
HELD = """The model's frozen weights were held in {dtype} while this was trained, and the scores are of that: give it a
model that is held in the same type. What is in this folder is float32."""


def model_card(
    record: RunRecord,
    boards: Iterable[Board],
    files: Sequence[str],
    provenance: str,
    loaders: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Markdown with front matter as the Hub reads it. `boards` hold the run and those it is compared with; `files` are
    the adapter's; `provenance` and `loaders` are the method's, see `Method`. Scores of other seeds of the same
    configuration are given with their interval. No place of a machine and no name of a host or user is in it, and no
    text of the record is taken for Markdown or YAML."""
    cell = _cell(record, boards)
    record = handed_on(record)
    spec, count = record.spec, record.parameters
    is_peft = "adapter_config.json" in files
    model = escape(spec.place.model or "built by the task itself")
    tuned = []
    if spec.search is not None:
        parameters = escape(", ".join(spec.search.parameters))
        tuned = [f"Chosen by {len(spec.search.trials)} trials on the holdout: {parameters}."]
    sections = [
        "\n".join(["---", *_front_matter(record, is_peft), "---"]),
        f"# {escape(f'{spec.method} on {spec.task}')}",
        f"Seed {spec.seed} of a comparison of fine-tuning methods; run {_code(record.run_id)}.",
        "## Task and data",
        f"- task: {_code(spec.task)} (version {spec.task_version}), data fingerprint {_code(spec.data_fingerprint)}\n"
        f"- model: {model}, fingerprint {_code(spec.model_fingerprint)}\n"
        f"- rows: {escape(', '.join(f'{name} {rows:,}' for name, rows in record.rows.items()))}",
        "## Method",
        f"{_code(spec.method)} (version {spec.method_version}). Provenance: {escape(provenance)}. Hyperparameters:",
        _json_block(spec.method_parameters),
        *tuned,
        f"Training: {_code(json.dumps(spec.train.model_dump(mode='json', exclude_none=True)))}; "
        f"{record.batches} batches.",
        "## Scores",
        _scores(record, cell),
    ]
    if count is not None:
        sections.append(
            f"Adapter: {count.adapter_final:,} parameters ({human(count.adapter_final)}), at most "
            f"{count.adapter_peak:,} while training; head: {count.head:,}; {count.stored_bytes:,} bytes to store."
        )
    if record.ranks:
        ranks = "\n".join(f"| {_code(layer)} | {rank} |" for layer, rank in record.ranks.items())
        sections += ["## Ranks", f"| layer | rank |\n|---|---|\n{ranks}"]
    sections += ["## How to load it", _loading(files, loaders)]
    if spec.train.backbone_dtype != "fp32":
        sections.append(HELD.format(dtype=spec.train.backbone_dtype))
    sections += ["## Environment", _environment(record)]
    return "\n\n".join(sections) + "\n"


def _loading(files: Sequence[str], loaders: Mapping[str, str]) -> str:
    """How what is in these files is put into a model."""
    if "adapter_config.json" in files:
        return PEFT
    for name, loader in loaders.items():
        if name in files:
            module, _, function = loader.rpartition(".")
            return OWN.format(module=module, function=function)
    return TRAINED if "trained.safetensors" in files else UNKNOWN


def _front_matter(record: RunRecord, is_peft: bool) -> list[str]:
    lines = [f"tags: [{_quoted(record.spec.method)}]"]
    if is_peft:
        lines.insert(0, "library_name: peft")
    model = record.spec.place.model
    if model is not None and OF_THE_HUB.fullmatch(model):
        lines.insert(0, f"base_model: {_quoted(model)}")
    return lines


def _quoted(text: str) -> str:
    """As YAML."""
    return json.dumps(one_line(text), ensure_ascii=False)


def _code(text: str) -> str:
    """As code within a line or a table."""
    plain = one_line(text).replace("`", "'").replace("|", "\\|")
    return f"`{plain}`"


def _json_block(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, indent=1)
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", text))])
    return f"{fence}json\n{text}\n{fence}"


def _cell(record: RunRecord, boards: Iterable[Board]) -> Cell | None:
    cells = (cell for board in boards for row in board.rows for cell in row.cells.values())
    return next((cell for cell in cells if record.run_id in {run.run_id for run in cell.runs}), None)


def _scores(record: RunRecord, cell: Cell | None) -> str:
    lines = [f"| {escape(name)} | {value:.4f} |" for name, value in record.metrics.items()]
    table = "\n".join(["| metric, on the evaluation splits | this run |", "|---|---|", *lines])
    if cell is None or cell.score.n < 2:
        return f"{table}\n\nOne seed: an interval is not available."
    return (
        f"{table}\n\n{escape(record.headline)} over {cell.score.n} seeds of this configuration: "
        f"{summary_text(cell.score, with_n=False)} (mean ± half the 95 % interval, Student's t)."
    )


def _environment(record: RunRecord) -> str:
    environment = record.environment
    commit = environment.commit or "unknown"
    packages = ", ".join(f"{name} {version}" for name, version in environment.packages.items())
    changes = ", with changes" if environment.dirty else ""
    return escape(
        f"rank-adaptive-harness {environment.harness} (commit {commit}{changes}), "
        f"Python {environment.python}, {environment.device} ({environment.processor}); {packages}."
    )
