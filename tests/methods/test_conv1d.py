"""GPT-2's layers are transformers' Conv1D, linear with a transposed weight: every method does on them what it does on
nn.Linear, and what it writes is read by stock PEFT."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2Model, ImageGPTConfig, OpenAIGPTConfig
from transformers.pytorch_utils import Conv1D

from harness.cli import main
from harness.contracts import METHOD_CONTRACTS, Subject
from harness.contracts.subject import Started, method_of, start
from harness.errors import InputError
from harness.method import Backbone
from harness.record.store import RecordStore
from harness.spec import Place
from methods.shared.peft_model import shuffled
from tasks.glue import Glue
from tasks.pretrained import head_and_layers, load_backbone
from tests.support import tiny

pytestmark = pytest.mark.filterwarnings("ignore:lora with eva initialization:UserWarning")

WIDTH, BLOCKS = 32, 2
LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
SIDES = BLOCKS * (WIDTH + 3 * WIDTH + 2 * WIDTH + 2 * (WIDTH + 4 * WIDTH))  # outputs and inputs of all layers
METHODS = [
    "lora[rank=4]",
    "lora[rank=4,dora=true]",
    "lora[rank=4,init=pissa]",
    "lora[rank=4,init=orthogonal]",
    'lora[rank=4,rank_pattern={"c_proj"=2},shuffle_ranks=true]',
    "pruned_lora[rank=4,keep=0.4]",
    "adalora[init_rank=6,target_rank=3]",
    "increlora",
    "triadaptlora[target_rank=3]",
    "debora[rank=4,T_max=2,n0=0,step_size=0.5]",
    "debora[rank=4,T_max=2,n0=0,step_size=0.5,geometry=oblique,hypergradient=implicit]",
    "debora[rank=4,T_max=2,n0=0,step_size=0.5,geometry=stiefel]",
    "peft[type=lora,r=2,init_lora_weights=eva,eva_config={rho=2.0,tau=0.5}]",
    "gora[rank=4,batches=2]",
    "ralora[rank=2,batches=2]",
    "lora_pro[rank=4]",
    "svfit[rank=4]",
    "salt[head=3,rank=2]",
    "hydra[parallel_rank=2,sequential_rank=3]",
    "plop[rank=2,types=2,batches=2]",
    "lora_squeeze[rank=4,squeeze=in_training,components=7]",
    "sora[rank=4,threshold=0.05]",
    "l1ra[rank=3,gate_learning_rate=0.3,every=0.2]",
    "peft[type=ia3]",
    "peft[type=vera,r=4]",
    "bitfit",
    "full[learning_rate=1e-3]",
]
NOT_STOCK = ("bitfit", "full")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    """GLUE in its published layout, and a GPT-2 of 2 layers x 32 with the tokenizer of `tiny`."""
    folder = tmp_path_factory.mktemp("gpt2")
    tiny.write_data_root(folder / "data")
    tiny.write_tokenizer(folder / "model")
    settings = json.loads((folder / "model" / "tokenizer_config.json").read_text())
    settings |= {"model_input_names": ["input_ids", "attention_mask"]}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    GPT2Model(gpt2_config()).save_pretrained(folder / "model")
    return Place(data_root=str(folder / "data"), model=str(folder / "model"))


def gpt2_config(**settings) -> GPT2Config:
    ends = {"bos_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    sizes = {"n_embd": WIDTH, "n_layer": BLOCKS, "n_head": 2, "n_positions": 128, "initializer_range": 0.1}
    settings = {"use_cache": False} | settings  # which checkpointing turns off: attention then adds up in another order
    return GPT2Config(vocab_size=tiny.SIZES["vocab_size"], **sizes, **(ends | settings))


def with_linear(module: nn.Module, names: tuple[str, ...] = LAYERS) -> nn.Module:
    """The same function, with nn.Linear in place of those Conv1D whose names end so; `module` is changed."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, Conv1D) and name.endswith(names):
            linear = nn.Linear(layer.nx, layer.nf, device="meta")  # no random number is drawn
            linear.weight = nn.Parameter(layer.weight.detach().T.contiguous())
            linear.bias = nn.Parameter(layer.bias.detach())
            module.set_submodule(name, linear)
    return module


@pytest.fixture
def linear_twin(monkeypatch):
    """Call it, and from then on the task's GPT-2 has nn.Linear."""
    own = Glue.backbone

    def twin(task: Glue, *args, **kwargs) -> Backbone:
        backbone = own(task, *args, **kwargs)
        return dataclasses.replace(backbone, module=with_linear(backbone.module))

    return lambda: monkeypatch.setattr(Glue, "backbone", twin)


def subject(name: str, folder: Path, place: Place) -> Subject:
    return Subject(name, folder, task="glue/sst2", batches=16, place=place)


