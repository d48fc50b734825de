"""Bottleneck adapters: HAdapter (Houlsby et al., 2019, arXiv 1902.00751) and PAdapter (Pfeiffer et al., 2021, arXiv
2005.00247), for encoders of transformers whose blocks end in LN(h + x).

Here x is what a block (attention or FFN) is given, h what it gives after its dropout, and A(v) = up(f(down(v))) with
Linear(width, bottleneck), an activation f and Linear(bottleneck, width), biases on both.

    HAdapter, both blocks:     LN(h + A(h) + x)            f = swish
    PAdapter, FFN block only:  LN(h + A(LN(h + x)) + x)    f = ReLU, both times the same LayerNorm

The LayerNorms stay frozen. The backbone's own parameters keep their names: an adapter is a submodule `adapter` of the
module whose output it changes, and a forward hook there.
"""

from __future__ import annotations

import json
from abc import ABC
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import Field

from harness.errors import InputError
from harness.method import EVERY_DTYPE, Adaptation, Backbone, BackboneDtype, Method, TrainData
from harness.optimizer import adamw
from harness.storage import VERSION, Damaged, file_sum, seal, unseal

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from harness.spec import TrainSpec

CONFIG, WEIGHTS = "bottleneck.json", "trained.safetensors"  # of an export; the second is `Adaptation.export`'s
SCHEMA = 1  # of CONFIG
FIRST_KEYS = {"placement", "bottleneck"}  # of CONFIG before it had a checksum


class Blocks(NamedTuple):
    """Names of three submodules of an encoder layer."""

    attention: str  # gives h of the attention block
    ffn: str  # gives h of the FFN block
    norm: str  # LayerNorm of the FFN block: given h + x


BERT_LIKE = Blocks("attention.output.dropout", "output.dropout", "output.LayerNorm")
FAMILIES = {  # of transformers.models: the class of an encoder layer, and its blocks
    "bert": ("BertLayer", BERT_LIKE),
    "roberta": ("RobertaLayer", BERT_LIKE),
    "xlm_roberta": ("XLMRobertaLayer", BERT_LIKE),
    "camembert": ("CamembertLayer", BERT_LIKE),
    "electra": ("ElectraLayer", BERT_LIKE),
    "deberta": ("DebertaLayer", BERT_LIKE),
    "deberta_v2": ("DebertaV2Layer", BERT_LIKE),  # DeBERTa-v3 is of this family too
    "mpnet": ("MPNetLayer", BERT_LIKE._replace(attention="attention.dropout")),
    # The attention block has no dropout after its last Linear.
    "distilbert": ("TransformerBlock", Blocks("attention.out_lin", "ffn.dropout", "output_layer_norm")),
}
BLOCKS = {
    f"transformers.models.{family}.modeling_{family}.{layer}": blocks for family, (layer, blocks) in FAMILIES.items()
}


def _after_block(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Hook of the module that gives h: h + A(h)."""
    return output + _adapted(module.adapter, output)


def _around_norm(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Hook of the LayerNorm, which is given s = h + x: LN(s + A(LN(s)))."""
    return module.forward(args[0] + _adapted(module.adapter, output))


def _adapted(adapter: Any, h: Tensor) -> Tensor:
    """A(h), computed in the adapter's type and given back in that of h."""
    update: Tensor = adapter(h.to(adapter.down.weight.dtype))
    return update.to(h.dtype)


class Placement(NamedTuple):
    """Which submodules of a layer get an adapter (fields of `Blocks`), its activation in torch.nn, and the hook."""

    blocks: tuple[str, ...]
    activation: str
    hook: Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]


PLACEMENTS = {
    "houlsby": Placement(("attention", "ffn"), "SiLU", _after_block),
    "pfeiffer": Placement(("norm",), "ReLU", _around_norm),
}


