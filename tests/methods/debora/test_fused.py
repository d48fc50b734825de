"""The fused linear layer against the plain composition."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from methods.debora.tuner.config import DeboraConfig
from methods.debora.tuner.fused import fused_linear
from methods.debora.tuner.layer import DeboraLayer, DeboraLinear


def tensors(*shape: int, bias: bool = True, rank: int = 3) -> list[torch.Tensor | None]:
    """x, W, b, B and V in float64; x has this shape."""
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    x, B, V = draw(*shape), draw(5, rank), draw(shape[-1], rank)
    for tensor in (x, B, V):
        tensor.requires_grad_()
    return [x, draw(5, shape[-1]), draw(5) if bias else None, B, V]


@pytest.mark.parametrize(("shape", "bias"), [((4, 6), True), ((2, 3, 6), False), ((6,), True)])
def test_first_and_second_derivatives(shape, bias):
    assert torch.autograd.gradcheck(fused_linear, tensors(*shape, bias=bias))
    assert torch.autograd.gradgradcheck(fused_linear, tensors(*shape, bias=bias))


def layer_in(dtype: torch.dtype = torch.float64, rank: int = 3) -> DeboraLinear:
    """A layer of random numbers, 6 inputs and 5 outputs."""
    torch.manual_seed(0)
    base = nn.Linear(6, 5, dtype=dtype).requires_grad_(False)
    layer = DeboraLinear(base, "default", rank, DeboraConfig(target_modules=["x"]))
    nn.init.normal_(layer.debora_U["default"])
    layer.debora_s["default"].uniform_(0.5, 2).requires_grad_()
    return layer


def gradients(layer: DeboraLinear, forward, x: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of x, U, V and s for a loss that is not linear."""
    x = x.detach().requires_grad_()
    output = forward(layer, x)
    wanted = [x, *layer.factors("default"), layer.debora_s["default"]]
    return [output.detach(), *torch.autograd.grad(output.float().tanh().sum(), wanted)]


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("make", [lambda: torch.randn(7, 4, 6), lambda: torch.randn(4, 6, 7).transpose(1, 2)])
def test_the_layer_is_the_plain_composition(make, rank):
    layer = layer_in(rank=rank)
    x = make().double()
    found, expected = (gradients(layer, forward, x) for forward in (DeboraLinear.forward, DeboraLayer.forward))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    output = layer(x.requires_grad_())
    assert output.is_contiguous()
    assert output.grad_fn.next_functions[0][0].name() == "FrozenLinearPlusLowRankBackward"


def test_only_the_gradients_that_are_needed():
    layer = layer_in()
    layer.debora_s["default"].requires_grad_(False)
    layer.debora_V["default"].requires_grad_(False)
    layer(torch.randn(4, 6, dtype=torch.float64)).sum().backward()
    assert layer.debora_V["default"].grad is None
    assert layer.debora_U["default"].grad.any()


def test_autocast_computes_as_the_plain_composition_does():
    layer, x = layer_in(torch.float32), torch.randn(9, 6)
    exact = gradients(layer, DeboraLayer.forward, x)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (gradients(layer, forward, x) for forward in (DeboraLinear.forward, DeboraLayer.forward))
    assert found[0].dtype == expected[0].dtype == torch.bfloat16
    for one, other, true in zip(found, expected, exact, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one.float(), true, rtol=0.05, atol=0.1)
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.1)


def test_autocast_leaves_float64_alone():
    layer, x = layer_in(), torch.randn(9, 6, dtype=torch.float64)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)


def test_adapter_numbers_are_float32_on_a_bfloat16_layer():
    layer = layer_in(torch.bfloat16)
    assert {p.dtype for p in layer.factors("default")} == {layer.debora_s["default"].dtype} == {torch.float32}
    x = torch.randn(4, 6, dtype=torch.bfloat16)
    output = layer(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, DeboraLayer.forward(layer, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_update_of_a_layer_in_a_lower_precision_is_computed_in_float32(dtype):
    layer = layer_in(dtype)
    x, upstream = torch.randn(7, 4, 6).to(dtype), torch.randn(7, 4, 5).to(dtype)

    def passed_on(layer, x, upstream):
        x = x.detach().requires_grad_()
        output = layer(x)
        return [
            output,
            *torch.autograd.grad(output, [x, *layer.factors("default"), layer.debora_s["default"]], upstream),
        ]

    found = passed_on(layer, x, upstream)
    true = passed_on(copy.deepcopy(layer).double(), x.double(), upstream.double())
    assert [one.dtype for one in found] == [dtype, dtype, *[torch.float32] * 3]
    for one, right in zip(found, true, strict=True):  # output and gradient of x are rounded twice, the others never
        error = 2 * torch.finfo(dtype).eps if one.dtype == dtype else 1e-6
        assert (one - right).norm() <= error * right.norm()
    output = layer(x.requires_grad_())
    assert output.grad_fn.next_functions[0][0].name() == "FrozenLinearPlusLowRankBackward"


def test_no_copy_of_the_input_in_float32_is_kept():
    """It would be as large as all else that is kept."""
    layer, x = layer_in(torch.bfloat16), torch.randn(9, 6).bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    assert {tensor.dtype for tensor in kept if tensor.shape == x.shape} == {torch.bfloat16}


def trained_base(layer):
    layer.base_layer.requires_grad_(True)


def hooked_base(layer):
    layer.base_layer.register_forward_hook(lambda module, inputs, output: output + 1)


def replaced_forward(layer):
    layer.base_layer.forward = lambda x: nn.functional.linear(x, layer.base_layer.weight)


def subclassed_base(layer):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.base_layer.__class__ = Doubled


def second_adapter(layer):
    layer.update_layer("second", 2, DeboraConfig(target_modules=["x"]))
    nn.init.normal_(layer.debora_U["second"])
    layer.double()
    layer.set_adapter(["default", "second"])


@pytest.mark.parametrize("change", [trained_base, hooked_base, replaced_forward, subclassed_base, second_adapter])
def test_a_base_layer_that_is_more_than_its_formula_runs_itself(change):
    layer = layer_in()
    plain = copy.deepcopy(layer)(torch.ones(2, 6, dtype=torch.float64))
    change(layer)
    x = torch.ones(2, 6, dtype=torch.float64, requires_grad=True)
    output = layer(x)
    assert type(output.grad_fn).__name__ != "FrozenLinearPlusLowRankBackward"
    torch.testing.assert_close(output, DeboraLayer.forward(layer, x))
    assert change is trained_base or not torch.allclose(output, plain)
    output.sum().backward()
    assert (layer.base_layer.weight.grad is not None) == (change is trained_base)
