"""The CP adapter of a convolution against its full kernel."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import conv2d, pad

from methods.debora.tuner.config import DeboraConfig
from methods.debora.tuner.convolution import DeboraConv2d
from methods.debora.tuner.model import DeboraModel

CONFIG = DeboraConfig(target_modules=["x"])


def layer_of(kernel=(3, 3), channels=(3, 5), rank=4, config=CONFIG, **settings) -> DeboraConv2d:
    """A float64 convolution whose adapter's numbers are all random."""
    torch.manual_seed(0)
    base = nn.Conv2d(*channels, kernel, dtype=torch.float64, **settings)
    layer = DeboraConv2d(base, "default", rank, config)
    for factor in layer.factors("default"):
        nn.init.normal_(factor)
    layer.debora_s["default"].uniform_(0.5, 2)
    return layer


def kernel_entry_by_entry(layer: DeboraConv2d) -> torch.Tensor:
    """sum_i s_i of the outer products of column i, a mode of size 1 counting as 1."""
    shape, s = layer.base_layer.weight.shape, layer.debora_s["default"]
    factors = dict(zip(layer.mode_sizes(), layer.factors("default"), strict=True))
    kernel = torch.zeros(shape, dtype=torch.float64)
    for place in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        for i in range(len(s)):
            entry = s[i].clone()
            for name, position in zip(layer.adapter_layer_names, place, strict=True):
                entry *= factors[name].detach()[position, i] if name in factors else 1
            kernel[tuple(place)] += entry
    return kernel


def with_full_kernel(layer: DeboraConv2d, x: torch.Tensor) -> torch.Tensor:
    base = layer.base_layer
    weight, padding = base.weight + layer.get_delta_weight("default"), base.padding
    if base.padding_mode != "zeros":
        both = [d * (k - 1) for d, k in zip(base.dilation, base.kernel_size, strict=True)]
        sides = [(size // 2, size - size // 2) for size in both] if padding == "same" else [(p, p) for p in padding]
        x, padding = pad(x, (*sides[1], *sides[0]), mode=base.padding_mode), 0  # the width's come first
    return conv2d(x, weight, base.bias, base.stride, padding, base.dilation)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # the base layer's own
@pytest.mark.parametrize("kernel", [(1, 1), (1, 3), (3, 1), (3, 3), (2, 5), (7, 7)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2, "padding": 1},
        {"stride": (1, 3), "padding": (3, 0), "dilation": (2, 1)},
        {"padding": "same", "dilation": (1, 2)},
        {"padding": "valid", "stride": (2, 1), "bias": False},
        {"padding": (2, 1), "padding_mode": "reflect", "stride": 2},
        {"padding": "same", "padding_mode": "circular"},
        {"padding": 1, "padding_mode": "replicate", "dilation": 2},
    ],
    ids=str,
)
def test_the_chain_is_the_full_kernel(kernel, settings):
    layer = layer_of(kernel, **settings)
    x = torch.randn(2, 3, 17, 15, dtype=torch.float64, requires_grad=True)
    found, expected = layer(x), with_full_kernel(layer, x)
    torch.testing.assert_close(found, expected)
    wanted = [x, *layer.factors("default")]
    for one, other in zip(
        torch.autograd.grad(found.tanh().sum(), wanted),
        torch.autograd.grad(expected.tanh().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(layer(x[0]), found[0])


@pytest.mark.parametrize(
    ("channels", "kernel", "sizes"),
    [
        ((3, 5), (2, 4), [5, 3, 2, 4]),
        ((3, 5), (1, 1), [5, 3]),
        ((3, 5), (1, 4), [5, 3, 4]),
        ((1, 5), (3, 3), [5, 3, 3]),
        ((3, 1), (3, 1), [3, 3]),
        ((1, 5), (1, 1), [5, 1]),
        ((1, 1), (3, 1), [1, 1, 3]),
    ],
)
def test_modes_of_size_one_are_dropped(channels, kernel, sizes):
    layer = layer_of(kernel, channels)
    assert [tuple(factor.shape) for factor in layer.factors("default")] == [(size, 4) for size in sizes]
    assert sum(p.numel() for name, p in layer.named_parameters() if "debora_" in name) == 4 * sum(sizes)
    torch.testing.assert_close(layer.get_delta_weight("default"), kernel_entry_by_entry(layer))
    x = torch.randn(2, channels[0], 6, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), with_full_kernel(layer, x))


def test_the_full_kernel_is_never_built(monkeypatch):
    """No tensor of its size appears in forward or backward."""
    layer = layer_of((5, 7), (11, 13), rank=2)
    layer.base_layer.requires_grad_(False)
    monkeypatch.setattr(layer, "get_delta_weight", None)
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, torch.Tensor):
                seen.append(result.numel())
            return result

    with Watch():
        layer(torch.randn(1, 11, 8, 8, dtype=torch.float64))
    assert seen
    assert 5 * 7 * 11 * 13 not in seen


@pytest.mark.parametrize("geometry", ["matrix", "oblique", "stiefel"])
def test_where_the_factors_start(geometry):
    torch.manual_seed(0)
    base = nn.Conv2d(16, 12, 3)
    layer = DeboraConv2d(base, "default", 8, DeboraConfig(target_modules=["x"], geometry=geometry, start="vertex"))
    channel = "euclidean" if geometry == "matrix" else geometry
    spatial = "euclidean" if geometry == "matrix" else "oblique"
    assert layer.manifolds("default") == (channel, channel, spatial, spatial)
    assert torch.equal(layer.debora_s["default"], torch.full((8,), 1e-3))
    for factor, manifold in zip(layer.factors("default"), layer.manifolds("default"), strict=True):
        gram = factor.T @ factor
        if manifold == "stiefel":
            torch.testing.assert_close(gram, torch.eye(8))
        elif manifold == "oblique":
            torch.testing.assert_close(gram.diagonal(), torch.ones(8))
    update = layer.get_delta_weight("default").norm()
    assert update == 0 if geometry == "matrix" else 0 < update <= 8e-3


SHAPES = [(64, (7, 7)), (64, (3, 3)), (64, (1, 3)), (64, (1, 1)), (1, (5, 5))]  # input channels, kernel


def products(layer: DeboraConv2d) -> torch.Tensor:
    """(C_in, kH, kW, r): the outer products of all factors but the first, which is where a LoRA has its A."""
    factors = dict(zip(layer.mode_sizes(), layer.factors("default"), strict=True))
    ones = torch.ones(1, layer.r["default"])
    V, height, width = (factors.get(name, ones).detach() for name in layer.adapter_layer_names[1:])
    return torch.einsum("ir,hr,wr->ihwr", V, height, width)


@pytest.mark.parametrize(("channels", "kernel"), SHAPES)
def test_the_euclidean_start_varies_as_loras(channels, kernel):
    """The product of all factors but the zero one has LoRA's variance, 1 / (3 C_in kH kW)."""
    torch.manual_seed(0)
    layer = DeboraConv2d(nn.Conv2d(channels, 8, kernel), "default", 2048, DeboraConfig(target_modules=["x"]))
    assert not layer.factors("default")[0].any()
    found = products(layer)
    assert found.square().mean() * (3 * found[..., 0].numel()) == pytest.approx(1, rel=0.08)


@pytest.mark.parametrize(("channels", "kernel"), SHAPES)
def test_a_step_of_adamw_moves_the_kernel_as_far_as_loras(channels, kernel):
    """AdamW's first step moves every entry of LoRA's A, (r, C_in, kH, kW), by the learning rate."""
    torch.manual_seed(0)
    layer = DeboraConv2d(nn.Conv2d(channels, 8, kernel), "default", 2048, DeboraConfig(target_modules=["x"]))
    U, *others = layer.factors("default")
    nn.init.normal_(U)
    before, update = products(layer), layer.get_delta_weight("default")
    (update * torch.randn(update.shape)).sum().backward()
    torch.optim.AdamW(others, lr=1e-4, weight_decay=0).step()
    assert (products(layer) - before).norm() == pytest.approx(1e-4 * before.numel() ** 0.5, rel=0.1)


def test_groups_are_refused_with_the_layers_name():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match=r"layer '0' cannot be adapted: groups = 2: .* grouped kernel"):
        get_peft_model(model, DeboraConfig(target_modules=["0"]))


