"""How many bytes an optimizer keeps between two updates, from shapes alone.

A linear layer's weight has m outputs and n inputs; b is its smaller side, a the larger one. With e bytes a number:

    AdamW                         2 m n e + 4 (its count of steps)
    GaLore, FRUGAL with svd       (2 a + b) r e            moments of the projection, and its basis
    FRUGAL with columns           (2 m e + 8) k            moments of k columns, and which these are
    DCT-AdamW                     (2 a e + 8) r            and, once for each smaller side, a basis of b b e
    its error feedback            m n e more
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.method import Backbone
    from methods.full.method import Full

COUNT, INDEX = 4, 8  # bytes of AdamW's count of steps, and of the place of a column


def adamw_bytes(backbone: Backbone, without: Iterable[str] = ()) -> int:
    """Bytes that AdamW keeps of all parameters but the weights of the layers `without`."""
    module = backbone.module
    left_out = {id(module.get_parameter(f"{name}.weight")) for name in without}
    return sum(2 * p.nbytes + COUNT for p in module.parameters() if id(p) not in left_out)


def optimizer_bytes(method: Full, backbone: Backbone, targets: tuple[str, ...]) -> int:
    """Bytes that the method's optimizer keeps, with `targets` for the layers that have a subspace. Not for adamw."""
    weights = {name: backbone.module.get_parameter(f"{name}.weight") for name in backbone.layers}
    stateless = [name for name, weight in weights.items() if weight.dim() == 2]
    total = adamw_bytes(backbone, stateless if method.optimizer == "frugal" else targets)
    bases = {}
    for weight, name in {weights[name]: name for name in targets}.items():  # once, where layers share one
        shape, size = backbone.shape(name), weight.element_size()
        total += _of_matrix(method, *shape, size)
        bases[min(shape), weight.dtype] = min(shape) ** 2 * size
    return total + (sum(bases.values()) if method.optimizer == "dct_adamw" else 0)


def _of_matrix(method: Full, outputs: int, inputs: int, size: int) -> int:
    smaller, larger = sorted((outputs, inputs))
    if method.density is not None:
        if method.subspace == "columns":
            return (2 * outputs * size + INDEX) * round(method.density * inputs)
        return (2 * larger + smaller) * round(method.density * smaller) * size
    assert method.rank is not None
    if method.optimizer == "galore":
        return (2 * larger + smaller) * method.rank * size
    return (2 * larger * size + INDEX) * method.rank + (outputs * inputs * size if method.error_feedback else 0)
