"""The model card of one run: what it is, how good, how it was made, how to load it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from harness.record import RunRecord
from harness.report.frame import model_name
from harness.report.leaderboard import Board, Cell
from harness.report.text import human, summary_text

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

The file holds the trained numbers under the names they have in the model above."""


def model_card(record: RunRecord, boards: Iterable[Board], files: Sequence[str]) -> str:
    """Markdown with front matter as the Hub reads it. `boards` hold the run and those it is compared with; `files` are
    the adapter's. Scores of other seeds of the same configuration are given with their interval."""
    spec, count = record.spec, record.parameters
    is_peft = "adapter_config.json" in files
    model = model_name(spec.place.model) or "built by the task itself"
    tuned = []
    if spec.search is not None:
        parameters = ", ".join(spec.search.parameters)
        tuned = [f"Chosen by {len(spec.search.trials)} trials on the holdout: {parameters}."]
    sections = [
        "\n".join(["---", *_front_matter(record, is_peft), "---"]),
        f"# {spec.method} on {spec.task}",
        f"Seed {spec.seed} of a comparison of fine-tuning methods; run `{record.run_id}`.",
        "## Task and data",
        f"- task: `{spec.task}` (version {spec.task_version}), data fingerprint `{spec.data_fingerprint}`\n"
        f"- model: {model}, fingerprint `{spec.model_fingerprint}`\n"
        f"- rows: {', '.join(f'{name} {rows:,}' for name, rows in record.rows.items())}",
        "## Method",
        f"`{spec.method}` (version {spec.method_version}), parameters:\n\n```json\n"
        f"{json.dumps(spec.method_parameters, indent=1)}\n```",
        *tuned,
        f"Training: `{json.dumps(spec.train.model_dump(mode='json', exclude_none=True))}`; {record.batches} batches.",
        "## Scores",
        _scores(record, _cell(record, boards)),
    ]
    if count is not None:
        sections.append(
            f"Adapter: {count.adapter_final:,} numbers ({human(count.adapter_final)}), at most {count.adapter_peak:,} "
            f"while training; head: {count.head:,}; {count.stored_bytes:,} bytes to store."
        )
    if record.ranks:
        ranks = "\n".join(f"| `{layer}` | {rank} |" for layer, rank in record.ranks.items())
        sections += ["## Ranks", f"| layer | rank |\n|---|---|\n{ranks}"]
    sections += ["## How to load it", PEFT if is_peft else TRAINED, "## Environment", _environment(record)]
    return "\n\n".join(sections) + "\n"


def _front_matter(record: RunRecord, is_peft: bool) -> list[str]:
    lines = [f"tags: [{json.dumps(record.spec.method)}]"]
    if is_peft:
        lines.insert(0, "library_name: peft")
    model = record.spec.place.model
    if model is not None and not model.startswith((".", "/")) and model.count("/") == 1:
        lines.insert(0, f"base_model: {json.dumps(model)}")
    return lines


def _cell(record: RunRecord, boards: Iterable[Board]) -> Cell | None:
    cells = (cell for board in boards for row in board.rows for cell in row.cells.values())
    return next((cell for cell in cells if record.run_id in {run["run_id"] for run in cell.runs}), None)


def _scores(record: RunRecord, cell: Cell | None) -> str:
    lines = [f"| {name} | {value:.4f} |" for name, value in record.metrics.items()]
    table = "\n".join(["| metric, on the evaluation splits | this run |", "|---|---|", *lines])
    if cell is None or cell.score.n < 2:
        return f"{table}\n\nOne seed: an interval is not available."
    return (
        f"{table}\n\n{record.headline} over {cell.score.n} seeds of this configuration: "
        f"{summary_text(cell.score, with_n=False)} (mean ± half the 95 % interval, Student's t)."
    )


def _environment(record: RunRecord) -> str:
    environment = record.environment
    commit = environment.commit or "unknown"
    packages = ", ".join(f"{name} {version}" for name, version in environment.packages.items())
    changes = ", with changes" if environment.dirty else ""
    return (
        f"rank-adaptive-harness {environment.harness} (commit {commit}{changes}), "
        f"Python {environment.python}, {environment.device} ({environment.processor}); {packages}."
    )
