"""SALT (Elsayed et al., 2025, arXiv 2503.16055): a weight's largest singular values scaled and shifted, X Y below."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field, model_validator

from harness.errors import InputError
from harness.method import Adaptation, Backbone, TrainData, in_modules, is_transposed
from harness.optimizer import adamw
from methods.shared.lora_method import LoraMethod
from methods.shared.peft_model import unfit
from methods.shared.placement import check_spread, spread
from methods.shared.spectral import SpectralAdaptation, add_bases

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from harness.spec import TrainSpec

RANK = 8  # ours, as LoRA's


class Parts(NamedTuple):
    """Of a layer: the singular values that are scaled and shifted, the rank of the tail's X Y, and its smaller side."""

    head: int
    tail: int
    side: int


class Salt(LoraMethod):
    """SALT (Elsayed et al., 2025): scale and shift of each weight's largest singular values, X Y on all others.

    With W = U diag(sigma) V^T a layer's weight becomes U S V^T, and S has two blocks: the `head` largest singular
    values become scale * sigma + shift, and those of the tail diag(sigma) + X Y. Scale is 1, shift and Y are 0 at the
    start: 2 head + 2 (smaller side - head) rank parameters a layer. The update has at most the rank head + rank, and is
    exported as a stock LoRA.

    relu = true, as in the authors' code, sets the negative entries of S to 0. The update then has no low rank, and
    stock PEFT cannot hold it: an export has updates of whole weights, which `methods.shared.weight_updates.load` reads.
    """

    loaders = {"weight_updates.json": "methods.shared.weight_updates.load"}
    provenance = "from the authors' code; without its ReLU unless relu = true, and the update beside the weight"
    group = "fixed rank"
    capabilities = ("linear", "conv2d")

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    head: float = Field(
        0.1,
        ge=0,
        description="singular values of each layer that are scaled and shifted: below 1 a share of its smaller side, "
        "rounded down, from 1 on that many",
    )
    rank: int | None = Field(
        None, ge=0, description=f"rank of the update of the other ones; {RANK} unless components is given"
    )
    components: int | None = Field(
        None, ge=1, description="head and rank of all layers together, spread evenly; or give rank"
    )
    relu: bool = Field(
        False, description="as in the authors' code: no negative entries between the singular vectors; no low rank"
    )
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, description="ends of layer names; all if unset")

    @model_validator(mode="after")
    def _fits_together(self) -> Salt:
        if self.head >= 1 and self.head != int(self.head):
            raise ValueError(f"head = {self.head:g} should be a share below 1, or a whole number")
        if self.rank is not None and self.components is not None:
            raise ValueError(f"rank = {self.rank} and components = {self.components} are both set; give one of them")
        if self.head == 0 and self.rank == 0:
            raise ValueError("head = 0 and rank = 0: nothing trains")
        return self

    def parts(self, backbone: Backbone) -> dict[str, Parts]:
        """How each layer is divided. Raises InputError for what does not fit into one."""
        targets = backbone.targets(self.target_modules)
        sides = {name: min(backbone.shape(name)) for name in targets}
        heads = {name: int(self.head if self.head >= 1 else self.head * side) for name, side in sides.items()}
        if self.components is None:
            tails = dict.fromkeys(targets, RANK if self.rank is None else self.rank)
        else:
            check_spread(self.components, 0, backbone, targets)
            tails = {name: all_of_it - heads[name] for name, all_of_it in spread(self.components, 0, targets).items()}
        parts = {name: Parts(heads[name], tails[name], side) for name, side in sides.items()}
        for name, own in parts.items():
            self._check(name, own, heads)
        return parts

    def _check(self, name: str, own: Parts, heads: Mapping[str, int]) -> None:
        """Raises InputError where a layer cannot be divided so. heads: of all layers."""
        head = f"head = {self.head:g} takes {own.head} of the {own.side} singular values of layer '{name}'"
        if own.head > own.side:
            raise InputError(f"head = {self.head:g} is above the {own.side} singular values of layer '{name}'", "head")
        if own.tail < 0:
            given = f"components = {self.components} gives it {own.head + own.tail}"
            least = len(heads) * max(heads.values())
            raise InputError(f"{head}, and {given}: {least} components do, or a smaller head", "components")
        if own.head + own.tail > own.side:
            raise InputError(f"{head}: rank = {own.tail} is above the {own.side - own.head} that it leaves", "rank")
        if own.head + own.tail == 0:
            raise InputError(f"{head}, and rank = 0: nothing of it trains", "head")

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        if not backbone.layers:
            return backbone.without_layers()
        return unfit(backbone, list(self.parts(backbone)))

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`: what trains in how many layers, and that relu's export is no LoRA."""
        parts = self.parts(backbone).values()
        heads, tails = (sum(numbers) for numbers in list(zip(*parts, strict=True))[:2])
        told = f"{heads} singular values are scaled and shifted, and {tails} components train between the others, "
        kept = ["relu = true: the updates have no low rank, and an export holds them whole"] if self.relu else []
        return [f"{told}in {len(parts)} layers", *kept]

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`. X is drawn as in the code: Kaiming uniform with a = sqrt(20), of r inputs."""
        import torch
        from torch import nn

        parts = self.parts(backbone)
        bases = add_bases(backbone, list(parts))
        for name, basis in bases.items():
            head, tail, side = parts[name]
            X = torch.empty(side - head, tail)
            if X.numel():
                nn.init.kaiming_uniform_(X, a=20**0.5, generator=rng)
            values = {
                "scale": torch.ones(head),
                "shift": torch.zeros(head),
                "X": X,
                "Y": torch.zeros(tail, side - head),
            }
            for part, value in values.items():
                basis.register_parameter(part, nn.Parameter(value.to(basis.sigma)))
        optimizer = adamw(backbone.module, self.learning_rate, self.weight_decay)
        return SaltAdaptation(self, optimizer, backbone, bases)


class SaltAdaptation(SpectralAdaptation):
    """One run. Of a layer train scale and shift, (head,), X (d - head, tail) and Y (tail, d - head), with its smaller
    side d; some of them may be empty."""

    method: Salt

    def pair(self, basis: Any) -> tuple[Tensor, Tensor]:
        """See `SpectralAdaptation.pair`: of rank head + tail, or, with relu, of the smaller side."""
        import torch

        if self.method.relu:
            return basis.U @ change_with_relu(basis), basis.Vh
        head = len(basis.scale)
        B = torch.cat([basis.U[:, :head] * change_of_head(basis), basis.U[:, head:] @ basis.X], 1)
        return B, torch.cat([basis.Vh[:head], basis.Y @ basis.Vh[head:]])

    def ranks(self) -> dict[str, int]:
        """See `Adaptation.ranks`: head + tail; none with relu."""
        return {} if self.method.relu else {name: len(b.scale) + len(b.Y) for name, b in self.bases.items()}

    def stored_bytes(self) -> int:
        """See `Adaptation.stored_bytes`: of an export, which has whole updates with relu."""
        if not self.method.relu:
            return super().stored_bytes()
        whole = sum(len(b.U) * b.Vh.shape[1] * b.U.element_size() for b in self.bases.values())
        return whole + self.head_bytes()

    def at_rank(self, rank: int) -> AbstractContextManager[None] | None:
        """See `Adaptation.at_rank`: the best approximation of the update, whose singular values are the changes of the
        head's and those of X Y, since their singular vectors are orthogonal; None with relu."""
        from methods.shared.truncation import swapped

        if self.method.relu:
            return None
        return swapped({own: value for basis in self.bases.values() for own, value in cut(basis, rank).items()})

    def export(self, path: Path) -> None:
        """See `SpectralAdaptation.export`; with relu updates of whole weights, which stock PEFT does not hold."""
        from methods.shared import weight_updates

        if not self.method.relu:
            return super().export(path)
        updates = {}
        for name, layer in self.layers.items():
            B, A = self.pair(self.bases[name])
            weight = layer.get_parameter("weight")
            update = (B @ A).detach()
            updates[f"{name}.weight"] = update.T if is_transposed(layer) else update.view_as(weight)
        head = [(name, p) for name, p in self.model.named_parameters() if in_modules(name, self.head)]
        weight_updates.save(path, updates, {name: p.detach() for name, p in head if p.requires_grad})


