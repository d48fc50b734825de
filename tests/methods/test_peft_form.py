"""Methods as a configuration of stock PEFT: the parameters and the scaling are those of our own run."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from harness import installed
from harness.contracts import Subject, start
from harness.contracts.subject import method_of, task_of
from harness.registry import make_method

KINDS = ("attention.self.query", "attention.output.dense", "intermediate.dense")


def ranks_of(name):
    """Ranks that differ by layer, one of them 0, for the layers of a tiny BERT."""
    layers = task_of("synthetic").backbone(None, meta=True).layers
    return {layer: (4 if name.startswith("lora") else 3 * (place % 3)) for place, layer in enumerate(layers)}


def loaded(config):
    """PEFT's own model of a configuration as JSON has it."""
    model = task_of("synthetic").backbone(None).module
    return get_peft_model(model, LoraConfig(**json.loads(json.dumps({"peft_type": "LORA", **config}))))


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("lora[rank=4,alpha=12]", 3.0),
        ("lora[rank=4,alpha=12,rslora=true]", 6.0),
        ("lora[parameters_of=debora,alpha=12]", 3.0),
        ("lora[rank=4,dora=true]", 4.0),
        ("lora[rank=4,init=pissa,dropout=0.1]", 4.0),
        ('lora[rank=2,rank_pattern={"query"=4,"dense"=4,"key"=4,"value"=4}]', 8.0),
        ("pruned_lora[rank=4,alpha=6]", 1.5),
        ("adalora[init_rank=8,target_rank=4,alpha=16]", 2.0),
        ("debora[rank=4,tau=2,budget_scope=layer]", 0.5),
        ("debora[rank=4,tau=24,budget_scope=global]", 0.5),
    ],
)
def test_stock_peft_makes_the_adapter_that_is_trained_here(name, scale, tmp_path):
    ranks = ranks_of(name)
    form = method_of(name).peft_form(ranks)
    model = loaded(form.config)
    found = {
        path.removeprefix("base_model.model."): layer
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert {layer: part.r["default"] for layer, part in found.items()} == {k: r for k, r in ranks.items() if r}
    assert {part.scaling["default"] for part in found.values()} == {scale}
    backbone = task_of("synthetic").backbone(None)
    ours = make_method(form.method, form.parameters).start(backbone, None, None, torch.Generator())
    assert ours.ranks() == ranks
    assert model.get_nb_trainable_parameters()[0] == ours.adapter_parameters()
    assert {part.scaling["default"] for part in ours.layers.values()} == {scale}


def test_the_parameters_of_a_finished_lora_are_those_of_its_file(tmp_path):
    started = start(Subject("lora[rank=3]", tmp_path))
    form = started.method.peft_form(started.adaptation.ranks())
    assert form.method == "lora"
    assert loaded(form.config).get_nb_trainable_parameters()[0] == started.adaptation.adapter_parameters()


@pytest.mark.parametrize("name", ["head", "full", "bitfit", "hadapter", "debora[geometry=oblique]"])
def test_what_is_no_lora_has_no_form(name):
    assert method_of(name).peft_form(ranks_of(name)) is None


def test_a_lora_without_a_rank_has_no_form():
    assert method_of("adalora").peft_form({"a": 0}) is None


def test_a_method_that_is_not_installed_or_knows_other_parameters_has_no_form():
    assert installed.peft_form("gone", {}, {"a": 1}) is None
    assert installed.peft_form("lora", {"rank": -1}, {"a": 1}) is None
    assert installed.shown_parameters("gone", {"x": 1}) == {"x": 1}
