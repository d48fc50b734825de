"""Out to others' programs: an experiment folder of PEFT's own comparison, and an adapter by the route of lm-eval."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import registry
from harness.cli import main
from harness.notation import parse_choice
from harness.record.record import RunRecord
from harness.record.store import RecordStore
from harness.spec import RunSpec
from tests.support import tiny

METHODS = "lora[rank=2,learning_rate=1e-2],adalora,full,peft[type=ia3]"
TASK = "generation:{}[max_length=32,max_response=4]"
# Fields of the suite's training parameters, which it refuses others of.
FIELDS = {"model_id", "dtype", "max_seq_length", "batch_size", "batch_size_eval", "max_steps", "eval_steps", "compile"}
FIELDS |= {"use_gc", "query_template", "seed", "grad_norm_clip", "optimizer_type", "optimizer_kwargs", "lr_scheduler"}
FIELDS |= {"use_amp", "autocast_adapter_dtype", "generation_kwargs", "attn_implementation", "init_kv_cache_prefix"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    answers = {"good": "the film", "bad": "a story"}
    signs = [("good", "bad")[n % 2] for n in range(40)]
    rows = [{"prompt": f"{'camera ' * (n % 5)}was {s}", "response": answers[s]} for n, s in enumerate(signs)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def store(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> RecordStore:
    results = tmp_path_factory.mktemp("results")
    where = ["--executor", "serial", "--results", str(results), "--tracking-uri", "off", "--save-adapter"]
    train = ["--batches", "6", "--batch-size", "4", "--schedule", "constant", "--holdout-points", "2"]
    task = ["--tasks", TASK.format(data), "--model", str(model)]
    assert main(["run", "--methods", METHODS, *task, *train, *where]) == 0
    assert main(["run", "--methods", "lora[rank=2]", "--tasks", "synthetic", *train, *where]) == 0
    return RecordStore(results)


def run_of(store: RecordStore, method: str, task: str = "generation") -> RunRecord:
    (found,) = [each for each in store.records() if each.spec.method == method and each.spec.task.startswith(task)]
    return found


def exported(store: RecordStore, run: RunRecord, to: Path, *options: str) -> int:
    return main(["export", run.run_id, "--to", str(to), "--results", str(store.results), *options])


def rewritten(run: RunRecord, spec: RunSpec, tmp_path: Path) -> RecordStore:
    """A store of its own with the run as one of another spec."""
    store = RecordStore(tmp_path / "results")
    store.make_ready()
    changed = run.model_copy(update={"spec": spec, "run_id": spec.run_id, "files": {}})
    store.write(changed, [], store.draft(spec.run_id))
    return store


def untrained(folder: Path, model: Path) -> Any:
    """The model as the suite begins with it."""
    from peft import PeftConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = PeftConfig.from_pretrained(str(folder))
    return get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)


@pytest.mark.parametrize(
    ("method", "kind", "whose"),
    [
        ("lora", "LORA", "the lora of this run, untrained"),
        ("adalora", "LORA", "a lora of adalora's last ranks, untrained"),
        ("peft", "IA3", "that of the kept adapter, untrained"),
    ],
)
def test_the_suite_trains_what_was_trained_here(
    store: RecordStore, model: Path, tmp_path: Path, method: str, kind: str, whose: str, capsys: Any
) -> None:
    run, to = run_of(store, method), tmp_path / "experiments" / "lora" / "mine"
    assert exported(store, run, to, "--as", "peft-experiment") == 0
    assert sorted(path.name for path in to.iterdir()) == ["README.md", "adapter_config.json", "training_params.json"]
    config = json.loads((to / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == (kind, "CAUSAL_LM")
    assert whose in capsys.readouterr().out
    assert whose in (to / "README.md").read_text()
    numbers = [part.numel() for part in untrained(to, model).parameters() if part.requires_grad]
    assert run.parameters is not None
    if method != "adalora":  # whose triplets hold a number more for each component
        assert sum(numbers) == run.parameters.adapter_final
    assert str(model.parent) not in "".join(path.read_text() for path in to.iterdir())


def test_training_parameters_are_the_runs(store: RecordStore, model: Path, tmp_path: Path) -> None:
    assert exported(store, run_of(store, "lora"), tmp_path / "to", "--as", "peft-experiment") == 0
    settings = json.loads((tmp_path / "to" / "training_params.json").read_text())
    assert set(settings) <= FIELDS
    assert settings | {
        "model_id": model.name, "max_seq_length": 32, "query_template": "{query}\n", "batch_size": 4, "max_steps": 6,
        "eval_steps": 3, "seed": 0, "grad_norm_clip": 1.0, "lr_scheduler": None, "dtype": "float32", "use_gc": False,
        "optimizer_type": "AdamW", "optimizer_kwargs": {"lr": 0.01, "weight_decay": 0.0},
    } == settings  # fmt: skip


def test_what_the_suite_does_otherwise_is_said(store: RecordStore, tmp_path: Path) -> None:
    run = run_of(store, "lora")
    changed = {"schedule": "linear", "precision": "bf16", "micro_batches": 2, "backbone_dtype": "nf4"}
    train = run.spec.train.model_copy(update=changed)
    place = run.spec.place.model_copy(update={"gradient_checkpointing": True, "evaluation_batch_size": 3})
    task = run.spec.task_parameters | {"chat_template": True}
    spec = run.spec.model_copy(update={"train": train, "place": place, "task_parameters": task})
    other = rewritten(run, spec, tmp_path)
    assert exported(other, other.find(spec.run_id), tmp_path / "to", "--as", "peft-experiment") == 0
    settings = json.loads((tmp_path / "to" / "training_params.json").read_text())
    assert settings | {"lr_scheduler": "cosine", "dtype": "int4", "use_gc": True, "batch_size_eval": 3} == settings
    told = (tmp_path / "to" / "README.md").read_text()
    for words in (
        "here linear after 0.06",
        "here bf16",
        "micro batches: none; here 2",
        "here nf4",
        "here the tokenizer's chat template",
        "write where the suite finds it",
        "loss: of question and answer",
        "here drawn from all rows alike",
    ):
        assert words in told
    assert exported(store, run, tmp_path / "own", "--as", "peft-experiment") == 0
    assert "here constant after a warm-up over 0.06" in (tmp_path / "own" / "README.md").read_text()


def test_a_template_with_braces_is_one_that_the_suite_can_fill(store: RecordStore, tmp_path: Path) -> None:
    run = run_of(store, "lora")
    task = run.spec.task_parameters | {"template": '{"q": "{prompt}"}\n'}
    spec = run.spec.model_copy(update={"task_parameters": task})
    other = rewritten(run, spec, tmp_path)
    assert exported(other, other.find(spec.run_id), tmp_path / "to", "--as", "peft-experiment") == 0
    template = json.loads((tmp_path / "to" / "training_params.json").read_text())["query_template"]
    assert template.format(query="how many?") == '{"q": "how many?"}\n'


@pytest.mark.parametrize(
    ("method", "task", "options", "message"),
    [
        ("full", "generation", ["--as", "peft-experiment"], "stock PEFT cannot hold"),
        ("lora", "synthetic", ["--as", "peft-experiment"], "trains causal language models without a new head"),
        ("lora", "generation", ["--as", "peft-experimant"], "Did you mean 'peft-experiment'?"),
        ("lora", "generation", ["--as", "peft-experiment", "--rank", "2"], "--rank 2 is for an adapter"),
    ],
)
def test_what_it_cannot_be_is_refused(
    store: RecordStore, tmp_path: Path, method: str, task: str, options: list[str], message: str, capsys: Any
) -> None:
    assert exported(store, run_of(store, method, task), tmp_path / "to", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "to").exists()


def test_an_adapter_loads_by_the_route_of_lm_eval_and_scores_as_the_run_did(
    store: RecordStore, model: Path, data: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = run_of(store, "lora")
    assert exported(store, run, tmp_path / "adapter") == 0
    base = AutoModelForCausalLM.from_pretrained(model)
    bare = perplexity(base, model, data)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert perplexity(loaded, model, data) == pytest.approx(run.metrics["perplexity"], rel=1e-4)
    assert bare != pytest.approx(run.metrics["perplexity"], rel=1e-2)


@torch.no_grad()
def perplexity(module: Any, model: Path, data: Path) -> float:
    """Of the true responses of the evaluation rows, in plain transformers."""
    task = registry.make_task(*parse_choice(TASK.format(data)))
    _, evaluation = task.load(None)
    (examples,) = evaluation.values()
    batch = task.collate(task.encode(examples, str(model)), range(len(examples)), None)
    logs = module.eval()(**batch.inputs).logits[:, :-1].log_softmax(-1)
    wanted = batch.labels[:, 1:]
    told = wanted != -100
    return math.exp(-logs[told].gather(-1, wanted[told][:, None]).mean().item())
