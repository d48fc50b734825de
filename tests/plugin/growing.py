"""A low-rank update that grows and is then pruned: a method whose size changes, in one file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from harness.method import RANK, Adaptation, Backbone, Method, Step, TrainData
from harness.optimizer import adamw, decay_groups

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from harness.spec import TrainSpec


class Growing(Method):
    """Rank-one pairs are added to every linear layer, and the smallest of the network are removed again."""

    provenance = "ours: an example"
    group = "ranks searched"
    capabilities = ("linear", "rank-adaptive")
    traces = (RANK,)

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    every: int = Field(3, ge=1, description="updates between two pairs")
    rank: int = Field(3, ge=1, description="pairs of a layer before the pruning, at most")
    keep: float = Field(0.5, gt=0, le=1, description="share of all pairs that stays")
    prune_at: float = Field(0.6, gt=0, lt=1, description="share of the budget after which the others are removed")

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        targets = self._targets(backbone)
        backbone.check_rank(self.rank, targets)
        return None if targets else backbone.without_layers("linear layer")

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`: nothing but the head, and room for pairs beside each layer."""
        from torch import nn

        backbone.module.requires_grad_(False)
        for _, parameter in backbone.head_parameters():
            parameter.requires_grad_(True)
        layers = {name: backbone.module.get_submodule(name) for name in self._targets(backbone)}
        for layer in layers.values():
            layer.add_module("pairs", nn.ModuleList())
            layer.register_forward_hook(_add_pairs)
        return GrowingAdaptation(self, layers, backbone)

    def _targets(self, backbone: Backbone) -> tuple[str, ...]:
        from torch import nn

        return tuple(name for name in backbone.layers if isinstance(backbone.module.get_submodule(name), nn.Linear))


class GrowingAdaptation(Adaptation):
    """One run. A pair is a layer to one number and a layer from it: b a^T."""

    def __init__(self, method: Growing, layers: dict[str, Any], backbone: Backbone) -> None:
        super().__init__(backbone.module, adamw(backbone.module, method.learning_rate, method.weight_decay), backbone)
        self.method = method
        self.layers = layers
        self.pruned = False

    def ranks(self) -> dict[str, int]:
        """See `Adaptation.ranks`."""
        return {name: len(layer.pairs) for name, layer in self.layers.items()}

    def after_step(self, step: Step) -> dict[str, Any]:
        """See `Adaptation.after_step`. The loop sees the new sizes by itself."""
        if self.pruned:
            return {}
        if step.used >= self.method.prune_at * step.budget:
            self._prune()
        elif step.index % self.method.every == 0 and max(self.ranks().values()) < self.method.rank:
            for layer in self.layers.values():
                layer.pairs.append(_pair(layer, step.rng))
        else:
            return {}
        self._follow()
        return {"rank": sum(self.ranks().values())}

    def state_dict(self) -> dict[str, Any]:
        """See `Adaptation.state_dict`."""
        return super().state_dict() | {"ranks": self.ranks(), "pruned": self.pruned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Adaptation.load_state_dict`. The pairs are made first, their values read then."""
        import torch

        for name, layer in self.layers.items():
            layer.pairs.extend(_pair(layer, torch.Generator()) for _ in range(state["ranks"][name]))
        self._follow()
        super().load_state_dict(state)
        self.pruned = state["pruned"]

    def _prune(self) -> None:
        """Remove all but the largest pairs of the network, by |a| |b|."""
        pairs = [pair for layer in self.layers.values() for pair in layer.pairs]
        norms = [(a.weight.detach().norm() * b.weight.detach().norm()).item() for a, b in pairs]
        kept = iter(_largest(norms, round(self.method.keep * len(norms))))
        for layer in self.layers.values():
            stays = [next(kept) for _ in layer.pairs]
            for place in reversed(range(len(stays))):
                if not stays[place]:
                    del layer.pairs[place]
        self.pruned = True

    def _follow(self) -> None:
        """Let the optimizer train what is there now: moments of the others go, new ones begin with none."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for group, now in zip(self.optimizer.param_groups, decay_groups(trained, 0.0), strict=True):
            group["params"] = now["params"]
        for gone in self.optimizer.state.keys() - set(trained):
            del self.optimizer.state[gone]


def _add_pairs(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Hook of an adapted layer."""
    for pair in layer.pairs:
        output = output + pair(args[0])
    return output


def _pair(layer: Any, rng: torch.Generator) -> nn.Module:
    """A new pair, which adds nothing yet: `a` is drawn, `b` is 0."""
    import torch
    from torch import nn

    like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    a = nn.utils.skip_init(nn.Linear, layer.in_features, 1, bias=False, **like)
    b = nn.utils.skip_init(nn.Linear, 1, layer.out_features, bias=False, **like)
    with torch.no_grad():
        a.weight.copy_(torch.randn(a.weight.shape, generator=rng) / layer.in_features**0.5)
        b.weight.zero_()
    return nn.Sequential(a, b)


def _largest(values: list[float], count: int) -> list[bool]:
    """Which of the values are among the `count` largest."""
    order = sorted(range(len(values)), key=lambda place: -values[place])[:count]
    return [place in order for place in range(len(values))]