def network() -> nn.Module:
    """Convolutions of several shapes, a linear layer and a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, (1, 3), padding="same"),
        nn.Conv2d(8, 10, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(10 * 25, 6),
        nn.Linear(6, 2),
    )


def adapted(geometry: str = "matrix", **settings) -> PeftModel:
    config = DeboraConfig(
        r=4,
        geometry=geometry,
        start="vertex",
        target_modules=["0", "1", "2", "5"],
        modules_to_save=["6"],
        **settings,
    )
    model = get_peft_model(network(), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "debora_" in name:
            nn.init.normal_(parameter, std=0.3)
    for name, buffer in model.named_buffers():
        if "debora_s" in name:
            buffer.uniform_(0.1, 2)
    return model.eval()


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    return model(torch.randn(2, 4, 10, 10, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("geometry", ["matrix", "oblique", "stiefel"])
def test_save_load_and_merge_with_ranks_down_to_zero(geometry, tmp_path):
    model = adapted(geometry)
    model.base_model.keep_columns("default", {"1": torch.tensor([0, 3]), "2": torch.tensor([], dtype=torch.int64)})
    expected = outputs(model)
    assert not torch.allclose(expected, outputs(network()))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(network(), tmp_path).eval()
    assert isinstance(loaded.base_model, DeboraModel)
    ranks = {"0": 4, "1": 2, "2": 0, "5": 4}
    assert {name: loaded.base_model.model.get_submodule(name).r["default"] for name in ranks} == ranks
    assert loaded.peft_config["default"].rank_pattern == {"1": 2, "2": 0}
    assert torch.equal(outputs(loaded), expected)
    for one, other in zip(model.modules(), loaded.modules(), strict=True):
        assert getattr(one, "_manifolds", None) == getattr(other, "_manifolds", None)
    merged = copy.deepcopy(loaded).merge_and_unload(safe_merge=True)
    assert set(merged.state_dict()) == set(network().state_dict())
    torch.testing.assert_close(outputs(merged), expected, rtol=0, atol=1e-5)
    loaded.merge_adapter()
    loaded.unmerge_adapter()
    torch.testing.assert_close(outputs(loaded), expected, rtol=0, atol=1e-5)


def test_shapes_on_the_meta_device():
    with torch.device("meta"):
        module = network()
    model = get_peft_model(module, DeboraConfig(r=4, target_modules=["0", "1"], geometry="stiefel", start="vertex"))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if "debora_" in name}
    assert all(p.device.type == "meta" for p in model.parameters())
    assert sorted(shapes.values()) == sorted([(8, 4), (4, 4), (3, 4), (3, 4), (8, 4), (8, 4), (3, 4)])
