"""GSM8K and MetaMathQA: numbers in answers, greedy answers, shots, on made rows and a tiny Llama of random weights."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from harness import registry
from harness.cli import main
from harness.contracts import TASK_CONTRACTS, Subject
from harness.contracts.tasks import a_row_does_not_depend_on_the_rows_beside_it
from harness.errors import InputError
from harness.notation import parse_choice
from harness.plan.trial import check_rows
from harness.record.store import RecordStore
from harness.report.evidence.examples import example_scores
from harness.spec import Limits, Place, TrainSpec
from harness.splits import make_splits
from tasks.gsm8k import MEASURES, Gsm8k, stated_number
from tests.support import tiny, tiny_text

NAMES = ("task", "seeds")
SMALL = "max_length=80,max_response=14"


def questions(count: int, first: int = 0) -> dict[str, list[str]]:
    """The name in a question gives its number away."""
    numbers = range(first, first + count)
    asked = [f"{'a ' * (n % 3)}{n // 2} {NAMES[n % 2]}" for n in numbers]
    return {"question": asked, "answer": [f"so\n#### {n % 2}" for n in numbers]}


def write(root: Path, rows: dict[str, list[str]], split: str = "train", dataset: str = "openai/gsm8k/main") -> None:
    tiny.write_parquet(root / dataset / f"{split}-00000-of-00001.parquet", rows)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    write(folder, questions(80))
    write(folder, questions(24, first=200), "test")
    asked = [f"what is {n}" for n in range(30)]
    responses = [
        f"it is {n}.\nThe answer is: {n}" if n % 3 else f"The answer is: \\frac{{{n}}}{{2}}" for n in range(30)
    ]
    rows = {"query": asked, "response": responses, "original_question": [f"{n // 3}" for n in range(30)]}
    write(folder, rows, dataset="meta-math/MetaMathQA/default")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_text.write_llama(tmp_path_factory.mktemp("llama"), tiny_text.byte_level(), positions=256)


def task_of(text: str) -> Gsm8k:
    task = registry.make_task(*parse_choice(text))
    assert isinstance(task, Gsm8k)
    return task


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 left.\n#### 72", "72"),
        ("#### $1,234.50", "1234.5"),
        ("####-7", "-7"),
        ("#### -$7.", "-7"),
        ("The answer is: 18\n\nQuestion: next?\n#### 3", "18"),
        ("so the answer is **0.5** dollars", "0.5"),
        ("the answer is .25", "0.25"),
        ("#### 18 eggs, 2 a day", "18"),
        ("#### 007", "7"),
        ("the answer is unclear, but\n#### 9", "9"),
        ("The answer is: \\frac{1}{2}", None),
        ("The answer is: 1/2", None),
        ("The answer is: 12.5x", None),
        ("The answer is: 10^5", None),
        ("The answer is: 3 + 4i", None),
        ("The answer is: \\$18.", "18"),
        ("#### $ 5", "5"),
        ("#### \u22125", "-5"),
        ("#### 9\n\n= done", "9"),
        ("The answer is 5\n\n- 3 apples", "5"),
        ("#### 18 - that is all", "18"),
        ("The answer is: 7,2", None),
        ("The answer is: 1,2345", None),
        ("The answer is: 5 1/2", None),
        ("The answer is: 10**5", None),
        ("The answer is: 3 \\frac{1}{2}", None),
        ("The answer is: 2 \\sqrt{3}", None),
        ("The answer is: 3:45", None),
        ("The answer is: --3", None),
        ("72", None),
        ("#### ", None),
        ("", None),
    ],
)
def test_the_number_that_an_answer_states(text, number):
    assert stated_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize("contract", TASK_CONTRACTS, ids=lambda contract: contract.__name__)
def test_contract(contract, root, model, tmp_path):
    place = Place(model=model, data_root=str(root))
    contract(Subject(f"gsm8k[{SMALL}]", tmp_path, method="full[learning_rate=1e-3]", batches=2, place=place))


def test_a_row_with_shots_does_not_depend_on_the_rows_beside_it(root, model, tmp_path):
    place = Place(model=model, data_root=str(root))
    a_row_does_not_depend_on_the_rows_beside_it(Subject(f"gsm8k[shots=2,{SMALL}]", tmp_path, place=place))


def test_the_question_has_no_loss_and_the_answer_has_its_end(root, model):
    task = task_of(f"gsm8k[{SMALL}]")
    train, _ = task.load(str(root))
    batch = task.collate(task.encode(train, model), [0, 3], torch.Generator())
    tokenizer = AutoTokenizer.from_pretrained(model)
    for row, number in enumerate((0, 3)):
        ids, labels = batch.inputs["input_ids"][row], batch.labels[row]
        asked = ids[(labels == -100) & (batch.inputs["attention_mask"][row] == 1)]
        assert tokenizer.decode(asked) == f"Question: {train.columns['prompt'][number]}\nAnswer:"
        assert tokenizer.decode(labels[labels != -100]) == f" so\n#### {number % 2}<|endoftext|>"


def test_training_teaches_the_numbers_and_examples_are_paired(root, model, tmp_path):
    options = ["--data-root", str(root), "--model", model, "--batch-size", "8", "--results", str(tmp_path)]
    run = ["run", "--executor", "serial", "--methods", "full[learning_rate=1e-2]", "--tasks", f"gsm8k[{SMALL}]"]
    assert main([*run, "--batches", "120", *options]) == 0
    store = RecordStore(tmp_path)
    (record,) = store.records()
    assert record.metrics["answered"] > 0.9
    assert record.score == record.metrics["accuracy"] > 0.9
    for metric in MEASURES:
        value = record.metrics[metric.name]
        values = example_scores(store.folder(record.run_id) / "predictions.safetensors", "test", metric, value, 24)
        assert values is not None, metric.name
        assert values.mean() == pytest.approx(value)


def kept(task: Gsm8k, answers: list[str]) -> np.ndarray:
    from tasks.answers import packed

    return packed(answers, [1.0] * len(answers), [2] * len(answers), np.float32)


def test_accuracy_compares_decimals():
    task = task_of("gsm8k")
    truths = kept(task, ["#### 72", "#### 5", "#### 1,000", "#### 3"])
    found = task.metrics(kept(task, ["The answer is: 72.00", "5", "#### 1000", "#### 4"]), truths)
    assert (found["accuracy"], found["answered"]) == (0.5, 0.75)
    assert found["perplexity"] == pytest.approx(np.exp(0.5))


def test_shots_are_read_before_questions_in_evaluations_alone(root, model):
    plain, shown = task_of(f"gsm8k[{SMALL}]"), task_of(f"gsm8k[shots=3,{SMALL}]")
    splits = make_splits(shown, str(root), Limits(40))
    assert len(shown.load(str(root))[0]) == 80 - 3
    (lead,) = set(splits.evaluation["test"].columns["shots"])
    assert lead.count("Question: ") == lead.count("\nAnswer: so\n#### ") == 3
    asked = [line.removeprefix("Question: ") for line in lead.splitlines() if line.startswith("Question: ")]
    assert not set(asked) & {*splits.train.columns["prompt"], *splits.holdout.columns["prompt"]}

    tokenizer = AutoTokenizer.from_pretrained(model)
    examples = splits.evaluation["test"]
    encoded = shown.encode(examples, model)
    batch = shown.collate(encoded, [0, 1], None)
    for row in (0, 1):
        prompt = batch.inputs["prompt_ids"][row][batch.inputs["prompt_mask"][row] == 1]
        assert tokenizer.decode(prompt) == f"{lead}Question: {examples.columns['prompt'][row]}\nAnswer:"
    module = shown.backbone(model).module.eval()
    with torch.no_grad():
        predicted = shown.predict(module, batch)
        whole = tokenizer(f"{lead}Question: {examples.columns['prompt'][0]}\nAnswer:")["input_ids"]
        response = batch.labels[0][batch.labels[0] != -100].tolist()
        logs = module(input_ids=torch.tensor([[*whole, *response]])).logits[0].log_softmax(-1)
        expected = -sum(float(logs[len(whole) + n - 1, token]) for n, token in enumerate(response))
    assert float(predicted[0, 0]) == pytest.approx(expected, abs=1e-3)

    def trained(task: Gsm8k, columns: dict[str, Any]) -> torch.Tensor:
        rows = type(examples)(columns, np.zeros(2))
        return task.collate(task.encode(rows, model), [0, 1], torch.Generator()).inputs["input_ids"]

    rows = {name: values[:2] for name, values in examples.columns.items()}
    without = {name: values for name, values in rows.items() if name != "shots"}
    assert torch.equal(trained(shown, rows), trained(plain, without))


def test_shots_that_a_model_has_no_positions_for_are_found_before_the_runs(root, model):
    task = task_of(f"gsm8k[shots=12,{SMALL}]")
    splits = make_splits(task, str(root), Limits(40))
    encoded = task.encode(splits.holdout, model)
    with pytest.raises(InputError, match=r"a prompt with its shots and max_response = .* is above the 256 positions"):
        check_rows(task, task.backbone(model).module, encoded, TrainSpec(), "task")


def test_metamathqa_trains_on_its_rows_and_is_scored_on_gsm8k(root):
    task = task_of("metamathqa")
    train, evaluation = task.load(str(root))
    assert (len(train), {name: len(rows) for name, rows in evaluation.items()}) == (30, {"test": 24})
    said = "10 of 30 answers state no number after '####' or 'The answer is' (row 0, 3, 6, ...)"
    assert train.notes == (f"{said}; they are trained on as they are, and no answer to one in the holdout is right",)
    assert train.groups is not None
    assert np.bincount(train.groups).tolist() == [3] * 10  # by original question
    shown, _ = task_of("metamathqa[shots=2]").load(str(root))
    assert len(shown) == 30 - 6
    assert "frac" not in shown.columns["shots"][0]


def test_mistakes(root, tmp_path):
    with pytest.raises(InputError, match="shots = 30 leaves too few of the 30 training rows"):
        task_of("metamathqa[shots=30]").load(str(root))
    with pytest.raises(InputError, match="max_response = 64 should be below max_length = 64"):
        task_of("gsm8k[max_length=64,max_response=64]")
    write(tmp_path, questions(9))
    write(tmp_path, {"question": ["a", "b"], "answer": ["#### 1", "two"]}, "test")
    with pytest.raises(InputError, match=r"test: 1 answers state no number after .* \(first: row 1\)"):
        task_of("gsm8k").load(str(tmp_path))
    write(tmp_path, {"question": ["a"], "anser": ["#### 1"]}, "test")
    with pytest.raises(InputError, match="no column 'answer'"):
        task_of("gsm8k").load(str(tmp_path))
