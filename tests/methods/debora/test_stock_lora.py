"""The export as a stock LoRA adapter, against the model it came from."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import nn

from methods.debora.tuner.config import DeboraConfig
from methods.debora.tuner.convolution import DeboraConv2d
from methods.debora.tuner.layer import DeboraLayer
from methods.debora.tuner.stock_lora import lora_pair
from methods.shared.stock_lora import write_stock_lora
from tests.methods.debora.test_convolution import adapted, network, outputs


@pytest.mark.parametrize("geometry", ["matrix", "oblique", "stiefel"])
def test_convolutions_linear_layers_and_rank_zero(geometry, tmp_path):
    model = adapted(geometry)
    kept = {"0": [0, 1, 3], "1": [2], "2": [], "5": [0, 3]}
    model.base_model.keep_columns(
        "default", {name: torch.tensor(columns, dtype=torch.int64) for name, columns in kept.items()}
    )
    tuner = model.base_model.model
    layers = {name: tuner.get_submodule(name) for name in kept}
    for layer in layers.values():
        assert isinstance(layer, DeboraLayer)
    pairs = {name: lora_pair(layer, "default") for name, layer in layers.items()}
    write_stock_lora(tmp_path, pairs, {"6": tuner.get_submodule("6.modules_to_save.default")}, None)
    loaded = PeftModel.from_pretrained(network(), tmp_path).eval()
    assert loaded.peft_config["default"].peft_type == "LORA"
    ranks = {name: m.lora_A["default"].weight.shape[0] for name, m in loaded.named_modules() if hasattr(m, "lora_A")}
    assert ranks == {"base_model.model.0": 3, "base_model.model.1": 1, "base_model.model.5": 2}
    expected = outputs(model)
    torch.testing.assert_close(outputs(loaded), expected, rtol=0, atol=1e-5)
    assert (expected - outputs(network())).abs().max() > 0.1
    torch.testing.assert_close(outputs(loaded.merge_and_unload()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "kernel"), [((1, 4), (3, 3)), ((3, 4), (1, 1)), ((3, 1), (1, 5)), ((3, 4), (2, 3))]
)
def test_a_pair_is_the_kernel(channels, kernel):
    torch.manual_seed(0)
    layer = DeboraConv2d(nn.Conv2d(*channels, kernel), "default", 2, DeboraConfig(target_modules=["x"]))
    for factor in layer.factors("default"):
        nn.init.normal_(factor)
    B, A = lora_pair(layer, "default")
    assert B.shape == (channels[1], 2, 1, 1)
    assert A.shape == (2, channels[0], *kernel)
    product = torch.einsum("or,rihw->oihw", B[:, :, 0, 0], A)
    torch.testing.assert_close(product, layer.get_delta_weight("default").detach())


@pytest.mark.parametrize("settings", [{"dilation": 2}, {"padding": 1, "padding_mode": "reflect"}])
def test_what_stock_lora_would_not_follow_is_refused(settings):
    layer = DeboraConv2d(nn.Conv2d(3, 4, 3, **settings), "default", 2, DeboraConfig(target_modules=["x"]))
    with pytest.raises(ValueError, match="stock LoRA has neither dilation"):
        lora_pair(layer, "default")
