"""The tuner as PEFT sees it: shapes, saving, loading, merging, ranks down to 0."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from methods.debora.tuner.config import DeboraConfig
from methods.debora.tuner.layer import DeboraLinear
from methods.debora.tuner.model import DeboraModel
from tests.methods.debora.bert import tiny_backbone, token_ids

TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense"]
QUERY = "bert.encoder.layer.0.attention.self.query"
RANKS = {QUERY: 0, "bert.encoder.layer.0.intermediate.dense": 1, "bert.encoder.layer.1.attention.self.value": 3}


def adapted(module: nn.Module | None = None, **settings) -> PeftModel:
    """The tiny BERT with adapters of rank 4 whose numbers are all random."""
    config = DeboraConfig(r=4, target_modules=TARGETS, modules_to_save=["bert.pooler", "classifier"], **settings)
    model = get_peft_model(module or tiny_backbone().module, config)
    torch.manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, DeboraLinear):
            nn.init.normal_(layer.debora_U["default"])
            nn.init.uniform_(layer.debora_s["default"], 0.1, 3)
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            nn.init.normal_(parameter)
    return model.eval()


def ranks_of(model: nn.Module) -> dict[str, int]:
    prefix = "base_model.model."
    return {n.removeprefix(prefix): m.r["default"] for n, m in model.named_modules() if isinstance(m, DeboraLinear)}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(token_ids()).logits


@pytest.fixture(params=["built", "cut"])
def ranked(request) -> PeftModel:
    """A model with different ranks per layer: built at them, or cut down to them."""
    if request.param == "built":
        return adapted(rank_pattern=dict(RANKS))
    model = adapted()
    model.base_model.keep_columns("default", {name: torch.arange(rank) for name, rank in RANKS.items()})
    return model


def test_a_new_adapter_leaves_the_function_exactly_unchanged():
    expected = logits(tiny_backbone().module)
    model = get_peft_model(tiny_backbone().module, DeboraConfig(r=4, target_modules=TARGETS)).eval()
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(adapted()), expected)


def test_the_forward_is_the_dense_update():
    torch.manual_seed(0)
    base = nn.Linear(7, 5)
    layer = DeboraLinear(base, "default", 3, DeboraConfig(r=3, target_modules=["x"]))
    nn.init.normal_(layer.debora_U["default"])
    layer.debora_s["default"].copy_(torch.tensor([0.5, 1.0, 2.0]))
    U, s, V = layer.debora_U["default"], layer.debora_s["default"], layer.debora_V["default"]
    x = torch.randn(2, 4, 7)
    dense = sum(s[i] * torch.outer(U[:, i], V[:, i]) for i in range(3))
    torch.testing.assert_close(layer(x), x @ (base.weight + dense).T + base.bias)
    torch.testing.assert_close(layer.get_delta_weight("default"), dense)


def test_the_start_is_the_step_of_lora_with_alpha_16():
    layer = DeboraLinear(nn.Linear(20, 10), "default", 8, DeboraConfig(r=8, tau=16.0, eps=1e-6, target_modules=["x"]))
    torch.testing.assert_close(layer.debora_s["default"], torch.full((8,), 2.0))
    V = layer.debora_V["default"]
    assert not layer.debora_U["default"].any()
    assert V.abs().max() <= 20**-0.5
    assert V.abs().max() > 0.9 * 20**-0.5


@pytest.mark.parametrize("geometry", ["oblique", "stiefel"])
def test_on_a_manifold_the_start_is_the_eps_shift(geometry):
    """The update is eps times columns of norm 1, so its norm is at most eps r, and exactly eps sqrt(r) on Stiefel."""
    config = DeboraConfig(r=4, eps=1e-3, geometry=geometry, start="vertex", target_modules=TARGETS)
    model = get_peft_model(tiny_backbone().module, config).eval()
    for layer in (module for module in model.modules() if isinstance(module, DeboraLinear)):
        assert layer.manifolds("default") == (geometry, geometry)
        assert torch.equal(layer.debora_s["default"], torch.full((4,), 1e-3))
        for factor in layer.factors("default"):
            gram = factor.T @ factor
            torch.testing.assert_close(gram if geometry == "stiefel" else gram * torch.eye(4), torch.eye(4))
        norm = float(layer.get_delta_weight("default").detach().norm())
        assert norm == pytest.approx(2e-3) if geometry == "stiefel" else 0 < norm <= 4e-3
    assert 0 < (logits(model) - logits(tiny_backbone().module)).abs().max() < 1e-3


def test_an_oblique_start_in_the_interior_cancels_in_pairs():
    config = DeboraConfig(r=4, geometry="oblique", target_modules=TARGETS)
    model = get_peft_model(tiny_backbone().module, config).eval()
    torch.testing.assert_close(logits(model), logits(tiny_backbone().module), rtol=0, atol=1e-5)
    layer = model.base_model.model.get_submodule(QUERY)
    assert (layer.debora_s["default"] > 1).all()
    U, V = layer.factors("default")
    assert torch.equal(U[:, 0::2], -U[:, 1::2])
    assert torch.equal(V[:, 0::2], V[:, 1::2])
    model(token_ids()).logits.square().sum().backward()
    assert not torch.allclose(V.grad[:, 0::2], V.grad[:, 1::2])  # the pairs part


@pytest.mark.parametrize("geometry", ["matrix", "oblique", "stiefel"])
def test_the_adapter_is_drawn_from_torchs_generator(geometry):
    def state(seed):
        module = tiny_backbone().module
        torch.manual_seed(seed)
        config = DeboraConfig(r=4, geometry=geometry, start="vertex", target_modules=TARGETS)
        return get_peft_model(module, config).state_dict()

    first, same, other = state(3), state(3), state(4)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("geometry", ["matrix", "oblique", "stiefel"])
def test_the_configuration_and_s_survive_json(geometry, tmp_path):
    """tau and eps come back as they were, and s is what was saved, not what they would start it from."""
    model = adapted(geometry=geometry, start="vertex", tau=7, eps=1e-7, rank_pattern=dict(RANKS))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["tau"], config["eps"], config["geometry"], config["start"]) == (7, 1e-7, geometry, "vertex")
    assert config["rank_pattern"] == RANKS
    assert config["peft_type"] == "DEBORA"
    assert sorted(config["target_modules"]) == sorted(TARGETS)
    loaded = PeftModel.from_pretrained(tiny_backbone().module, tmp_path).eval()
    before, after = model.peft_config["default"].to_dict(), loaded.peft_config["default"].to_dict()
    assert {**before, "inference_mode": True, "auto_mapping": None} == {**after, "auto_mapping": None}  # PEFT's own two
    saved = {name: value for name, value in model.state_dict().items() if "debora_s" in name}
    assert len(saved) == 10
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in saved.items())
    assert torch.equal(logits(loaded), logits(model))


def test_a_loaded_adapter_can_train_on(tmp_path):
    adapted(rank_pattern=dict(RANKS)).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_backbone().module, tmp_path, is_trainable=True)
    loaded(token_ids()).logits.sum().backward()
    layer = loaded.base_model.model.get_submodule("bert.encoder.layer.1.attention.self.value")
    assert all(factor.grad.any() for factor in layer.factors("default"))


def test_an_adapter_can_be_deleted():
    model = adapted()
    model.add_adapter("other", DeboraConfig(r=2, target_modules=TARGETS))
    model.delete_adapter("other")
    layer = model.base_model.model.get_submodule(QUERY)
    assert layer.r == {"default": 4}
    assert set(layer.debora_U) == set(layer.debora_s) == {"default"}


def test_s_is_saved_but_is_no_parameter():
    model = adapted()
    assert not [name for name, _ in model.named_parameters() if "debora_s" in name]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".debora_U." in n or ".debora_V." in n or ".modules_to_save." in n for n in trained)
    assert len(trained) == 2 * 10 + 4


def test_save_and_load_round_trip_with_a_rank_for_each_layer(ranked, tmp_path):
    expected = logits(ranked)
    assert {name: rank for name, rank in ranks_of(ranked).items() if rank != 4} == RANKS
    ranked.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_backbone().module, tmp_path).eval()
    assert ranks_of(loaded) == ranks_of(ranked)
    assert torch.equal(logits(loaded), expected)
    assert loaded.peft_config["default"].peft_type == "DEBORA"
    assert isinstance(loaded.base_model, DeboraModel)


def test_merge_and_unload_keeps_the_function(ranked):
    expected = logits(ranked)
    merged = ranked.merge_and_unload(safe_merge=True)
    assert not [name for name, module in merged.named_modules() if isinstance(module, DeboraLinear)]
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert set(merged.state_dict()) == set(tiny_backbone().module.state_dict())


def test_merging_can_be_undone_and_the_adapter_switched_off(ranked):
    expected = logits(ranked)
    ranked.merge_adapter()
    torch.testing.assert_close(logits(ranked), expected, rtol=0, atol=1e-5)
    ranked.unmerge_adapter()
    torch.testing.assert_close(logits(ranked), expected, rtol=0, atol=1e-5)
    with ranked.disable_adapter():
        torch.testing.assert_close(logits(ranked), logits(tiny_backbone().module), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(ranked), expected, rtol=0, atol=1e-5)


def test_a_safe_merge_refuses_what_is_not_finite():
    model = adapted()
    model.base_model.model.get_submodule(QUERY).debora_s["default"].fill_(torch.inf)
    with pytest.raises(ValueError, match="not finite"):
        model.merge_and_unload(safe_merge=True)


def test_a_layer_at_rank_zero_is_its_base_layer():
    layer = DeboraLinear(nn.Linear(6, 4), "default", 0, DeboraConfig(target_modules=["x"]))
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert not layer.get_delta_weight("default").any()


def test_keeping_columns_keeps_the_parameter_objects():
    model = adapted()
    layer = model.base_model.model.get_submodule(QUERY)
    U, V, s = layer.debora_U["default"], layer.debora_V["default"], layer.debora_s["default"].clone()
    before = U.detach().clone(), V.detach().clone()
    logits_of_old_graph = model(token_ids()).logits.sum()
    logits_of_old_graph.backward()
    del logits_of_old_graph
    model.base_model.keep_columns("default", {QUERY: torch.tensor([1, 3])})
    assert layer.debora_U["default"] is U
    assert layer.debora_V["default"] is V
    assert U.grad.shape == (16, 2)
    assert torch.equal(U, before[0][:, [1, 3]])
    assert torch.equal(V, before[1][:, [1, 3]])
    assert torch.equal(layer.debora_s["default"], s[[1, 3]])
    assert model.peft_config["default"].rank_pattern == {QUERY: 2}
    model(token_ids()).logits.sum().backward()
    assert U.grad.shape == U.shape == (16, 2)


def test_shapes_on_the_meta_device():
    model = get_peft_model(tiny_backbone("meta").module, DeboraConfig(r=4, target_modules=TARGETS))
    real = get_peft_model(tiny_backbone().module, DeboraConfig(r=4, target_modules=TARGETS))
    assert all(p.device.type == "meta" for p in model.parameters())
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}


def test_a_second_adapter_stands_beside_the_first():
    model = adapted()
    expected = logits(model)
    model.add_adapter("other", DeboraConfig(r=2, target_modules=TARGETS))
    assert torch.equal(logits(model), expected)
    model.set_adapter("other")
    layer = model.base_model.model.get_submodule(QUERY)
    assert layer.r == {"default": 4, "other": 2}
    assert not layer.debora_U["default"].requires_grad
    assert layer.debora_U["other"].requires_grad


def test_only_linear_layers_and_convolutions_are_adapted():
    with pytest.raises(ValueError, match=r"'0' cannot be adapted: it is a Conv1d, neither linear nor nn\.Conv2d"):
        get_peft_model(nn.Sequential(nn.Conv1d(3, 4, 3)), DeboraConfig(target_modules=["0"]))


def test_a_stiefel_rank_above_the_smaller_side_is_refused():
    with pytest.raises(ValueError, match=r"layer 'bert.* cannot be adapted: no 17 orthonormal columns of 16 rows"):
        get_peft_model(
            tiny_backbone().module, DeboraConfig(r=17, geometry="stiefel", start="vertex", target_modules=TARGETS)
        )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"r": 0}, "r = 0"),
        ({"tau": 0.0}, "tau"),
        ({"tau": float("inf")}, "tau = inf"),
        ({"eps": -1.0}, "eps"),
        ({"eps": float("nan")}, "eps = nan"),
        ({"rank_pattern": {"query": -1}}, "rank_pattern"),
        ({"geometry": "sphere"}, "geometry = 'sphere' should be one of matrix, oblique, stiefel"),
        ({"start": "middle"}, "start = 'middle'"),
        ({"geometry": "stiefel"}, "set start = 'vertex'"),
        ({"geometry": "oblique", "r": 3}, "r = 3 should be even"),
    ],
)
def test_values_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DeboraConfig(target_modules=["query"], **wrong)
