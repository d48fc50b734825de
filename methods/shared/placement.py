"""Components put into layers by nothing that was learned: by chance, by depth, or by the kind of layer.

A layer's kind is read from its qualified name, as the families of transformers have them. "attention" is a layer with
"attention" or "attn" in its name: encoder.layer.3.attention.output.dense, h.3.attn.c_attn, block.0.SelfAttention.q.
"feed_forward" is any other linear layer of a numbered block: encoder.layer.3.output.dense, layers.3.mlp.up_proj. The
rest is neither: poolers, projections of embeddings, convolutions outside attention.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from harness.errors import InputError
from harness.method import Backbone, is_transposed

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Rule = Literal["random", "first", "last", "attention", "feed_forward"]
BY_DEPTH = ("first", "last")  # where nothing is drawn
BY_KIND = ("attention", "feed_forward")
ATTENTION = re.compile("attention|attn", re.IGNORECASE)
IN_A_BLOCK = re.compile(r"(^|\.)[0-9]+\.")
Layers = tuple[str, ...]


class Placement(NamedTuple):
    """So many `components` in all, at most `rank` in a layer.

    "random": every set of components among the rank * layers that there could be is as likely as another. The other
    rules give each layer the same number, and one more to the first or the last layers, or, among the layers of a kind,
    to some that are drawn. draw: which draw of the run's seed it is.
    """

    rule: Rule
    components: int
    rank: int
    draw: int = 0

    def candidates(self, backbone: Backbone, targets: Layers) -> Layers:
        """The targets that may get components."""
        if self.rule not in BY_KIND:
            return targets
        return tuple(name for name in targets if _kind(name, backbone.module.get_submodule(name)) == self.rule)

    def misfit(self, backbone: Backbone, targets: Layers) -> str | None:
        """Why nothing can be put into the targets, or None. Raises InputError for more components than there could be,
        or a rank above a layer's smaller side."""
        layers = self.candidates(backbone, targets)
        if not layers:
            return f"placement = {self.rule}: by their names, none of the layers to adapt is of that kind"
        backbone.check_rank(self.rank, layers)
        if self.components > (most := self.rank * len(layers)):
            given = f"components = {self.components} is above the {most}"
            raise InputError(f"{given} that rank = {self.rank} gives {len(layers)} layers", "components")
        return None

    def ranks(self, backbone: Backbone, targets: Layers, rng: torch.Generator) -> dict[str, int]:
        """The rank of each target."""
        import torch

        layers = self.candidates(backbone, targets)
        count = len(layers)
        if self.rule == "random":
            drawn = permutation(self.rank * count, rng, self.draw)[: self.components] // self.rank
            found = torch.bincount(drawn, minlength=count).tolist()
        else:
            each, left = divmod(self.components, count)
            order = range(count) if self.rule in BY_DEPTH else permutation(count, rng, self.draw).tolist()
            more = order[count - left :] if self.rule == "last" else order[:left]
            found = [each + (place in more) for place in range(count)]
        return dict.fromkeys(targets, 0) | dict(zip(layers, found, strict=True))

    def told(self, backbone: Backbone, targets: Layers) -> str:
        """How many layers get how many components; of "random" what is expected."""
        count, size = len(self.candidates(backbone, targets)), self.components
        if self.rule == "random":
            most = self.rank * count
            none = count * math.comb(most - self.rank, size) / math.comb(most, size)
            return (
                f"{size} of {most} components, drawn for each seed, which leave about {none:.0f} of {count} layers none"
            )
        each, left = divmod(size, count)
        shares = {each + 1: left, each: count - left}
        listed = " and ".join(f"{number} in each of {layers}" for number, layers in shares.items() if layers)
        drawn = ", drawn for each seed" if left and self.rule in BY_KIND else ""
        return f"{size} components: {listed} layers{drawn}"


def spread(components: int | None, rank: int, targets: Sequence[str]) -> dict[str, int]:
    """The rank of each layer: the same in all, and one more in the first ones where some are left; `rank` without a
    number of components."""
    if components is None:
        return dict.fromkeys(targets, rank)
    each, more = divmod(components, len(targets))
    return {name: each + (place < more) for place, name in enumerate(targets)}


def check_spread(components: int | None, rank: int, backbone: Backbone, targets: Layers) -> None:
    """Raises InputError where `spread` would give a layer none, or more than the smaller side of one."""
    if components is None:
        return backbone.check_rank(rank, targets)
    smallest = min(targets, key=lambda name: min(backbone.shape(name)))
    count, side = len(targets), min(backbone.shape(smallest))
    if not count <= components <= count * side:
        raise InputError(
            f"components = {components} should be {count} to {count * side}: one to {side} in each of {count} layers, "
            f"{side} being the smaller side of layer '{smallest}'",
            "components",
        )


def permutation(size: int, rng: torch.Generator, draw: int) -> Tensor:
    """(size,) int64: the generator's permutation of number `draw`, from 0 on."""
    import torch

    return [torch.randperm(size, generator=rng) for _ in range(draw + 1)][-1]


def _kind(name: str, layer: nn.Module) -> str | None:
    from torch import nn

    if ATTENTION.search(name):
        return "attention"
    is_linear = isinstance(layer, nn.Linear) or is_transposed(layer)
    return "feed_forward" if is_linear and IN_A_BLOCK.search(name) else None