def change_of_head(basis: Any) -> Tensor:
    """scale * sigma + shift - sigma of the largest singular values, (head,): 0 at the start, without rounding."""
    change: Tensor = (basis.scale - 1) * basis.sigma[: len(basis.scale)] + basis.shift
    return change


def change_with_relu(basis: Any) -> Tensor:
    """relu(S) - diag(sigma), (d, d), with S of two blocks as in the class `Salt`."""
    import torch

    head, tail = basis.sigma.tensor_split([len(basis.scale)])
    top = (basis.scale * head + basis.shift).relu() - head
    below = (torch.diag(tail) + basis.X @ basis.Y).relu() - torch.diag(tail)
    return torch.block_diag(torch.diag(top), below)


def cut(basis: Any, rank: int) -> dict[Tensor, Tensor]:
    """What trains in a layer, each with its value where the update is cut to this rank."""
    import torch

    from methods.shared.canonical import lora_basis
    from methods.shared.truncation import best_approximation, largest

    scale, shift = basis.scale.detach(), basis.shift.detach()
    change = change_of_head(basis).detach().double()
    below = lora_basis(basis.X, basis.Y).sizes if basis.X.numel() else change[:0]
    stays = largest(torch.cat([change, below]), rank) != 0
    top, number = stays[: len(change)], int(stays[len(change) :].sum())
    found = {basis.scale: torch.where(top, scale, 1.0), basis.shift: torch.where(top, shift, 0.0)}
    if basis.X.numel():
        found |= zip((basis.X, basis.Y), best_approximation(basis.X, basis.Y, number), strict=True)
    return found
