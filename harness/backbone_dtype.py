"""The type that a frozen backbone is held in: `--backbone-dtype`. Adapters and the head are float32 in all of them.

fp32, bf16, fp16: every parameter beside the head, but those of BatchNorm layers, whose statistics are float32. int8,
nf4: the weights of linear layers are packed by bitsandbytes, as LLM.int8() (Dettmers et al., 2022, arXiv 2208.07339)
and QLoRA (Dettmers et al., 2023, arXiv 2305.14314, with double quantisation) have it; everything else is bf16, and so
is what is multiplied.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.backbone import PACKED, Backbone, BackboneDtype, in_modules
from harness.errors import InputError

if TYPE_CHECKING:
    from harness.method import Method

TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.bfloat16}
TORCH |= {"nf4": torch.bfloat16}  # with int8: of all that is not packed
OUTLIER = 6.0  # inputs above it are multiplied unrounded: LLM.int8()'s own value
PACKAGE = "bitsandbytes"


def check_library(dtype: BackboneDtype) -> None:
    """Raises InputError where `dtype` needs a package that cannot be imported."""
    if dtype not in PACKED:
        return
    try:
        importlib.import_module(PACKAGE)
    except ImportError:
        raise InputError(
            f"--backbone-dtype {dtype} needs {PACKAGE}, which cannot be imported: pip install "
            "'rank-adaptive-harness[quantised]', or take bf16",
            dtype,
        ) from None


def unfit(method: Method, backbone: Backbone) -> str | None:
    """Why the method cannot work on the backbone in the type that it is held in, or at all; None where it can."""
    dtype = backbone.dtype
    if dtype not in method.backbone_dtypes:
        return f"it takes a backbone in {_either(method.backbone_dtypes)}, not in {dtype}"
    if dtype in PACKED and not any(True for _ in _packable(backbone)):
        return f"{dtype} packs linear layers alone, and {backbone.without_layers('linear layer', 'pack')}"
    return method.unsupported(backbone)


def lower(backbone: Backbone, dtype: BackboneDtype) -> None:
    """Hold the backbone in `dtype`, in place, on whatever device it is; linear layers are not packed yet, see `pack`.

    The head stays in float32 and is handed float32. What the model is given, as images, is cast to the backbone's type.
    """
    backbone.dtype = dtype
    if dtype == "fp32":
        return
    for module_name, module in backbone.module.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if not in_modules(f"{module_name}.{name}", backbone.head):
                parameter.data = parameter.data.to(TORCH[dtype])
    backbone.module.register_forward_pre_hook(_Cast(TORCH[dtype]), with_kwargs=True)
    for name in backbone.head:
        backbone.module.get_submodule(name).register_forward_pre_hook(_Cast(torch.float32), with_kwargs=True)


def pack(backbone: Backbone, device: torch.device) -> None:
    """Bring the backbone to the device, its linear layers packed where its type says so. Raises InputError without the
    library for it."""
    if backbone.dtype in PACKED:
        check_library(backbone.dtype)
        for name, layer in list(_packable(backbone)):
            parent, _, own = name.rpartition(".")
            setattr(backbone.module.get_submodule(parent), own, _packed(layer, backbone.dtype))
    backbone.module.to(device)  # which packs what is to be packed


def held_bytes(module: nn.Module) -> int:
    """Bytes of the parameters as they are held; of packed ones with their scales."""
    return sum(_bytes(parameter) for parameter in module.parameters())


def _bytes(parameter: Tensor) -> int:
    state, scale = getattr(parameter, "quant_state", None), getattr(parameter, "SCB", None)
    more = [] if scale is None else [scale]
    if state is not None:
        more = [state.absmax] + ([state.offset, state.state2.absmax] if state.nested else [])
    return parameter.nbytes + sum(tensor.nbytes for tensor in more)


def _packable(backbone: Backbone) -> Iterator[tuple[str, nn.Linear]]:
    """The layers to pack: plain linear ones, but those that transformers keeps in a higher precision (T5's `wo`)."""
    kept = getattr(backbone.module, "_keep_in_fp32_modules", None) or ()
    for name in backbone.layers:
        layer = backbone.module.get_submodule(name)
        if type(layer) is nn.Linear and not set(name.split(".")) & set(kept):
            yield name, layer


def _packed(layer: nn.Linear, dtype: BackboneDtype) -> nn.Linear:
    """bitsandbytes' layer in place of a plain one; the weight is packed when it comes to a device."""
    bnb: Any = importlib.import_module(f"{PACKAGE}.nn")
    sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
    if dtype == "int8":
        packed = bnb.Linear8bitLt(*sizes, bias, has_fp16_weights=False, threshold=OUTLIER, device="meta")
        packed.weight = bnb.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        packed = bnb.Linear4bit(*sizes, bias, TORCH[dtype], compress_statistics=True, quant_type="nf4", device="meta")
        packed.weight = bnb.Params4bit(
            layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=packed
        )
        packed.support_avx512bf16_for_cpu = False  # an evaluation would pack it another way, and round its scales
    if bias:
        packed.bias = layer.bias
    packed.register_forward_hook(_own)
    packed.train(layer.training)
    plain: nn.Linear = packed
    return plain


def _own(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """A hook: the output as a tensor of its own. Adapters add to it in place, and autograd allows no view there."""
    return output.clone()


class _Cast:
    """A hook before a forward: floating-point inputs become of `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(map(self._cast, args)), {name: self._cast(value) for name, value in kwargs.items()}

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _either(words: tuple[str, ...]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