class BottleneckMethod(Method, ABC):
    """What the two methods share: all but the placement and the default bottleneck."""

    placement: ClassVar[str]
    provenance = "from the paper"
    group = "not low-rank"
    own_format = True
    loaders = {"bottleneck.json": "methods.bottleneck.load"}
    capabilities = ("encoders of transformers",)

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    backbone_dtypes: ClassVar[tuple[BackboneDtype, ...]] = EVERY_DTYPE

    bottleneck: int = Field(ge=1, le=65_536, description="width between an adapter's two linear layers")

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        return _misfit(backbone.module)

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        model = backbone.module
        backbone.freeze()
        insert(model, self.placement, self.bottleneck)
        optimizer = adamw(model, self.learning_rate, self.weight_decay)
        return BottleneckAdaptation(model, optimizer, backbone, self)


class HAdapter(BottleneckMethod):
    """HAdapter (Houlsby et al., 2019): two bottleneck adapters per encoder layer, after attention and after the FFN."""

    placement = "houlsby"

    bottleneck: int = Field(32, ge=1, le=65_536, description="width between an adapter's two linear layers")


class PAdapter(BottleneckMethod):
    """PAdapter (Pfeiffer et al., 2021): one bottleneck adapter per encoder layer, after the FFN."""

    placement = "pfeiffer"

    bottleneck: int = Field(64, ge=1, le=65_536, description="width between an adapter's two linear layers")


class BottleneckAdaptation(Adaptation):
    """A model with bottleneck adapters in training."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, backbone: Backbone, method: BottleneckMethod
    ) -> None:
        super().__init__(model, optimizer, backbone)
        self.method = method

    def export(self, path: Path) -> None:
        """The adapters and the head as `load` reads them: `trained.safetensors` and `bottleneck.json`, which has the
        other's checksum and its own."""
        super().export(path)
        config = {
            VERSION: SCHEMA,
            "placement": self.method.placement,
            "bottleneck": self.method.bottleneck,
            WEIGHTS: file_sum(path / WEIGHTS),
        }
        (path / CONFIG).write_text(json.dumps(seal(config), indent=2) + "\n")


def insert(module: nn.Module, placement: str, bottleneck: int) -> None:
    """Add new adapters to every encoder layer of `module`, in place, on its device and in float32 at least.

    The model's output does not change: `up` starts at zero. `down` is drawn from torch's global generator, normal
    with standard deviation 1e-2 truncated at two of them (Houlsby et al., section 3.6), with zero biases.

    placement: "houlsby" or "pfeiffer". bottleneck: at least 1; it may be above the layers' width.
    """
    import torch

    chosen = PLACEMENTS[placement]
    for layer, blocks in list(_encoder_layers(module)):
        norm: Any = layer.get_submodule(blocks.norm)
        for block in chosen.blocks:
            site = layer.get_submodule(getattr(blocks, block))
            adapter = _adapter(norm.weight.numel(), bottleneck, chosen.activation)
            site.add_module(
                "adapter", adapter.to(norm.weight.device, torch.promote_types(norm.weight.dtype, torch.float32))
            )
            site.register_forward_hook(chosen.hook)


def load(module: nn.Module, path: Path) -> nn.Module:
    """`module`, a model built as the one that was trained, with an exported adapter and head put onto it, in place.

    Raises InputError, in one line, where `path` holds no such export, where it is damaged, or where it does not fit the
    model (its class, its widths, its number of labels, adapters that are there already); do not use the model then. An
    export of an earlier version, without checksums, is checked for names, shapes, types and finite values alone.
    """
    try:
        placement, bottleneck, trained = _exported(path)
    except (OSError, Damaged) as error:
        told = " ".join(str(error).split())
        raise InputError(f"'{path}' holds no exported bottleneck adapter that can be read: {told}") from None
    reason = _misfit(module)
    if reason is not None:
        raise InputError(f"the adapter in '{path}' does not fit the model: {reason}")
    insert(module, placement, bottleneck)
    try:
        missing, unexpected = module.load_state_dict(trained, strict=False)
    except RuntimeError as error:  # shapes
        reason = " ".join(str(error).split())
        raise InputError(f"the adapter in '{path}' does not fit the model: {reason}") from None
    strange = [*unexpected, *(name for name in missing if ".adapter." in name)]
    if strange:
        raise InputError(f"the adapter in '{path}' does not fit the model: only one of them has '{strange[0]}'")
    return module


