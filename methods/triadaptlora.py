"""TriAdaptLoRA (Liang et al., 2025, arXiv 2501.08008): a growing core of two triangles between a LoRA's factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from harness.method import Adaptation, Backbone, Step, TrainData
from harness.optimizer import adamw
from methods.shared.cored_lora import GrowingLoraAdaptation, cored_model
from methods.shared.growing_lora import GrowingLora, most_ranks

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from harness.spec import TrainSpec


class TriAdaptLora(GrowingLora):
    """TriAdaptLoRA (Liang et al., 2025): updates B (L + U) A, whose triangular core grows where it has grown most.

    L and U are a block-lower and a block-upper triangle. Each layer starts with one block of `init_rank`; a growth by d
    ranks adds d rows to L, d columns to U, d columns to B and d rows to A. Every deltaT updates after tinit the layers
    are ranked by how much |L + U|_F / (number of blocks) has risen since the last round. With R ranks of the target T
    at the share p of the updates after tinit, (T - R) p layers grow, or (T - R)^p with growth=exponential, at least
    one, by `increment` ranks each, until all together have `components`, or `target_rank` times their number.

    B and A start with random entries, L and U with 0, new blocks as well: gradients reach L and U at once, and a growth
    at a constant scale leaves the function as it is. The source has other starts; one of them never moves.
    """

    provenance = "reimplementation: the source leaves open the start, the scale, and what a round may exceed"

    target_rank: int = Field(8, ge=1, description="mean rank of the layers in the end, at least init_rank")
    growth: Literal["linear", "exponential"] = Field(
        "linear", description="how the number of growing layers follows the share of the updates made"
    )
    orthogonality: float = Field(
        0.5, ge=0, description="weight of the mean of ||A A^T - I||_F and ||B^T B - I||_F over the layers"
    )

    def layers_to_grow(self, missing: int, progress: float) -> int:
        """See `GrowingLora.layers_to_grow`."""
        return max(1, int(missing * progress if self.growth == "linear" else missing**progress))

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        targets = backbone.targets(self.target_modules)
        most, ranks = most_ranks(backbone, targets), dict.fromkeys(targets, self.init_rank)
        cores = {name: [0.0] * num_entries(rank, rank) for name, rank in ranks.items()}
        model = cored_model(self, backbone, ranks, cores, rng)
        optimizer = adamw(model, self.learning_rate, self.weight_decay)
        return TriAdaptLoraAdaptation(self, model, optimizer, backbone, targets, most)


class TriAdaptLoraAdaptation(GrowingLoraAdaptation):
    """One run. blocks: the sizes of each layer's blocks. norms: |L + U|_F / (number of blocks) at the last round,
    (layers,)."""

    method: TriAdaptLora

    def __init__(
        self,
        method: TriAdaptLora,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        backbone: Backbone,
        targets: tuple[str, ...],
        most: Mapping[str, int],
    ) -> None:
        import torch

        self.blocks = {name: [method.init_rank] for name in targets}
        self.places: dict[str, Tensor] = {}  # of each layer's entries in its core
        super().__init__(method, model, optimizer, backbone, targets, most)
        self.norms = torch.zeros(len(targets)).to(self.parts(targets[0])[1])

    def core(self, name: str) -> Tensor:
        """See `GrowingLoraAdaptation.core`: L + U."""
        entries, rank = self.parts(name)[2], sum(self.blocks[name])
        if name not in self.places:
            self.places[name] = places_of(self.blocks[name]).to(entries.device)
        return entries.new_zeros(rank * rank).index_add(0, self.places[name], entries).view(rank, rank)

    def unit_entries(self, name: str) -> Tensor:
        """See `GrowingLoraAdaptation.unit_entries`: a half in both diagonals."""
        entries, rank = self.parts(name)[2], sum(self.blocks[name])
        return (places_of(self.blocks[name]) % (rank + 1) == 0).to(entries) / 2

    def scores(self) -> Tensor:
        """See `GrowingLoraAdaptation.scores`."""
        import torch

        norms = [self.core(name).detach().norm() / len(self.blocks[name]) for name in self.targets]
        before, self.norms = self.norms, torch.stack(norms)
        return self.norms - before

    def grow(self, name: str, gain: int, last: bool, step: Step) -> None:
        """See `GrowingLoraAdaptation.grow`."""
        entries, rank = self.parts(name)[2], self.live[name] + gain
        self.extend(name, gain, entries.detach().new_zeros(num_entries(gain, rank)), step)
        self.blocks[name].append(gain)
        self.places.pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        """See `Adaptation.state_dict`."""
        return super().state_dict() | {"blocks": self.blocks, "norms": self.norms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Adaptation.load_state_dict`."""
        self.blocks, self.places = {name: list(sizes) for name, sizes in state["blocks"].items()}, {}
        super().load_state_dict(state)
        self.norms.copy_(state["norms"])


def num_entries(size: int, rank: int) -> int:
    """Entries of a block of this size, the last one of a core of this rank: its rows of L and its columns of U."""
    return 2 * size * rank


def places_of(blocks: Sequence[int]) -> Tensor:
    """The places in a core of sum(blocks) rows, row after row, of the entries that train: of one block after the other
    its rows of L and then its columns of U, each row after row. int64."""
    import torch

    places = torch.arange(sum(blocks) ** 2).view(sum(blocks), -1)
    found, rank = [], 0
    for size in blocks:
        first, rank = rank, rank + size
        found += [places[first:rank, :rank].flatten(), places[:rank, first:rank].flatten()]
    return torch.cat(found)
