"""Multiple choice: schemas, log-likelihoods of the choices and accuracy, on made rows and tiny models."""

from __future__ import annotations

import re
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
from harness.plan.trial import difference
from harness.record.store import RecordStore
from harness.report.evidence.examples import example_scores
from harness.spec import Place, TrainSpec
from tasks.choice_sources import SOURCES
from tasks.choices import log_likelihoods
from tasks.multiple_choice import ACCURACY, MultipleChoice
from tests.support import tiny, tiny_text

PLACES = {
    "arc_easy": ("allenai/ai2_arc/ARC-Easy", "test"),
    "arc_challenge": ("allenai/ai2_arc/ARC-Challenge", "test"),
    "openbookqa": ("allenai/openbookqa/main", "test"),
    "boolq": ("google/boolq/default", "validation"),
    "hellaswag": ("Rowan/hellaswag/default", "validation"),
    "piqa": ("ybisk/piqa/plain_text", "validation"),
    "winogrande": ("allenai/winogrande/winogrande_xl", "validation"),
}
NAME = "multiple_choice/arc_easy[max_length=64]"
OPTIONS = ["the film", "a story", "music", "one scene", "bad actor"]


def listed(number: int, sizes: tuple[int, ...] = (4, 3, 5)) -> dict[str, Any]:
    """Choices {text, label} and answerKey; the question's word gives the right one away."""
    size = sizes[number % len(sizes)]
    right = number % size
    texts = [OPTIONS[(place - right) % 5] for place in range(size)]
    return {"choices": {"text": texts, "label": list("ABCDE"[:size])}, "answerKey": "ABCDE"[right]}


def row_of(member: str, number: int) -> dict[str, Any]:
    text = f"the {tiny.FILLERS[number % 14]} {tiny.MARKS[number % 5]} {tiny.MARKS[number // 5 % 5]}"
    return {
        "arc_easy": {"question": text, **listed(number)},
        "arc_challenge": {"question": text, **listed(number, (4,))},
        "openbookqa": {"question_stem": text, **listed(number, (4,))},
        "boolq": {"passage": text, "question": "was it good", "answer": number % 3 == 0},
        "hellaswag": {
            "activity_label": "Film",
            "ctx_a": f"{text} [header] odd [title] was",
            "ctx_b": "and the" if number % 2 else "",
            "endings": OPTIONS[:4],
            "label": str(number % 4),
        },
        "piqa": {"goal": text, "sol1": "good", "sol2": "bad", "label": number % 2},
        "winogrande": {
            "sentence": f"{text} and _ was good",
            "option1": "film",
            "option2": tiny.FILLERS[3 + number % 5],
            "answer": "12"[number % 2],
        },
    }[member]


def write(root: Path, member: str, split: str, rows: list[dict[str, Any]]) -> None:
    place = root / PLACES[member][0] / f"{split}-00000-of-00001.parquet"
    tiny.write_parquet(place, {name: [row[name] for row in rows] for name in rows[0]})


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    for member, (_, evaluation) in PLACES.items():
        for split, count in (("train", 60), (evaluation, 24)):
            write(folder, member, split, [row_of(member, number) for number in range(count)])
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny.write_llama(tmp_path_factory.mktemp("llama")))


def task_of(text: str) -> MultipleChoice:
    settings = "" if "[" in text else "[max_length=64]"
    task = registry.make_task(*parse_choice(f"multiple_choice/{text}{settings}"))
    assert isinstance(task, MultipleChoice)
    return task


@pytest.mark.parametrize("contract", TASK_CONTRACTS, ids=lambda contract: contract.__name__)
def test_contract(contract, root, model, tmp_path):
    place = Place(model=model, data_root=str(root))
    contract(Subject(NAME, tmp_path, method="full[learning_rate=1e-3]", batches=2, place=place))


@pytest.mark.parametrize(
    ("member", "contexts", "choices", "right"),
    [
        ("arc_easy", ["Question: the a two one\nAnswer:"] * 3, ["bad actor", "the film", "a story"], 1),
        ("openbookqa", ["the a two one"] * 4, ["bad actor", "the film", "a story", "music"], 1),
        ("boolq", ["the a two one\nQuestion: was it good?\nAnswer:"] * 2, ["no", "yes"], 0),
        ("hellaswag", ["Film: the a two one odd. was And the"] * 4, OPTIONS[:4], 1),
        ("piqa", ["Question: the a two one\nAnswer:"] * 2, ["good", "bad"], 1),
        ("winogrande", ["the a two one and film", "the a two one and plot"], ["was good"] * 2, 1),
    ],
)
def test_schemas(member, contexts, choices, right, root):
    train, evaluation = task_of(member).load(str(root))
    assert list(evaluation) == [PLACES[member][1]]
    found = (list(train.columns["contexts"][1]), list(train.columns["choices"][1]), int(train.labels[1]))
    assert found == (contexts, choices, right)
    assert (len(train), len(evaluation[PLACES[member][1]])) == (60, 24)


