"""Generation: texts are text, whole, and compared alike; the model's own generation settings have no say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from harness.cli import main
from harness.method import Adaptation
from harness.notation import parse_choice
from harness.record.store import RecordStore
from harness.registry import make_task
from harness.run.data import data_of
from harness.run.prediction import predict
from harness.spec import Limits, TrainSpec
from harness.task import Examples
from tasks.generation import Generation
from tasks.pairs import EncodedPairs, tokenized
from tests.support import tiny_text

TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte-level": tiny_text.byte_level,
    "bpe": lambda: tiny_text.sentence_piece("bpe"),
    "bpe, always": lambda: tiny_text.sentence_piece("bpe", scheme="always"),
    "unigram": lambda: tiny_text.sentence_piece("unigram"),
    "unigram, always": lambda: tiny_text.sentence_piece("unigram", scheme="always"),
    "words": lambda: tiny_text.words(["user", "the", "task", "a"]),
}
CHAT = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
LONG = ["internationalization", "misunderstanding", "responsibilities", "accepted", "rejected"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_text.write_llama(tmp_path_factory.mktemp("llama"), tiny_text.byte_level())


def write_pairs(path: Path, pairs: list[tuple[str, str]]) -> Path:
    rows = ({"prompt": prompt, "response": response} for prompt, response in pairs)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def task_of(path: Path, settings: str = "") -> Generation:
    task = make_task(*parse_choice(f"generation:{path}[{settings}]"))
    assert isinstance(task, Generation)
    return task


def encoded(folder: str, pairs: list[tuple[str, str]], template: str = "{prompt}") -> EncodedPairs:
    prompts, responses = map(list, zip(*pairs, strict=True))
    examples = Examples({"prompt": prompts, "response": responses}, np.zeros(len(pairs)))
    return EncodedPairs(**tokenized(examples, folder, 200, 100, template))


def prompts_of(found: EncodedPairs) -> list[list[int]]:
    return [found.tokens[s : s + n].tolist() for s, n in zip(found.starts[:-1], found.prompts, strict=True)]


def responses_of(found: EncodedPairs) -> list[list[int]]:
    ends = zip(found.starts[:-1] + found.prompts, found.starts[1:], strict=True)
    return [found.tokens[start:end].tolist() for start, end in ends]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", ["{prompt}\n", "say: {prompt}", CHAT, "<|im_start|>{prompt}", "a</s>b {prompt}"])
def test_special_tokens_names_are_text_in_texts_and_tokens_in_the_template(kind, template, tmp_path):
    TOKENIZERS[kind]().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    plain = ["the task", " the task", "\nwas good", "", "фильм"]
    naming = ["a </s> e", "<|im_start|>", "the <|im_end|>user", "<|endoftext|> a</s>a"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    before, after = template.split("{prompt}")
    found = encoded(str(tmp_path), [(text, text) for text in plain], template)
    tail = tokenizer(after, add_special_tokens=False)["input_ids"]
    expected = [tokenizer(before + text)["input_ids"] + tail or [tokenizer.eos_token_id] for text in plain]
    assert prompts_of(found) == expected
    bare = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in plain]
    assert responses_of(found) == [[*ids, tokenizer.eos_token_id] for ids in bare]
    assert not found.named.any()

    special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special} - {tokenizer.unk_token_id}
    of_template = [n for n in tokenizer(before)["input_ids"] + tail if n in special]
    found = encoded(str(tmp_path), [(text, f"{text} a") for text in [*naming, *plain]], template)
    asked = prompts_of(found)
    for ids, response, text in zip(asked, responses_of(found), naming, strict=False):
        assert [n for n in ids if n in special] == of_template
        assert [n for n in response if n in special] == [tokenizer.eos_token_id]
        if kind != "words":  # which have no word for them
            assert text in tokenizer.decode(ids, skip_special_tokens=True)
            assert tokenizer.decode(response, skip_special_tokens=True).strip() == f"{text} a"
    assert asked[len(naming) :] == expected
    assert found.named.any()


def test_end_tokens_that_people_append_are_taken_off(model):
    ends = ["<|endoftext|>", "<|endoftext|>\n", " <|endoftext|>", "<|im_end|>\n<|endoftext|>", "<|im_end|>"]
    found = encoded(model, [("ask", f"a task{end}") for end in ["", *ends]], CHAT)
    assert found.responses == ["a task"] * 6
    assert responses_of(found) == responses_of(found)[:1] * 6
    assert found.ended.tolist() == [False, *[True] * 5]
    middle = encoded(model, [("ask", "a <|endoftext|> task "), ("ask", "<|endoftext|>")])
    assert middle.responses == ["a <|endoftext|> task ", ""]
    assert not middle.cut.any()


def test_what_is_taken_off_and_read_as_text_is_said(model, tmp_path):
    pairs = [("use <|im_end|>", "a<|endoftext|>"), *((f"ask {n}", "фильм") for n in range(40))]
    task = task_of(write_pairs(tmp_path / "pairs.jsonl", pairs))
    every = Examples({"prompt": [a for a, _ in pairs], "response": [b for _, b in pairs]}, np.zeros(41))
    said = "\n".join(task.facts(task.encode(every, model))["notes"])
    assert "1 responses came with an end token" in said
    assert "1 rows hold a special token's name" in said
    assert "any script" in said
    exact = task_of(tmp_path / "pairs.jsonl", "metric=exact_match")
    assert not any("script" in note for note in exact.facts(exact.encode(every, model))["notes"])


def test_notes_of_reading_and_of_encoding_stand_together(model, tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl", [(f"ask {n}", "the task<|endoftext|>") for n in range(20)])
    notes = data_of(task_of(path), None, Limits(), model).facts("train")["notes"]
    assert any("every response is the same" in note for note in notes)
    assert any("end token of their own" in note for note in notes)


def test_signs_that_a_tokenizer_cannot_write_are_said(tmp_path):
    folder = tiny_text.write_llama(tmp_path / "model", tiny_text.words(["the", "task"]))
    task = task_of(write_pairs(tmp_path / "pairs.jsonl", [(f"ask {n}", "the task") for n in range(9)]))
    rows = Examples({"prompt": ["a"] * 3, "response": ["the task", "the film", " the task\n"]}, np.zeros(3))
    assert "1 responses have signs that the tokenizer cannot write" in task.facts(task.encode(rows, folder))["notes"][0]


def greedy(module: Any, tokenizer: Any, ids: list[int], most: int) -> str:
    """Token by token, without padding."""
    start, row = len(ids), torch.tensor([ids])
    with torch.no_grad():
        while row.shape[1] < start + most:
            following = module(input_ids=row).logits[0, -1].argmax()
            if following == tokenizer.eos_token_id:
                break
            row = torch.cat([row, following[None, None]], dim=1)
    return str(tokenizer.decode(row[0, start:], skip_special_tokens=True))


def test_predictions_and_references_are_kept_whole(tmp_path):
    """Eight bytes a token would cut these to one and the same stump."""
    words = [*LONG, "item", *map(str, range(20)), *(f"{n}" * 30 for n in range(20, 80))]
    folder = tiny_text.write_llama(tmp_path / "model", tiny_text.words(words), positions=64)
    pairs = [(f"item {n}", " ".join([*LONG[:3], LONG[3 + n % 2]])) for n in range(20)]
    pairs[3] = ("item 3", "x" * 3000)  # one is longer than any token
    path = write_pairs(tmp_path / "pairs.jsonl", pairs)
    task = task_of(path, "max_length=16,max_response=5,metric=exact_match")
    examples = Examples({"prompt": [a for a, _ in pairs], "response": [b for _, b in pairs]}, np.zeros(len(pairs)))
    found = task.encode(examples, folder)
    gold = task.gold(Examples({}, examples.labels), found)
    assert gold.shape == (20, 3002)
    assert task.metrics(gold, gold)["exact_match"] == 1.0
    assert task.metrics(gold, np.roll(gold, 1, axis=0))["exact_match"] == 0.0
    backbone = task.backbone(folder)
    adaptation = Adaptation(backbone.module, torch.optim.SGD(backbone.module.parameters()), backbone)
    made = predict(adaptation, task, found, gold, TrainSpec(batch_size=2), torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [bytes(row[row >= 0].astype(np.uint8)).decode() for row in made[:, 2:]]
    assert texts == [greedy(backbone.module.eval(), tokenizer, ids, 5) for ids in prompts_of(found)]
    assert max(map(len, texts)) > 40


VALUES: dict[str, Any] = {
    "bad_words_ids": [[5], [6]],
    "sequence_bias": [[[7], 50.0]],
    "suppress_tokens": [5, 6],
    "begin_suppress_tokens": [5, 6],
    "stop_strings": ["a", "e"],
    "eos_token_id": [5, 6, 7],
    "exponential_decay_length_penalty": [1, 2.0],
    "cache_implementation": "static",
    "cache_config": {},
    "early_stopping": True,
    "do_sample": True,
    "use_cache": False,
    "repetition_penalty": 9.0,
    "forced_eos_token_id": 7,
    "watermarking_config": None,
    "compile_config": None,
    "continuous_batching_config": None,
}


@pytest.fixture(scope="module")
def loaded(model, tmp_path_factory) -> tuple[Generation, Any, Any]:
    path = write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", [(f"ask {n} x", "the task") for n in range(9)])
    task = task_of(path, "max_length=64,max_response=12")
    train, _ = task.load(None)
    return task, task.backbone(model).module.eval(), task.collate(task.encode(train, model), range(4), None)


@pytest.mark.parametrize("name", [name for name in vars(GenerationConfig()) if not name.startswith("_")])
def test_no_setting_of_the_models_own_changes_a_prediction(name, loaded):
    task, module, batch = loaded
    with torch.no_grad():
        expected = task.predict(module, batch)
        kept = module.generation_config
        module.generation_config = GenerationConfig()
        setattr(module.generation_config, name, VALUES.get(name, 3))
        try:
            given = module.generation_config
            assert torch.equal(task.predict(module, batch), expected)
            assert module.generation_config is given
        finally:
            module.generation_config = kept


def test_a_generation_config_beside_the_weights_is_not_obeyed(model, tmp_path):
    other = tiny_text.write_llama(tmp_path / "other", tiny_text.byte_level())
    settings = {"repetition_penalty": 5.0, "min_new_tokens": 9, "no_repeat_ngram_size": 1, "num_beams": 3}
    (tmp_path / "other" / "generation_config.json").write_text(json.dumps(settings))
    path = write_pairs(tmp_path / "pairs.jsonl", [(f"ask {n}", f"a task {n % 3}") for n in range(30)])
    tasks = f"generation:{path}[max_length=32,max_response=8]"
    scores = []
    for place in (model, other):
        options = [
            "--model",
            place,
            "--batches",
            "3",
            "--batch-size",
            "4",
            "--results",
            str(tmp_path / f"{len(scores)}"),
        ]
        methods = "lora[rank=2,learning_rate=1e-2]"
        assert main(["run", "--executor", "serial", "--methods", methods, "--tasks", tasks, *options]) == 0
        (record,) = RecordStore(tmp_path / f"{len(scores)}").records()
        scores.append((record.run_id, record.metrics))
    assert scores[0] == scores[1]


def test_what_a_model_says_of_a_row_does_not_depend_on_the_rows_beside_it(loaded):
    task, module, _ = loaded
    pairs = [("a", "b"), ("ask for a long task with many words", "the"), ("x y", "a response that is long")]
    examples = Examples({"prompt": [a for a, _ in pairs], "response": [b for _, b in pairs]}, np.zeros(3))
    found = task.encode(examples, module.config.name_or_path)
    with torch.no_grad():
        together = task.outputs(module, task.collate(found, range(3), None))
        alone = torch.cat([task.outputs(module, task.collate(found, [row], None)) for row in range(3)])
    assert together.shape == (3, 1 + module.config.vocab_size)
    assert torch.allclose(together, alone, atol=1e-4)
