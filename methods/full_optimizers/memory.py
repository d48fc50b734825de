"""How many bytes an optimizer keeps between two updates, from shapes alone.

A linear layer's weight has m outputs and n inputs; b is its smaller side, a the larger one. With e bytes a number:

    AdamW                         2 m n e + 4 (its count of steps)
    GaLore, FRUGAL with svd       (2 a + b) r e            moments of the projection, and its basis
    FRUGAL with columns           (2 m e + 8) k            moments of k columns, and which these are
    DCT-AdamW                     (2 a e + 8) r            and, once for each smaller side, a basis of b b e
    its error feedback            m n e more
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from harness.method import Backbone

COUNT, INDEX = 4, 8  # bytes of AdamW's count of steps, and of the place of a column


def adamw_bytes(backbone: Backbone, without: Iterable[str] = ()) -> int:
    """Bytes that AdamW keeps of all parameters but the weights of the layers `without`."""
    module = backbone.module
    left_out = {id(module.get_parameter(f"{name}.weight")) for name in without}
    return sum(2 * p.nbytes + COUNT for p in module.parameters() if id(p) not in left_out)


def optimizer_bytes(optimizer: str, settings: Mapping[str, Any], backbone: Backbone, targets: tuple[str, ...]) -> int:
    """Bytes that an optimizer with these settings keeps; `targets`: the layers that have a subspace. Not for adamw."""
    weights = {name: backbone.module.get_parameter(f"{name}.weight") for name in backbone.layers}
    stateless = [name for name, weight in weights.items() if weight.dim() == 2]
    total = adamw_bytes(backbone, stateless if optimizer == "frugal" else targets)
    bases = {}
    for weight, name in {weights[name]: name for name in targets}.items():  # once, where layers share one
        shape, size = backbone.shape(name), weight.element_size()
        total += _of_matrix(settings, *shape, size)
        bases[min(shape), weight.dtype] = min(shape) ** 2 * size
    return total + (sum(bases.values()) if optimizer == "dct_adamw" else 0)


def _of_matrix(settings: Mapping[str, Any], outputs: int, inputs: int, size: int) -> int:
    smaller, larger = sorted((outputs, inputs))
    if settings.get("subspace") == "columns":
        return (2 * outputs * size + INDEX) * round(settings["density"] * inputs)
    if "selection" in settings:
        error = outputs * inputs * size if settings["error_feedback"] else 0
        return (2 * larger * size + INDEX) * settings["rank"] + error
    directions = settings["rank"] if "rank" in settings else round(settings["density"] * smaller)
    return int((2 * larger + smaller) * directions * size)
