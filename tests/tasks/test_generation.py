"""Generation: loss on the response alone, greedy answers, ROUGE and perplexity, on a tiny Llama of random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness import registry
from harness.cli import main
from harness.contracts import TASK_CONTRACTS, Subject
from harness.errors import InputError
from harness.notation import parse_choice
from harness.record.store import RecordStore
from harness.spec import Place
from harness.task import Examples
from tasks.generation import Generation
from tests.support import tiny

ANSWERS = {"good": "the film", "bad": "a story"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny.write_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    signs = [("good", "bad")[n % 2] for n in range(60)]
    pairs = [(f"{'camera ' * (n % 5)}was {sign}", ANSWERS[sign]) for n, sign in enumerate(signs)]
    return tiny.write_pairs(tmp_path_factory.mktemp("data"), pairs)


def task_of(text: str) -> Generation:
    task = registry.make_task(*parse_choice(text))
    assert isinstance(task, Generation)
    return task


def first_rows(task: Generation, model: str, rows: tuple[int, ...] = (0, 1, 2), training: bool = True) -> Any:
    train, _ = task.load(None)
    generator = torch.Generator().manual_seed(0) if training else None
    return task.collate(task.encode(train, model), rows, generator)


@pytest.mark.parametrize("contract", TASK_CONTRACTS, ids=lambda contract: contract.__name__)
def test_contract(contract, model, data, tmp_path):
    name = f"generation:{data}[max_length=32,max_response=4]"
    contract(Subject(name, tmp_path, method="full[learning_rate=1e-3]", batches=2, place=Place(model=model)))


def test_the_loss_is_that_of_the_responses_tokens(model, data):
    task = task_of(f"generation:{data}[max_length=32,max_response=4]")
    module = task.backbone(model).module
    batch = first_rows(task, model)
    loss = task.loss(module, batch, None)
    expected = []
    for row in range(3):  # one row at a time, without padding
        ids = batch.inputs["input_ids"][row][batch.inputs["attention_mask"][row].bool()]
        logs = module(input_ids=ids[None]).logits[0].log_softmax(-1)
        response = [i for i in range(len(ids)) if batch.labels[row, i] != -100]
        assert len(response) == 3  # two words and the end
        assert ids[response[-1]] == tiny.SPECIAL.index("[SEP]")
        expected.append(-torch.stack([logs[i - 1, ids[i]] for i in response]).mean())
    assert torch.allclose(loss, torch.stack(expected).mean(), atol=1e-5)


def test_a_prompts_tokens_do_not_move_the_loss_of_another_row_and_pieces_add_up(model, data):
    task = task_of(f"generation:{data}[max_length=32,max_response=4]")
    module = task.backbone(model).module
    whole = task.loss(module, first_rows(task, model, (0, 1, 2, 3)), None)
    pieces = [task.loss(module, first_rows(task, model, rows), None) for rows in ((0, 1), (2, 3))]
    assert torch.allclose(whole, sum(pieces) / 2, atol=1e-6)


def test_predictions_are_the_greedy_answers_and_the_perplexity_of_the_true_ones(model, data):
    from transformers import AutoTokenizer

    task = task_of(f"generation:{data}[max_length=32,max_response=4]")
    train, _ = task.load(None)
    module = task.backbone(model).module.eval()
    batch = first_rows(task, model, tuple(range(6)), training=False)
    with torch.no_grad():
        predictions = task.predict(module, batch).numpy()
        tokenizer = AutoTokenizer.from_pretrained(model)
        for row in range(6):  # alone, without padding, token by token
            ids = tokenizer(train.columns["prompt"][row], return_tensors="pt")["input_ids"]
            start = ids.shape[1]
            for _ in range(4):
                following = module(input_ids=ids).logits[0, -1].argmax()
                if following == tokenizer.eos_token_id:
                    break
                ids = torch.cat([ids, following[None, None]], dim=1)
            text = bytes(predictions[row, 2:][predictions[row, 2:] >= 0].astype(np.uint8)).decode()
            assert text == tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    gold = task.gold(train, task.encode(train, model))
    found = task.metrics(predictions, gold[:6])
    counts = torch.tensor(predictions[:, 1])
    losses = torch.tensor(predictions[:, 0]) / counts
    assert torch.allclose(losses.mean(), task.loss(module, batch, None).detach(), atol=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(predictions[:, 0].sum() / predictions[:, 1].sum()), rel=1e-5)
    assert task.metrics(gold, gold) == {
        "rougeL": 1.0,
        "rouge1": 1.0,
        "exact_match": 1.0,
        "perplexity": 1.0,
    }


def test_training_teaches_the_answers(model, data, tmp_path):
    task = f"generation:{data}[max_length=32,max_response=4,metric=exact_match]"
    options = ["--model", model, "--batch-size", "8", "--results", str(tmp_path), "--executor", "serial"]
    methods = "full[learning_rate=1e-2],lora[learning_rate=2e-2]"
    for batches in ("1", "100"):
        assert main(["run", "--methods", methods, "--tasks", task, "--batches", batches, *options]) == 0
    records = {(record.spec.method, record.batches): record for record in RecordStore(tmp_path).records()}
    assert {record.spec.task for record in records.values()} == {"generation:pairs"}
    assert {record.parameters.head for record in records.values()} == {0}
    assert records["full", 100].metrics["exact_match"] > 0.9
    assert records["full", 100].metrics["perplexity"] < 1.5
    # LoRA leaves the random output layer as it is, which bounds how sure it can be.
    assert records["lora", 100].metrics["perplexity"] < 0.7 * records["lora", 1].metrics["perplexity"]


def test_what_is_cut_keeps_the_templates_end_and_is_told(model, data):
    task = task_of(f'generation:{data}[max_length=8,max_response=2,template="was {{prompt}} is"]')
    train, _ = task.load(None)
    encoded = task.encode(train, model)
    batch = task.collate(encoded, range(len(train)), torch.Generator())
    assert batch.inputs["input_ids"].shape[1] <= 8
    tokenizer_ids = {word: n for n, word in enumerate(tiny.SPECIAL + tiny.FILLERS + tiny.SIGNS + tiny.MARKS)}
    for ids, labels in zip(batch.inputs["input_ids"], batch.labels, strict=True):
        first = int((labels != -100).nonzero()[0])
        assert ids[first - 1] == tokenizer_ids["is"]
        assert (labels != -100).sum() == 2
    assert task.facts(encoded) == {"truncated_share": 1.0}
    whole = task_of(f"generation:{data}[max_length=32,max_response=4]")
    assert whole.facts(whole.encode(train, model)) == {"truncated_share": 0.0}


def test_what_is_asked_does_not_depend_on_the_true_response(model):
    """It did: a long one took the prompt's place, in evaluations too."""
    task = task_of('generation:none[max_length=16,max_response=6,template="was {prompt} is"]')
    prompt, responses = "film " * 20, ["good", "good " * 20]
    examples = Examples({"prompt": [prompt] * 2, "response": responses}, np.zeros(2))
    asked, answered = (task.collate(task.encode(examples, model), [0, 1], each) for each in (None, torch.Generator()))
    assert asked.inputs["prompt_mask"].all()
    assert asked.inputs["prompt_ids"][0].tolist() == asked.inputs["prompt_ids"][1].tolist()
    assert asked.inputs["prompt_ids"].shape[1] == 10
    assert answered.inputs["input_ids"].shape[1] == 16