def trained(name: str, folder: Path, place: Place) -> Started:
    run = start(subject(name, folder, place))
    run.training.run(lambda training: None)
    run.adaptation.export(folder)
    return run


def logits(run: Started, module: nn.Module) -> torch.Tensor:
    inputs = run.task.collate(run.training.encoded, range(8), None).inputs
    with torch.no_grad():
        return module.eval()(**inputs).logits


def test_the_layers_and_their_shapes(place):
    backbone = load_backbone(place.model, "AutoModelForSequenceClassification", 3)
    assert backbone.layers == tuple(f"transformer.h.{block}.{layer}" for block in range(BLOCKS) for layer in LAYERS)
    assert backbone.head == ("score",)
    shapes = [backbone.shape(layer) for layer in backbone.layers[:4]]
    assert shapes == [(96, 32), (32, 32), (128, 32), (32, 128)]  # (outputs, inputs)
    twin = dataclasses.replace(backbone, module=with_linear(copy.deepcopy(backbone.module)))
    assert [twin.shape(layer) for layer in twin.layers[:4]] == shapes


@pytest.mark.parametrize(
    ("auto_class", "config"),
    [
        ("AutoModelForCausalLM", gpt2_config()),
        ("AutoModelForSequenceClassification", OpenAIGPTConfig(n_embd=16, n_layer=1, n_head=2)),
        ("AutoModelForImageClassification", ImageGPTConfig(n_embd=16, n_layer=1, n_head=2)),
    ],
    ids=["gpt2-lm", "openai-gpt", "imagegpt"],
)
def test_conv1d_is_found_in_every_family_that_has_it(auto_class, config):
    import transformers

    with torch.device("meta"):
        module = getattr(transformers, auto_class).from_config(config)
    _, layers = head_and_layers(module, "tiny")
    assert set(layers) == {name for name, part in module.named_modules() if isinstance(part, Conv1D)}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_does_what_it_does_on_linear_layers(name, tmp_path, place, linear_twin):
    """Losses, ranks, counts and what is exported. Only then is the layer's transposition right everywhere."""
    own = trained(name, tmp_path / "own", place)
    linear_twin()
    twin = trained(name, tmp_path / "twin", place)
    losses = [[row["loss"] for row in run.training.history] for run in (own, twin)]
    assert losses[0] == pytest.approx(losses[1], rel=0, abs=1e-6)
    assert own.adaptation.ranks() == twin.adaptation.ranks()
    assert own.training.sizes.parameters() == twin.training.sizes.parameters()
    files = [load_file(next((tmp_path / side).glob("*.safetensors"))) for side in ("own", "twin")]
    assert files[0].keys() == files[1].keys()
    for key, value in files[0].items():
        if "full" not in name:  # which exports the layers themselves
            torch.testing.assert_close(value, files[1][key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith(NOT_STOCK)])
def test_an_export_is_read_by_stock_peft_on_a_plain_model_and_merges(name, tmp_path, place):
    run = trained(name, tmp_path, place)
    expected = logits(run, run.adaptation.model)
    assert (expected - logits(run, run.before.module)).abs().max() > 1e-4
    plain = AutoModelForSequenceClassification.from_pretrained(place.model, num_labels=2)
    loaded = PeftModel.from_pretrained(plain, tmp_path)  # a warning, of transposed weights for one, would be an error
    torch.testing.assert_close(logits(run, loaded), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(run, loaded.merge_and_unload()), expected, rtol=0, atol=1e-5)


def test_a_sweep_over_gpt2_from_the_command_line(tmp_path, place, capsys):
    methods = "lora,adalora,debora,peft[type=ia3]"
    options = [
        "--methods",
        methods,
        "--tasks",
        "glue/sst2",
        "--batches",
        "4",
        "--batch-size",
        "8",
        "--tracking-uri",
        "off",
        "--save-adapter",
    ]
    paths = ["--model", str(place.model), "--data-root", str(place.data_root), "--results", str(tmp_path)]
    assert main(["run", *options, *paths, "--executor", "serial"]) == 0
    records = list(RecordStore(tmp_path).records())
    assert [record.status for record in records] == 4 * ["done"]
    assert all(record.parameters.adapter_final > 0 for record in records)
    assert "fan_in_fan_out" not in capsys.readouterr().err


