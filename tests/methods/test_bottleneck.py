"""HAdapter and PAdapter: their place in every family of encoders, against forwards written out by hand."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from harness import registry
from harness.errors import InputError
from harness.method import Backbone, in_modules
from harness.run.sizes import Sizes
from harness.spec import TrainSpec
from methods.bottleneck import load
from tests.support.deberta import base_config

METHODS = ("hadapter", "padapter")
WIDTH, FFN, HEADS, LAYERS, LABELS = 16, 24, 2, 2, 3
TINY = {
    "vocab_size": 40,
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 24,
}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**TINY),
    "roberta": lambda: transformers.RobertaConfig(**TINY),
    "xlm_roberta": lambda: transformers.XLMRobertaConfig(**TINY),
    "camembert": lambda: transformers.CamembertConfig(**TINY),
    "electra": lambda: transformers.ElectraConfig(**TINY, embedding_size=8),
    "deberta": lambda: transformers.DebertaConfig(**TINY, **RELATIVE),
    "deberta_v2": lambda: transformers.DebertaV2Config(**TINY, **RELATIVE, type_vocab_size=0, conv_kernel_size=3),
    "mpnet": lambda: transformers.MPNetConfig(**TINY),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=40, dim=WIDTH, hidden_dim=FFN, n_heads=HEADS, n_layers=LAYERS, max_position_embeddings=24
    ),
}
both_methods = pytest.mark.parametrize("name", METHODS)
every_family = pytest.mark.parametrize("family", CONFIGS)


def tiny(family: str, seed: int = 0, **changes) -> Backbone:
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    config.update({"num_labels": LABELS, **changes})
    return backbone_of(transformers.AutoModelForSequenceClassification.from_config(config).eval())


def backbone_of(module: nn.Module) -> Backbone:
    base = module.base_model_prefix
    head = [name for name, _ in module.named_children() if name not in (base, "dropout")]
    if getattr(getattr(module, base), "pooler", None) is not None:
        head.append(f"{base}.pooler")
    return Backbone(module, tuple(head), ())


def start(name: str, backbone: Backbone, **parameters):
    method = registry.make_method(name, parameters)
    assert method.unsupported(backbone) is None
    return method.start(backbone, TrainSpec(batches=1), None, torch.Generator())


def started(name: str, family: str, **parameters):
    """A method on a tiny model, its adapters and head random, as if trained."""
    adaptation = start(name, tiny(family), **({"bottleneck": 5} | parameters))
    randomise(adaptation.model)
    return adaptation


def randomise(module: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)


def tokens() -> dict[str, torch.Tensor]:
    """3 texts of 7 tokens, the last of the second and the third padded."""
    ids = torch.randint(5, 40, (3, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 5:] = mask[2, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module.eval()(**tokens()).logits


class Parts(NamedTuple):
    """The linear layers and LayerNorms of an encoder layer."""

    attention: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    first: str = "intermediate.dense"
    second: str = "output.dense"
    norm: str = "output.LayerNorm"


PARTS = {
    "mpnet": Parts(attention="attention.attn.o", attention_norm="attention.LayerNorm"),
    "distilbert": Parts("attention.out_lin", "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm"),
}


def layers(module: nn.Module) -> nn.ModuleList:
    base = module.base_model
    return base.transformer.layer if hasattr(base, "transformer") else base.encoder.layer


def adapters(layer: nn.Module) -> list[nn.Module]:
    return [part for name, part in layer.named_modules() if name.endswith(".adapter")]


def bottleneck(adapter: nn.Module, activation, values: torch.Tensor) -> torch.Tensor:
    down, up = adapter.get_submodule("down"), adapter.get_submodule("up")
    return activation(values @ down.weight.T + down.bias) @ up.weight.T + up.bias


def swish(values: torch.Tensor) -> torch.Tensor:
    return values / (1 + torch.exp(-values))


def relu(values: torch.Tensor) -> torch.Tensor:
    return values * (values > 0)


@both_methods
@every_family
def test_the_model_is_unchanged_at_the_start(name, family):
    backbone = tiny(family)
    before = logits(backbone.module)
    torch.testing.assert_close(logits(start(name, backbone).model), before, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "per_layer"), [("hadapter", 2), ("padapter", 1)])
@every_family
def test_every_layer_has_its_adapters_and_the_backbone_keeps_its_names(name, per_layer, family):
    names = {name for name, _ in tiny(family).module.named_parameters()}
    model = start(name, tiny(family)).model
    assert [len(adapters(layer)) for layer in layers(model)] == [per_layer] * LAYERS
    assert names == {name for name, _ in model.named_parameters() if ".adapter." not in name}


@both_methods
@every_family
def test_a_layer_of_every_family_against_its_definition(name, family):
    """The first layer put together from its linear layers, from what its attention gives on the plain model."""
    seen: dict[str, torch.Tensor] = {}
    plain, parts = tiny(family).module, PARTS.get(family, Parts())
    first = layers(plain)[0]
    first.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    first.get_submodule(parts.attention).register_forward_hook(lambda module, args, out: seen.update(h=out))
    logits(plain)
    model = started(name, family).model
    adapted = layers(model)[0]
    adapted.register_forward_hook(
        lambda module, args, out: seen.update(found=out if isinstance(out, torch.Tensor) else out[0])
    )
    logits(model)

    attention_norm, norm = first.get_submodule(parts.attention_norm), first.get_submodule(parts.norm)
    own, h, x = adapters(adapted), seen["h"], seen["x"]
    with torch.no_grad():
        y = attention_norm(h + x + (bottleneck(own[0], swish, h) if name == "hadapter" else 0))
        h = first.get_submodule(parts.second)(nn.functional.gelu(first.get_submodule(parts.first)(y)))
        change = bottleneck(own[1], swish, h) if name == "hadapter" else bottleneck(own[0], relu, norm(h + y))
        expected = norm(h + change + y)
    torch.testing.assert_close(seen["found"], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, norm(h + y), atol=0.1), "adapters that do nothing would pass"


@pytest.mark.parametrize("dropped", [False, True], ids=["no dropout", "all dropped"])
@both_methods
def test_a_bert_layer_written_out(name, dropped):
    """All of a layer in float64. With everything dropped h is 0: an adapter before the dropout would be dropped too."""
    backbone = tiny("bert", hidden_dropout_prob=float(dropped), attention_probs_dropout_prob=0.0)
    adaptation = start(name, backbone, bottleneck=5)
    randomise(adaptation.model)
    layer = layers(adaptation.model)[0].double().train()
    x = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), bert_layer(layer, name, x, keep=0.0 if dropped else 1.0))


def bert_layer(layer: nn.Module, name: str, x: torch.Tensor, keep: float) -> torch.Tensor:
    """(texts, tokens, WIDTH) to the same, one text, head and token after the other; `keep` scales what is dropped."""
    weights, own, size = dict(layer.named_parameters()), adapters(layer), WIDTH // HEADS

    def linear(values: torch.Tensor, part: str) -> torch.Tensor:
        return values @ weights[f"{part}.weight"].T + weights[f"{part}.bias"]

    def norm(values: torch.Tensor, part: str) -> torch.Tensor:
        centred = values - values.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return scaled * weights[f"{part}.weight"] + weights[f"{part}.bias"]

    query, key, value = (linear(x, f"attention.self.{part}") for part in ("query", "key", "value"))
    context = torch.empty_like(x)
    for text in range(x.shape[0]):
        for head in range(HEADS):
            own_part = slice(head * size, (head + 1) * size)
            for token in range(x.shape[1]):
                scores = key[text, :, own_part] @ query[text, token, own_part] / size**0.5
                chances = scores.exp() / scores.exp().sum()
                context[text, token, own_part] = chances @ value[text, :, own_part]
    h = keep * linear(context, "attention.output.dense")
    if name == "hadapter":
        h = h + bottleneck(own[0], swish, h)
    y = norm(h + x, "attention.output.LayerNorm")
    inner = linear(y, "intermediate.dense")
    gelu = inner * (1 + torch.erf(inner / 2**0.5)) / 2
    h = keep * linear(gelu, "output.dense")
    if name == "hadapter":
        h = h + bottleneck(own[1], swish, h)
    else:
        h = h + bottleneck(own[0], relu, norm(h + y, "output.LayerNorm"))
    return norm(h + y, "output.LayerNorm")


@both_methods
@every_family
def test_gradients_reach_the_adapters_and_the_head_and_nothing_else(name, family):
    adaptation = started(name, family)
    adaptation.model(**tokens()).logits.square().sum().backward()
    for parameter_name, parameter in adaptation.model.named_parameters():
        trained = ".adapter." in parameter_name or in_modules(parameter_name, adaptation.head)
        assert parameter.requires_grad == trained, parameter_name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trained, parameter_name


@both_methods
@every_family
def test_saved_and_loaded(name, family, tmp_path: Path):
    trained = started(name, family)
    trained.export(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}
    fresh = tiny(family).module
    for parameter in fresh.get_submodule("classifier").parameters():
        nn.init.constant_(parameter, 7.0)
    load(fresh, tmp_path)
    torch.testing.assert_close(logits(fresh), logits(trained.model), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: tiny("bert", hidden_size=32).module, "size mismatch"),
        (lambda: tiny("bert", num_labels=LABELS + 1).module, "size mismatch"),
        (lambda: tiny("bert", num_hidden_layers=LAYERS + 1).module, "only one of them has 'bert.encoder.layer.2"),
        (lambda: tiny("electra").module, "only one of them has"),
        (lambda: started("padapter", "bert").model, "has adapters already"),
        (lambda: nn.Linear(2, 2), "Linear has no encoder layer"),
    ],
    ids=["width", "labels", "layers", "family", "adapted", "no encoder"],
)
def test_loading_onto_another_model_is_told(model, reason, tmp_path: Path):
    started("hadapter", "bert").export(tmp_path)
    with pytest.raises(InputError, match=r"does not fit the model: .*" + reason) as error:
        load(model(), tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_without_an_adapter_is_told(tmp_path: Path):
    with pytest.raises(InputError, match="holds no exported bottleneck adapter"):
        load(tiny("bert").module, tmp_path)


def exported(folder: Path) -> Path:
    started("hadapter", "bert").export(folder)
    return folder


def in_the_first_form(folder: Path, change: Callable[[dict], dict] = dict, **config) -> None:
    """The export as it was before it had checksums, with other tensors or settings."""
    save_file(change(load_file(folder / "trained.safetensors")), folder / "trained.safetensors")
    size = json.loads((folder / "bottleneck.json").read_text())["bottleneck"]
    (folder / "bottleneck.json").write_text(json.dumps({"placement": "houlsby", "bottleneck": size} | config))


@pytest.mark.parametrize("file", ["trained.safetensors", "bottleneck.json"])
def test_no_flipped_bit_of_an_export_is_loaded(file, tmp_path: Path):
    whole = (exported(tmp_path) / file).read_bytes()
    model = tiny("bert").module
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for bit in range(0, 8 * len(whole), 8 * len(whole) // 41):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / file).write_bytes(flipped)
        with pytest.raises(InputError, match=f"{file}[^\n]*$"):
            load(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "config", "reason"),
    [
        (dict, {"placement": "houlsbi"}, "placement = 'houlsbi'; known are houlsby, pfeiffer"),
        (dict, {"placement": ["houlsby"]}, r"placement = \['houlsby'\]"),
        (dict, {"bottleneck": 0}, "bottleneck = 0; a whole number"),
        (dict, {"bottleneck": True}, "bottleneck = True; a whole number"),
        (dict, {"bottleneck": "32"}, "bottleneck = '32'; a whole number"),
        (dict, {"bottleneck": 10**12}, "bottleneck = 1000000000000 in .* is not the size"),
        (dict, {"more": 1}, "the checksum of '.*bottleneck.json'"),
        (lambda found: {}, {}, "is not the size"),
        (lambda found: {name: value.long() for name, value in found.items()}, {}, "holds torch.int64"),
        (lambda found: {name: value / 0 for name, value in found.items()}, {}, "not finite"),
        (lambda found: {name: value[:1] for name, value in found.items()}, {}, "is not the size"),
        (lambda found: {f"a.{name}": value for name, value in found.items()}, {}, "only one of them has"),
    ],
)
def test_an_export_without_checksums_is_checked_for_sense(change, config, reason, tmp_path: Path):
    in_the_first_form(exported(tmp_path), change, **config)
    with pytest.raises(InputError, match=reason) as error:
        load(tiny("bert").module, tmp_path)
    assert "\n" not in str(error.value)


def test_an_export_of_before_the_checksums_still_loads(tmp_path: Path):
    in_the_first_form(exported(tmp_path))
    fresh = tiny("bert").module
    load(fresh, tmp_path)
    torch.testing.assert_close(logits(fresh), logits(started("hadapter", "bert").model), rtol=0, atol=0)


@pytest.mark.parametrize("file", ["trained.safetensors", "bottleneck.json"])
@pytest.mark.parametrize(
    "make",
    [Path.mkdir, os.mkfifo, Path.touch, lambda path: path.write_text("[" * 100_000), lambda path: None],
    ids=["folder", "pipe", "empty", "deep", "nothing"],
)
def test_something_else_in_the_place_of_an_export_is_told(file, make, tmp_path: Path):
    (exported(tmp_path) / file).unlink()
    make(tmp_path / file)
    with pytest.raises(InputError, match=rf"holds no exported bottleneck adapter .*{file}") as error:
        load(tiny("bert").module, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "numbers"), [("hadapter", 1_198_848), ("padapter", 1_189_632)])
def test_counts_on_deberta_v3_base(name, numbers):
    """At the default bottlenecks, 32 and 64: the counts of the published comparisons' settings."""
    with torch.device("meta"):
        backbone = backbone_of(transformers.AutoModelForSequenceClassification.from_config(base_config()))
    count = Sizes(start(name, backbone)).parameters()
    assert count.adapter_initial == count.adapter_peak == count.adapter_final == numbers
    assert count.head == 590_592 + 2 * 768 + 2  # pooler and classifier
    assert count.stored_bytes == 4 * (numbers + count.head)