def alone(module: Any, context: list[int], choice: list[int]) -> float:
    """Log-likelihood of a choice by one forward over the whole, without padding or a cache."""
    logs = module(input_ids=torch.tensor([[*context, *choice]])).logits[0].log_softmax(-1)
    return float(sum(logs.detach()[len(context) + n - 1, token] for n, token in enumerate(choice)))


@pytest.mark.parametrize("member", ["arc_easy", "winogrande"])
def test_log_likelihoods_are_those_of_each_choice_alone(member, root, model):
    task = task_of(member)
    train, _ = task.load(str(root))
    module = task.backbone(model).module.eval()
    encoded = task.encode(train, model)
    batch = task.collate(encoded, [4, 0, 1, 5], None)
    with torch.no_grad():
        found = log_likelihoods(module, batch).tolist()
        expected = [
            alone(module, encoded.contexts[encoded.context_of[choice]].tolist(), encoded.choices[choice].tolist())
            for question in encoded.of([4, 0, 1, 5])
            for choice in question
        ]
    assert found == pytest.approx(expected, abs=1e-4)
    assert len({round(value, 3) for value in found}) > 4
    contexts = len(batch.inputs["context_ids"])  # each is read once
    assert contexts == (4 if member == "arc_easy" else 8)


def test_plain_and_by_length(root, model):
    task = task_of("arc_easy")
    train, _ = task.load(str(root))
    module = task.backbone(model).module.eval()
    encoded = task.encode(train, model)
    with torch.no_grad():
        batch = task.collate(encoded, range(20), None)
        values = iter(log_likelihoods(module, batch).tolist())
        chosen = task.predict(module, batch).numpy()
    best = []
    for row in range(20):
        texts = train.columns["choices"][row]
        sums = [next(values) for _ in texts]
        best.append([np.argmax(sums), np.argmax([s / len(text) for s, text in zip(sums, texts, strict=True)])])
    assert chosen.tolist() == np.array(best).tolist()
    assert (chosen[:, 0] != chosen[:, 1]).any()
    gold = task.gold(train, encoded)[:20]
    found = task.metrics(chosen, gold)
    assert found["accuracy"] == np.mean(chosen[:, 0] == train.labels[:20])
    assert found["accuracy_by_length"] == np.mean(chosen[:, 1] == train.labels[:20])
    assert task_of("arc_easy[metric=accuracy_by_length]").headline == "accuracy_by_length"


def test_the_right_choice_alone_is_learned(root, model):
    task = task_of("boolq")
    train, _ = task.load(str(root))
    encoded = task.encode(train, model)
    batch = task.collate(encoded, [0, 1], torch.Generator())
    module = task.backbone(model).module
    expected = []
    for row in (0, 1):
        choice = encoded.of([row])[0][train.labels[row]]
        ids = encoded.choices[choice].tolist()
        expected.append(-alone(module, encoded.contexts[encoded.context_of[choice]].tolist(), ids) / len(ids))
    assert task.loss(module, batch, None).item() == pytest.approx(np.mean(expected), abs=1e-4)


def test_training_teaches_the_choices_and_examples_are_paired(root, model, tmp_path):
    options = ["--data-root", str(root), "--model", model, "--batch-size", "8", "--results", str(tmp_path)]
    run = ["run", "--executor", "serial", "--methods", "full[learning_rate=1e-2]", "--tasks", NAME]
    assert main([*run, "--batches", "40", *options]) == 0
    store = RecordStore(tmp_path)
    (record,) = store.records()
    assert record.score == record.metrics["accuracy"] > 0.9
    kept = store.folder(record.run_id) / "predictions.safetensors"
    values = example_scores(kept, "test", ACCURACY, record.score, rows=24)
    assert values is not None
    assert set(np.unique(values.round(6))) <= {0.0, 1.0}