def test_merged_in_place_debora_computes_the_same_and_is_taken_out_again(tmp_path, place):
    run = trained("debora[rank=4,T_max=2,n0=0,step_size=0.5]", tmp_path, place)
    expected, model = logits(run, run.adaptation.model), run.adaptation.model
    model.merge_adapter()
    torch.testing.assert_close(logits(run, model), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(run, model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["lora[rank=3]", "adalora[init_rank=3,target_rank=2]", "debora[rank=3]"])
def test_counts(method, place):
    backbone = load_backbone(place.model, "AutoModelForSequenceClassification", 3)
    whole = sum(p.numel() for p in backbone.module.parameters())
    run = start(subject(method, Path(), place))
    extra = 0 if "[rank=3]" in method and "lora" in method else 3 * 4 * BLOCKS  # E or s
    count = run.training.sizes.parameters()
    assert count.adapter_initial == 3 * SIDES + extra
    assert count.total == whole - WIDTH + 3 * SIDES + extra  # the task has two classes, not three


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")  # PEFT's, of one model with both
@pytest.mark.parametrize("method", ["lora[rank=4]", "adalora[init_rank=6,target_rank=3]", "debora[rank=4]"])
def test_a_model_with_layers_of_both_kinds(method, tmp_path, place, monkeypatch):
    own = Glue.backbone

    def mixed(task: Glue, *args, **kwargs) -> Backbone:
        backbone = own(task, *args, **kwargs)
        return dataclasses.replace(backbone, module=with_linear(backbone.module, ("mlp.c_fc", "attn.c_proj")))

    whole = trained(method, tmp_path / "whole", place)
    monkeypatch.setattr(Glue, "backbone", mixed)
    run = trained(method, tmp_path / "mixed", place)
    expected = logits(run, run.adaptation.model)
    torch.testing.assert_close(expected, logits(whole, whole.adaptation.model), rtol=0, atol=1e-5)
    loaded = PeftModel.from_pretrained(run.before.module, tmp_path / "mixed")
    torch.testing.assert_close(logits(run, loaded), expected, rtol=0, atol=1e-5)


# What training gives is that of the twin: left are those of state, counts and cuts.
OF_TRAINING = ("loss_falls_on_a_batch_that_can_be_memorised", "the_same_seed_gives_the_same_record")
CONTRACTS = [contract for contract in METHOD_CONTRACTS if contract.__name__ not in OF_TRAINING]


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.__name__)
@pytest.mark.parametrize(
    "method",
    [
        "lora[rank=4]",
        "pruned_lora[rank=4,keep=0.4]",
        "adalora[init_rank=6,target_rank=3]",
        "debora[rank=4,T_max=2,n0=0,step_size=0.5]",
    ],
)
def test_contracts(method, contract, tmp_path, place):
    contract(subject(method, tmp_path, place))


def test_ranks_are_shuffled_among_layers_of_the_same_shape_whatever_their_kind(place):
    """A Conv1D's (inputs, outputs) is no nn.Linear's (outputs, inputs)."""
    backbone = load_backbone(place.model, "AutoModelForSequenceClassification", 3)
    mixed = dataclasses.replace(backbone, module=with_linear(copy.deepcopy(backbone.module), ("mlp.c_fc",)))
    ranks = {layer: number for number, layer in enumerate(backbone.layers)}
    drawn = [shuffled(ranks, of, torch.Generator().manual_seed(1)) for of in (backbone, mixed)]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("lora[init=olora]", "layer 'transformer.h.0.attn.c_attn' is of kind Conv1D"),
        # On square layers PEFT's OLoRA takes the wrong matrix out of the weight, and says nothing.
        (
            'peft[type=lora,init_lora_weights=olora,target_modules=["attn.c_proj"]]',
            "layer 'transformer.h.0.attn.c_proj' is of kind Conv1D",
        ),
        # It would train the head alone, and say nothing.
        ("peft[type=osf]", "passes over layer 'transformer.h.0.attn.c_attn', which is of kind Conv1D"),
        ("peft[type=hra]", "Conv1D"),
        ("peft[type=loha]", "Conv1D"),
    ],
)
def test_what_peft_cannot_do_on_it_is_a_reason_that_names_the_kind(method, reason, place):
    for meta in (True, False):
        backbone = load_backbone(place.model, "AutoModelForSequenceClassification", 3, meta=meta)
        assert reason in (method_of(method).unsupported(backbone) or "")


@pytest.mark.parametrize("method", ["lora", "adalora", "pruned_lora", "debora", "peft[type=lora]", "peft[type=ia3]"])
def test_a_backbone_without_layers_to_adapt_names_the_kinds_that_it_has(method):
    module = nn.Sequential(nn.Embedding(3, 2), nn.Conv1d(2, 2, 1), nn.LayerNorm(2), nn.Linear(2, 2))
    reason = method_of(method).unsupported(Backbone(module, head=("3",), layers=()))
    assert reason == (
        "the backbone has no linear or convolution layer to adapt: its layers are of kind Embedding, Conv1d"
    )


def test_a_target_of_another_kind_is_named_with_it(place):
    backbone = load_backbone(place.model, "AutoModelForSequenceClassification", 3, meta=True)
    with pytest.raises(InputError, match="target module 'wte' is of kind Embedding; adapted are Conv1D"):
        backbone.targets(("c_attn", "wte"))
    with pytest.raises(InputError, match=r"unknown target module 'c_atn'\. Did you mean 'c_attn'\?"):
        backbone.targets(("c_atn",))