def _exported(path: Path) -> tuple[str, int, dict[str, Tensor]]:
    """(placement, bottleneck, parameters by name) of an export. Raises Damaged, naming the file, or OSError."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for file in (path / CONFIG, path / WEIGHTS):
        if not file.is_file():
            raise Damaged(f"'{file}' is not there or no regular file")
    placement, bottleneck = _settings(path)
    try:
        trained = load_file(path / WEIGHTS)
    except SafetensorError as error:
        raise Damaged(f"'{path / WEIGHTS}' is no safetensors file: {error}") from None
    widths = {numbers.shape[:1] for name, numbers in trained.items() if name.endswith(".adapter.down.weight")}
    if widths != {(bottleneck,)}:  # found out before layers of a wrong size are made
        raise Damaged(f"bottleneck = {bottleneck} in '{path / CONFIG}' is not the size of what is in {WEIGHTS}")
    for name, numbers in trained.items():
        if numbers.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise Damaged(f"'{name}' in '{path / WEIGHTS}' holds {numbers.dtype}, not floating-point numbers")
        if not numbers.isfinite().all():
            raise Damaged(f"'{name}' in '{path / WEIGHTS}' holds numbers that are not finite")
    return placement, bottleneck, trained


def _settings(path: Path) -> tuple[str, int]:
    """(placement, bottleneck) of an export whose two files are as they were written. Raises Damaged or OSError."""
    raw, what = (path / CONFIG).read_bytes(), f"'{path / CONFIG}'"
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{what} is not JSON: {error}") from None
    if not (isinstance(config, dict) and config.keys() == FIRST_KEYS):
        config = unseal(raw, SCHEMA, what)
        if config.get(WEIGHTS) != file_sum(path / WEIGHTS):
            raise Damaged(f"the checksum of '{path / WEIGHTS}' is not the one in {what}")
    placement, bottleneck = config.get("placement"), config.get("bottleneck")
    if placement not in (known := sorted(PLACEMENTS)):
        raise Damaged(f"{what} has placement = {placement!r}; known are {', '.join(known)}")
    if type(bottleneck) is not int or bottleneck < 1:
        raise Damaged(f"{what} has bottleneck = {bottleneck!r}; a whole number of at least 1 is needed")
    return placement, bottleneck


def _misfit(module: nn.Module) -> str | None:
    """Why adapters cannot be inserted, or None."""
    if next(_encoder_layers(module), None) is None:
        return f"{type(module).__name__} has no encoder layer of transformers' {', '.join(FAMILIES)}"
    if any(name.endswith(".adapter") for name, _ in module.named_modules()):
        return f"{type(module).__name__} has adapters already"
    return None


def _encoder_layers(module: nn.Module) -> Iterator[tuple[nn.Module, Blocks]]:
    for layer in module.modules():
        blocks = BLOCKS.get(f"{type(layer).__module__}.{type(layer).__qualname__}")
        if blocks is not None:
            yield layer, blocks


def _adapter(width: int, bottleneck: int, activation: str) -> nn.Module:
    """A of the module's docstring: (..., width) to (..., width)."""
    from torch import nn

    down, up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
    nn.init.trunc_normal_(down.weight, std=1e-2, a=-2e-2, b=2e-2)
    for zero in (down.bias, up.weight, up.bias):
        nn.init.zeros_(zero)
    return nn.Sequential(OrderedDict(down=down, activation=getattr(nn, activation)(), up=up))
