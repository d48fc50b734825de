"""Tuners that put tokens of their own before the text, on language models: they are there in losses and in answers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import registry
from harness.contracts import Subject
from harness.contracts.subject import start
from harness.notation import parse_choice
from harness.spec import Place
from tasks.causal import response_losses
from tasks.choices import log_likelihoods
from tasks.text_sample import window_losses
from tests.support import tiny
from tests.tasks.test_multiple_choice import PLACES, row_of, write

pytestmark = pytest.mark.filterwarnings("ignore:Position ids are not supported")  # PEFT says so
TUNERS = ("prompt_tuning", "p_tuning", "prefix_tuning", "cartridge")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny.write_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write_pairs(tmp_path_factory.mktemp("data"))


@pytest.fixture(params=TUNERS)
def adapted(request, model, data, tmp_path) -> Any:
    """(task, model) with a prompt that says something: random, large numbers."""
    task = f"generation:{data}[max_length=32,max_response=6]"
    name = f"peft[type={request.param},num_virtual_tokens=4]"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = start(Subject(name, tmp_path, task, batches=2, place=Place(model=model)))
    module = run.adaptation.model.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=3.0)
    return run.task, module


def logits_of(module: Any, ids: torch.Tensor) -> torch.Tensor:
    """(tokens, vocabulary) of one row alone."""
    found: torch.Tensor = module(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), use_cache=False).logits
    return found[0, -len(ids) :]


def unprompted(module: Any) -> Any:
    return module.get_base_model()


@torch.no_grad()
def test_losses_are_those_of_the_rows_with_the_prompt_before_them(adapted, model):
    task, module = adapted
    rows, _ = task.load(None)
    encoded = task.encode(rows, model)
    batch = task.collate(encoded, [0, 1, 2, 3], torch.Generator().manual_seed(0))
    sums, counts = response_losses(module, batch)
    for row in range(4):
        ids = batch.inputs["input_ids"][row][batch.inputs["attention_mask"][row].bool()]
        size = int(counts[row])
        nats = logits_of(module, ids).log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
        assert sums[row].item() == pytest.approx(-nats[-size:].sum().item(), rel=1e-4)
    bare, _ = response_losses(unprompted(module), batch)
    assert not torch.allclose(sums, bare, rtol=1e-5, atol=0)
    ids = batch.inputs["input_ids"][:1, :6]
    by_hand = -logits_of(module, ids[0]).log_softmax(-1)[torch.arange(5), ids[0, 1:]].mean()
    assert window_losses(module, ids).item() == pytest.approx(by_hand.item(), rel=1e-4)


@torch.no_grad()
def test_answers_are_the_greedy_ones_after_the_prompt(adapted, model):
    from transformers import AutoTokenizer

    task, module = adapted
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows, _ = task.load(None)
    encoded = task.encode(rows, model)
    differ = 0
    for row in range(4):
        batch = task.collate(encoded, [row], None)
        found = task.predict(module, batch).numpy()[0, 2:]
        text = bytes(found[found >= 0].astype("uint8")).decode()
        answers = []
        for of in (module, unprompted(module)):
            ids = batch.inputs["prompt_ids"][0]
            prompt = len(ids)
            for _ in range(6):
                following = logits_of(of, ids)[-1].argmax()
                if following == tokenizer.eos_token_id:
                    break
                ids = torch.cat([ids, following[None]])
            answers.append(tokenizer.decode(ids[prompt:], skip_special_tokens=True))
        assert text == answers[0]
        differ += answers[0] != answers[1]
    assert differ


@torch.no_grad()
def test_choices_are_read_after_the_prompt(adapted, model, tmp_path):
    _, module = adapted
    for split in ("train", PLACES["arc_easy"][1]):
        write(tmp_path, "arc_easy", split, [row_of("arc_easy", number) for number in range(12)])
    task = registry.make_task(*parse_choice("multiple_choice/arc_easy[max_length=64]"))
    rows, _ = task.load(str(tmp_path))
    batch = task.collate(task.encode(rows, model), [0, 1, 2], None)
    found, given = log_likelihoods(module, batch), batch.inputs
    for number, context in enumerate(given["context_of"].tolist()):
        before = given["context_ids"][context][given["context_mask"][context].bool()]
        choice = given["choice_ids"][number][given["choice_mask"][number].bool()]
        ids = torch.cat([before, choice])
        nats = logits_of(module, ids).log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
        assert found[number].item() == pytest.approx(nats[len(before) :].sum().item(), rel=1e-4)


@torch.no_grad()
def test_answers_do_not_depend_on_the_rows_beside_them(adapted, model):
    task, module = adapted
    rows, _ = task.load(None)
    encoded = task.encode(rows, model)
    together = task.outputs(module, task.collate(encoded, [0, 1, 2, 3, 4], None))
    for row in range(5):
        alone = task.outputs(module, task.collate(encoded, [row], None))
        assert torch.allclose(together[row], alone[0], atol=1e-4)