def test_a_hub_dataset_in_a_data_root(model, tmp_path):
    rows = {"question": [f"film {n}" for n in range(9)], "answer": ["good"] * 9}
    for split in ("train", "validation"):
        tiny.write_parquet(tmp_path / f"some/set/plain/{split}-00000-of-00001.parquet", rows)
    task = task_of("generation:some/set[configuration=plain,prompt=question,response=answer]")
    train, evaluation = task.load(str(tmp_path))
    assert (len(train), list(evaluation)) == (9, ["validation"])
    damaged = tmp_path / "some/set/plain/test-00000-of-00001.parquet"
    damaged.write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"test-00000-of-00001.parquet' is not a readable parquet file"):
        task.load(str(tmp_path))  # other rows in place of these would be another problem


def test_mistakes(data, model, tmp_path):
    def told(text: str, *pieces: str, model: str | None = None) -> None:
        def use() -> None:
            task = task_of(text)
            task.backbone(model, meta=True) if model else task.load(None)

        with pytest.raises(InputError) as caught:
            use()
        assert [piece for piece in pieces if piece not in str(caught.value)] == [], str(caught.value)

    told(f"generation:{data}[prompt=promt]", "no column 'promt'", "nearest: 'prompt'")
    told(f"generation:{data}[template=x]", "template", "{prompt} once")
    told(f"generation:{data}[max_length=16,max_response=16]", "max_response = 16", "below max_length = 16")
    faces = tmp_path / "faces.jsonl"
    faces.write_text("".join(json.dumps({"prompt": f"film {n}", "response": "\U0001f600!"}) + "\n" for n in range(9)))
    told(f"generation:{faces}", "metric = rougeL counts words", "metric=exact_match")
    assert len(task_of(f"generation:{faces}[metric=exact_match]").load(None)[0]) > 0
    told(f"generation:{data}[metric=bleu]", "metric", "'rougeL', 'rouge1' or 'exact_match'")
    told("generation:/none/at/all.jsonl", "is not there")
    bert = str(tiny.write_bert(tmp_path / "bert"))
    told(f"generation:{data}", "is no causal language model", "BertModel", model=bert)
    told(f"generation:{data}[max_length=129]", "max_length = 129 is above the 128 positions", model=model)
