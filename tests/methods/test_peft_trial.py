"""The gateway tries a tuner with a batch that the bare model takes: what that refuses itself is not PEFT's fault."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from transformers import (
    BartConfig,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    ResNetConfig,
    T5Config,
    XLNetConfig,
)

from harness.cli import main
from harness.contracts.subject import method_of
from harness.method import Backbone
from harness.record.store import RecordStore
from harness.run.sizes import Sizes
from harness.spec import TrainSpec
from methods.peft_tuners.trial import trial_inputs, without_values
from methods.shared.peft_model import with_values
from tasks.pretrained import head_and_layers
from tests.support import tiny

TEXT = "AutoModelForSequenceClassification"
VOCABULARY, WIDTH, INNER, BLOCKS = 40, 16, 32, 2
ENDS = {"eos_token_id": 3, "pad_token_id": 0, "bos_token_id": 4, "vocab_size": VOCABULARY, "num_labels": 3}
T5 = T5Config(
    **ENDS, d_model=WIDTH, d_kv=8, num_heads=2, d_ff=INNER, num_layers=BLOCKS, num_decoder_layers=BLOCKS,
    decoder_start_token_id=0,
)  # fmt: skip
BART = BartConfig(
    **ENDS, d_model=WIDTH, encoder_layers=BLOCKS, decoder_layers=BLOCKS, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=INNER, decoder_ffn_dim=INNER, max_position_embeddings=32,
)  # fmt: skip
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
MODELS = {
    "t5": (TEXT, T5),
    "bart": (TEXT, BART),
    "gpt2": (TEXT, GPT2Config(**ENDS, n_embd=16, n_layer=1, n_head=2)),
    "gpt2-without-padding": (TEXT, GPT2Config(**ENDS | {"pad_token_id": None}, n_embd=16, n_layer=1, n_head=2)),
    "llama": (TEXT, LlamaConfig(**ENDS, **LLAMA)),
    "llama-without-padding": (TEXT, LlamaConfig(**ENDS | {"pad_token_id": None, "eos_token_id": [5, 3]}, **LLAMA)),
    "bert": (TEXT, BertConfig(**ENDS, **LLAMA)),
    "xlnet": (TEXT, XLNetConfig(**ENDS, d_model=16, n_layer=1, n_head=2, d_inner=32)),
    "resnet": (
        "AutoModelForImageClassification",
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3),
    ),
}


def backbone_of(family: str, device: str = "cpu") -> Backbone:
    auto_class, config = MODELS[family]
    with torch.device(device):
        module = getattr(transformers, auto_class).from_config(config)
    return Backbone(module, *head_and_layers(module, family))


@pytest.mark.parametrize("family", MODELS)
def test_the_bare_model_takes_the_batch(family):
    module = with_values(backbone_of(family).module)
    inputs = trial_inputs(module)
    if family == "resnet":
        assert inputs is None
        return
    assert inputs is not None
    assert inputs["input_ids"].max() < VOCABULARY
    module(**inputs)


def test_a_model_that_wants_decoder_inputs_gets_them():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.M2M100Config(
        d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **sizes, **(ENDS | {"num_labels": 2})
    )
    inputs = trial_inputs(transformers.M2M100Model(config))
    assert inputs is not None
    assert "decoder_input_ids" in inputs


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("family", MODELS)
def test_a_tuner_that_works_is_not_refused(family, device):
    methods = ["peft[type=lora,r=2]"] if family in ("xlnet", "resnet") else ["peft[type=lora,r=2]", "peft[type=ia3]"]
    assert [method_of(method).unsupported(backbone_of(family, device)) for method in methods] == [None] * len(methods)


@pytest.mark.parametrize("family", ["t5", "bart", "llama-without-padding"])
def test_what_fails_with_the_tuner_alone_is_still_its_reason(family):
    """Also where the meta device cannot tell, since the model looks at its tokens' values."""
    reason = method_of("peft[type=multitask_prompt_tuning,num_virtual_tokens=4,num_tasks=1]").unsupported(
        backbone_of(family, "meta")
    )
    assert reason is not None
    assert reason.endswith("task_ids cannot be None")


def test_the_meta_device_takes_no_batch_where_a_model_looks_at_values():
    assert trial_inputs(without_values(backbone_of("t5").module)) is None


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_counts_of_encoders_with_decoders(family):
    """By hand: shared embeddings once, attention over the encoder too, in ranks and numbers."""
    backbone = backbone_of(family)
    attention, feedforward = 4 * 2 * WIDTH, 2 * (WIDTH + INNER)  # numbers of a rank
    assert len(backbone.layers) == BLOCKS * (4 + 2) + BLOCKS * (4 + 4 + 2)
    each = BLOCKS * (attention + feedforward) + BLOCKS * (2 * attention + feedforward)
    tokens = VOCABULARY * WIDTH
    if family == "t5":  # no biases; norms are scales; one table of relative positions a side
        block = 4 * WIDTH * WIDTH + 2 * WIDTH * INNER
        norms = BLOCKS * 2 * WIDTH + BLOCKS * 3 * WIDTH + 2 * WIDTH
        whole = tokens + 2 * BLOCKS * block + BLOCKS * 4 * WIDTH * WIDTH + norms + 2 * 32 * 2
    else:  # a bias everywhere; positions of each side are 2 more than asked for; norms of the embeddings
        square = WIDTH * WIDTH + WIDTH
        block = 4 * square + 2 * WIDTH * INNER + INNER + WIDTH
        norms = 2 * WIDTH * (BLOCKS * 2 + BLOCKS * 3 + 2)
        whole = tokens + 2 * 34 * WIDTH + 2 * BLOCKS * block + BLOCKS * 4 * square + norms
    head = WIDTH * WIDTH + WIDTH + 3 * WIDTH + 3
    for name, numbers in (("lora[rank=2]", 2 * each), ("debora[rank=2]", 2 * (each + len(backbone.layers)))):
        run = method_of(name).start(backbone_of(family), TrainSpec(batches=9), FewRows(), torch.Generator())
        count = Sizes(run).parameters()
        assert (count.adapter_initial, count.head, count.total) == (numbers, head, whole + head + numbers)
        assert run.ranks() == dict.fromkeys(backbone.layers, 2)
    count = Sizes(method_of("full").start(backbone_of(family), None, FewRows(), torch.Generator())).parameters()
    assert (count.adapter_initial, count.head, count.total) == (whole, head, whole + head)


class FewRows:
    size = 2


def test_a_sweep_over_t5_from_the_command_line(tmp_path):
    folder = tmp_path / "model"
    tiny.write_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"eos_token": "[SEP]", "model_input_names": ["input_ids", "attention_mask"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    transformers.T5ForConditionalGeneration(T5).save_pretrained(folder)
    tiny.write_data_root(tmp_path / "data")
    methods = "lora[rank=4],peft[type=lora,r=4]"
    options = [
        "--methods",
        methods,
        "--tasks",
        "glue/sst2",
        "--batches",
        "2",
        "--batch-size",
        "8",
        "--tracking-uri",
        "off",
    ]
    paths = ["--model", str(folder), "--data-root", str(tmp_path / "data"), "--results", str(tmp_path / "results")]
    assert main(["run", *options, *paths, "--executor", "serial"]) == 0
    records = list(RecordStore(tmp_path / "results").records())
    assert [record.status for record in records] == 2 * ["done"]
    assert all(record.parameters.adapter_final > 0 for record in records)
