"""A run as an experiment folder of PEFT's own method comparison (huggingface/peft, method_comparison/MetaMathQA): an
untrained adapter's configuration and the settings to train it with, there and on the suite's data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness import installed, registry
from harness.commands import target
from harness.errors import InputError
from harness.record.record import ADAPTER, RunRecord
from harness.record.store import RecordStore
from harness.report.redact import cut_config, model_name

CONFIG, TRAINING, ABOUT = "adapter_config.json", "training_params.json", "README.md"
SCHEDULES = {"constant": None, "cosine": "cosine", "linear": "cosine"}  # ours and the suite's, which has these two
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8", "nf4": "int4"}  # in the same way
PROMPT = "{prompt}"  # in templates of ours


def command(results: Path, run_id: str, to: Path) -> int:
    """Make the folder `to` with adapter_config.json, training_params.json and a README.md, which says what the suite
    does otherwise. What is not in training_params.json the suite takes from its defaults.

    Raises InputError for a run that is not done, one that is not on a language model without a new head, one whose
    adapter stock PEFT does not hold, and a `to` that cannot be made.
    """
    target.check_new(to)
    store = RecordStore(results)
    record = store.find(run_id)
    _check(record)
    config, whose = _configuration(store, record)
    notes = [whose, *_otherwise(record)]
    files = {CONFIG: config, TRAINING: _training(record)}
    with target.made(to) as draft:
        draft.mkdir()
        for name, content in files.items():
            (draft / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (draft / ABOUT).write_text(_about(record, notes), encoding="utf-8")
    print(f"{CONFIG}, {TRAINING} and {ABOUT} of {record.run_id} are in {to}")
    for note in notes:
        print(f"  {note}")
    return 0


def _check(record: RunRecord) -> None:
    run = f"run '{record.run_id}' on {record.spec.task}"
    if record.status != "done":
        raise InputError(f"{run} is {record.status}: there is nothing to export")
    has_head = record.parameters is not None and record.parameters.head > 0
    if has_head or "text" not in registry.task_class(record.spec.task).capabilities:
        raise InputError(f"{run} is no peft-experiment: that suite trains causal language models without a new head")


def _configuration(store: RecordStore, record: RunRecord) -> tuple[dict[str, Any], str]:
    """The adapter's configuration as PEFT reads it, and whose it is. Raises InputError where PEFT has none."""
    spec = record.spec
    form = installed.peft_form(spec.method, spec.method_parameters, record.ranks) if record.ranks else None
    if form is not None:
        own = form.method == spec.method
        whose = f"the {form.method} of this run" if own else f"a {form.method} of {spec.method}'s last ranks"
        return {"peft_type": "LORA", "task_type": "CAUSAL_LM", **form.config}, f"{CONFIG}: {whose}, untrained"
    kept = store.folder(record.run_id) / ADAPTER / CONFIG
    if not kept.is_file():
        raise InputError(
            f"run '{record.run_id}' of '{spec.method}' is no peft-experiment: stock PEFT cannot hold what is no LoRA "
            f"and kept no {CONFIG} (a tuner of PEFT keeps one with --save-adapter)"
        )
    try:
        config = cut_config(json.loads(store.verified(record.run_id, f"{ADAPTER}/{CONFIG}").read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"'{kept}' is damaged: {str(error).splitlines()[0]}") from None
    untrained = {"inference_mode": False, "task_type": "CAUSAL_LM", "base_model_name_or_path": None}
    return config | untrained, f"{CONFIG}: that of the kept adapter, untrained"


def _training(record: RunRecord) -> dict[str, Any]:
    """The fields of the suite's training_params.json that the run says something of."""
    spec, train = record.spec, record.spec.train
    settings = {
        "model_id": model_name(spec.place.model),
        "max_seq_length": spec.task_parameters.get("max_length"),
        "query_template": _template(spec.task_parameters.get("template")),
        "batch_size_eval": spec.place.evaluation_batch_size,
    }
    return {name: value for name, value in settings.items() if value is not None} | {
        "dtype": DTYPES[train.backbone_dtype],
        "use_gc": spec.place.gradient_checkpointing,
        "batch_size": train.batch_size,
        "max_steps": record.batches,
        "eval_steps": max(1, record.batches // max(1, train.holdout_points)),
        "seed": spec.seed,
        "grad_norm_clip": train.clip_norm,
        "optimizer_type": "AdamW",
        "optimizer_kwargs": {
            "lr": spec.method_parameters["learning_rate"],
            "weight_decay": spec.method_parameters["weight_decay"],
        },
        "lr_scheduler": SCHEDULES[train.schedule],
        "use_amp": False,
        "autocast_adapter_dtype": True,
    }


def _template(text: Any) -> str | None:
    """What the model reads, as the suite's `str.format` takes it, with its name for the question."""
    if not isinstance(text, str) or PROMPT not in text:
        return None
    return "{query}".join(part.replace("{", "{{").replace("}", "}}") for part in text.split(PROMPT))


def _otherwise(record: RunRecord) -> list[str]:
    """What the suite does otherwise than this run did, a line each."""
    train, model = record.spec.train, record.spec.place.model
    drawn = "drawn, in batches of like lengths" if train.group_by_length else "drawn from all rows alike"
    told = [
        "data: MetaMathQA for training, GSM8K for the score, whatever this run had",
        "loss: of question and answer, a mean over a batch's tokens; here of the answer alone, then over examples",
        f"order: the data's, in batches of like lengths; here {drawn}",
    ]
    if SCHEDULES[train.schedule] is not None:
        told.append(
            f"schedule: cosine after a warm-up over 0.1 of the steps; here {train.schedule} after {train.warmup:g}"
        )
    elif train.warmup:
        told.append(f"schedule: constant from the first step; here constant after a warm-up over {train.warmup:g}")
    if record.spec.method_parameters["weight_decay"]:
        told.append("weight decay: of all that is trained; here of matrices alone")
    if train.precision != "fp32":
        told.append(f"precision: that of dtype; here {train.precision}, which its use_amp is not (that is float16)")
    if train.backbone_dtype == "nf4":
        told.append("dtype: its int4 is FP4 with single quantisation, bitsandbytes' default; here nf4 with double")
    if record.spec.task_parameters.get("chat_template"):
        told.append("prompt: query_template; here the tokenizer's chat template, where it has one")
    if train.micro_batches > 1:
        told.append(f"micro batches: none; here {train.micro_batches}")
    if model is not None and model_name(model) != model:
        told.append(f"model_id: the name of a folder, {model_name(model)}: write where the suite finds it")
    return told


def _about(record: RunRecord, notes: list[str]) -> str:
    lines = "\n".join(f"- {note}" for note in notes)
    return (
        f"# Experiment from run {record.run_id}\n\nFor `experiments/<peft-method>/<name>` of PEFT's "
        f"method_comparison/MetaMathQA. What the suite makes of it is its own result, not this run's:\n\n{lines}\n"
    )