def test_a_long_context_loses_its_beginning(root, model):
    whole, cut = (task_of(f"arc_easy[max_length={length}]") for length in (64, 8))
    train, _ = whole.load(str(root))
    one, two = whole.encode(train, model), cut.encode(train, model)
    assert two.contexts[0].tolist()[0] == one.contexts[0].tolist()[0]  # what the tokenizer puts before a text stays
    assert two.contexts[0].tolist()[1:] == one.contexts[0].tolist()[-len(two.contexts[0]) + 1 :]
    assert two.choices[0].tolist() == one.choices[0].tolist()
    assert whole.facts(one)["truncated_share"] == 0.0
    assert cut.facts(two)["truncated_share"] == 1.0
    assert cut.lengths(two).max() <= 8
    assert whole.facts(one)["notes"] == ["questions by their number of choices: 3 (20), 4 (20), 5 (20)"]


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "mistral", "gpt_neox"])
def test_families_read_a_context_once(family, root, tmp_path):
    """Learned positions, those counted from the mask, ALiBi, a sliding window."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny.write_llama(tmp_path)
    sizes = {"vocab_size": len(tiny.SPECIAL + tiny.FILLERS + tiny.SIGNS + tiny.MARKS), "pad_token_id": 0}
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    own: dict[str, dict[str, Any]] = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "opt": {**shape, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        "mistral": {**shape, "num_key_value_heads": 2, "intermediate_size": 64, "sliding_window": 6},
        "gpt_neox": {**shape, "intermediate_size": 64, "max_position_embeddings": 64},
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes, **own[family], bos_token_id=None, eos_token_id=3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    task = task_of("arc_easy[max_length=32]")
    train, _ = task.load(str(root))
    encoded = task.encode(train, str(tmp_path))
    module = task.backbone(str(tmp_path)).module.eval()
    found = difference(task, module, encoded, [0, 1, 2, 3], TrainSpec())
    assert found is not None
    assert found.reason is None
    with torch.no_grad():
        values = log_likelihoods(module, task.collate(encoded, [0, 1], None))
        context, choice = encoded.contexts[1].tolist(), encoded.choices[encoded.of([1])[0][0]].tolist()
        assert float(values[4]) == pytest.approx(alone(module, context, choice), abs=1e-4)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_choice_has_the_tokens_that_it_has_in_the_whole_text(kind, root, tmp_path):
    folder = tiny_text.write_llama(tmp_path, tiny_text.sentence_piece(kind))
    task = task_of("piqa")
    train, _ = task.load(str(root))
    encoded = task.encode(train, folder)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for place, text in enumerate(train.columns["choices"][0]):
        whole = tokenizer(f"{train.columns['contexts'][0][0]} {text}")["input_ids"]
        assert [*encoded.contexts[0].tolist(), *encoded.choices[place].tolist()] == whole


@pytest.mark.parametrize(
    ("member", "change", "said"),
    [
        ("arc_easy", {"answerKey": "F"}, "row 1: answerKey = 'F' is not among the labels A, B, C"),
        (
            "arc_easy",
            {"choices": {"text": ["a", "b"], "label": ["A", "B", "C"]}, "answerKey": "A"},
            "row 1: choices has 2 texts and 3 labels",
        ),
        ("arc_easy", {"choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}, "row 1: 1 choices are not enough"),
        ("arc_easy", {"choices": {"text": ["a", " "], "label": ["A", "B"]}, "answerKey": "A"}, "choice ' '"),
        ("arc_easy", {"question": None}, "row 1: question = None is not allowed: it should be a text"),
        ("boolq", {"answer": None}, "row 1: answer = None is not allowed: it should be False or True"),
        ("hellaswag", {"label": ""}, "row 1: label = '' is not allowed"),
        ("piqa", {"label": -1}, "row 1: label = -1 is not allowed: it should be 0 or 1"),
        ("winogrande", {"sentence": "no gap"}, "it should have a gap '_' and text after it"),
    ],
)
def test_rows_of_another_schema(member, change, said, tmp_path):
    rows = [row_of(member, 0), row_of(member, 1) | change, row_of(member, 2)]
    write(tmp_path, member, "train", rows)
    with pytest.raises(InputError, match="train in") as caught:
        task_of(member).load(str(tmp_path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_column_of_another_type():
    with pytest.raises(ValueError, match="ctx_b = 3 is not allowed: it should be a text"):
        SOURCES["hellaswag"].question(row_of("hellaswag", 1) | {"ctx_b": 3})


def test_a_length_that_has_no_room_for_a_choice(root, model, tmp_path, capsys):
    """In an evaluation row alone, which a run would reach last."""
    for split, number in (("train", 60), ("validation", 24)):
        rows = [row_of("piqa", row) for row in range(number)]
        if split == "validation":
            rows[5]["sol1"] = "good " * 90
        write(tmp_path, "piqa", split, rows)
    task = "multiple_choice/piqa[max_length=64]"
    given = ["run", "--tasks", task, "--methods", "head", "--model", model, "--data-root", str(tmp_path)]
    assert main([*given, "--results", str(tmp_path / "results")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "multiple_choice/piqa" in line
    found = re.search(r"max_length = 64 is too short for its choices: give (\d+) or more", line)
    assert found is not None
    rows = [row_of("piqa", row) | {"sol1": "good " * 90} for row in range(3)]
    write(tmp_path, "piqa", "train", rows)
    least = task_of(f"piqa[max_length={found[1]}]")
    train, _ = least.load(str(tmp_path))
    assert least.lengths(least.encode(train, model)).max() == int(found[1])


def test_an_unknown_data_set():
    with pytest.raises(InputError, match="multiple_choice/arc_easy"):
        task_of("arc_esay")