@both_methods
def test_the_first_linear_starts_small_and_truncated(name):
    adapter = adapters(layers(start(name, tiny("bert"), bottleneck=2000).model)[0])[0]
    down, up = adapter.get_submodule("down"), adapter.get_submodule("up")
    assert down.weight.abs().max() <= 0.02
    # A normal distribution cut at two standard deviations keeps 0.88 of its standard deviation.
    assert down.weight.std().item() == pytest.approx(0.0088, rel=0.02)
    assert not any(zero.any() for zero in (down.bias, up.weight, up.bias))


@both_methods
def test_adapters_are_float32_on_a_backbone_in_bfloat16(name):
    backbone = tiny("bert")
    backbone.module.to(torch.bfloat16)
    before = logits(backbone.module)
    model = start(name, backbone).model
    assert {p.dtype for full, p in model.named_parameters() if ".adapter." in full} == {torch.float32}
    assert torch.equal(logits(model), before)


@both_methods
def test_a_copy_has_adapters_of_its_own(name):
    original = started(name, "bert").model
    twin = copy.deepcopy(original)
    before = logits(twin)
    for part in original.modules():
        if hasattr(part, "adapter"):
            nn.init.zeros_(part.adapter.up.weight)
    assert torch.equal(logits(twin), before)
    assert not torch.allclose(logits(original), before)


@both_methods
@pytest.mark.parametrize("config", [transformers.ResNetConfig, transformers.RobertaPreLayerNormConfig])
def test_another_model_is_a_reason(name, config):
    with torch.device("meta"):
        auto = transformers.AutoModelForImageClassification if config is transformers.ResNetConfig else None
        module = (auto or transformers.AutoModelForSequenceClassification).from_config(config())
    reason = registry.make_method(name, {}).unsupported(Backbone(module, (), ()))
    assert reason is not None
    assert reason.startswith(f"{type(module).__name__} has no encoder layer of transformers' bert, roberta")


@both_methods
@pytest.mark.parametrize("value", [0, -1])
def test_a_bottleneck_below_one_is_told(name, value):
    with pytest.raises(
        InputError, match=rf"{name}\.bottleneck = {value} is not allowed: .* greater than or equal to 1"
    ):
        registry.make_method(name, {"bottleneck": value})


@both_methods
def test_a_bottleneck_above_the_width_is_allowed(name):
    per_adapter = 2 * WIDTH * 3 * WIDTH + 4 * WIDTH
    count = start(name, tiny("bert"), bottleneck=3 * WIDTH).adapter_parameters()
    assert count == LAYERS * per_adapter * (2 if name == "hadapter" else 1)
