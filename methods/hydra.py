"""Hydra (Kim et al., 2023, arXiv 2309.06922): a low-rank branch on a layer's inputs, and one on its outputs."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from harness.method import Adaptation, Backbone, PeftForm, TrainData, as_matrix, is_transposed
from harness.optimizer import adamw
from methods.shared.lora_method import LoraMethod
from methods.shared.peft_model import lora_form, shared_parameters, unfit

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from harness.spec import TrainSpec

PARALLEL, SEQUENTIAL = "parallel", "sequential"


class Hydra(LoraMethod):
    """Hydra (Kim et al., 2023): a low-rank branch on a layer's inputs, a LoRA, and one on its outputs.

    y = h + s (B_p A_p x + B_s A_s h) with h = W x + b. The parallel branch has A_p (r_p, n) and B_p (m, r_p), the
    sequential one A_s (r_s, m) and B_s (m, r_s); it combines features that the layer has. The update of W is
    s (B_p A_p + B_s A_s W), of rank r_p + r_s at most, and that of b is s B_s A_s b. So an export is a stock LoRA with
    the rows of A_p and of A_s W, and with a bias.
    """

    provenance = "from the authors' code; that every layer is adapted, convolutions too, is ours"
    group = "fixed rank"
    capabilities = ("linear", "conv2d")

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    parallel_rank: int = Field(4, ge=0, description="rank of the branch on a layer's inputs; 0: without it")
    sequential_rank: int = Field(8, ge=0, description="rank of the branch on a layer's outputs; 0: without it, a LoRA")
    scale: float = Field(1.0, gt=0, description="both branches are multiplied by it")
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, description="ends of layer names; all if unset")

    @model_validator(mode="after")
    def _has_a_branch(self) -> Hydra:
        if not self.rank:
            raise ValueError("parallel_rank = 0 and sequential_rank = 0 leave no branch: give one of them from 1 up")
        return self

    @property
    def rank(self) -> int:
        """Of the update, where no branch is deficient."""
        return self.parallel_rank + self.sequential_rank

    def peft_form(self, ranks: Mapping[str, int]) -> PeftForm | None:
        """See `Method.peft_form`: LoRA with these ranks, from its own start."""
        return lora_form(ranks, self.scale, shared_parameters(self))

    def unsupported(self, backbone: Backbone) -> str | None:
        """See `Method.unsupported`."""
        if not backbone.layers:
            return backbone.without_layers()
        targets = backbone.targets(self.target_modules)
        backbone.check_rank(self.rank, targets, "parallel_rank + sequential_rank")
        return unfit(backbone, list(targets))

    def notes(self, backbone: Backbone, train: TrainSpec, num_examples: int) -> list[str]:
        """See `Method.notes`: what a rank of each branch costs, in training and in an export."""
        shapes = [backbone.shape(name) for name in backbone.targets(self.target_modules)]
        parallel = self.parallel_rank * sum(map(sum, shapes))
        sequential = 2 * self.sequential_rank * sum(outputs for outputs, _ in shapes)
        told = f"{parallel:,} parameters of rank {self.parallel_rank} on the inputs of {len(shapes)} layers"
        told += f" and {sequential:,} of rank {self.sequential_rank} on their outputs"
        return [f"{told}; an export is a LoRA of rank {self.rank}"]

    def start(self, backbone: Backbone, train: TrainSpec, data: TrainData, rng: torch.Generator) -> Adaptation:
        """See `Method.start`."""
        backbone.freeze()
        layers = {name: backbone.module.get_submodule(name) for name in backbone.targets(self.target_modules)}
        for name, layer in layers.items():
            layer.add_module("hydra", _branches(layer, backbone.shape(name)[0], self))
            layer.register_forward_hook(functools.partial(_add_branches, self.scale))
        return HydraAdaptation(self, layers, backbone)


class HydraAdaptation(Adaptation):
    """One run. A branch is a submodule of its layer, with the factors A and B.

    cut_to: the rank that `at_rank` has cut every update to, or None.
    """

    def __init__(self, method: Hydra, layers: Mapping[str, Any], backbone: Backbone) -> None:
        super().__init__(backbone.module, adamw(backbone.module, method.learning_rate, method.weight_decay), backbone)
        self.method = method
        self.layers = layers
        self.cut_to: int | None = None

    def ranks(self) -> dict[str, int]:
        """See `Adaptation.ranks`: of both branches together."""
        return dict.fromkeys(self.layers, self.method.rank)

    def stored_bytes(self) -> int:
        """See `Adaptation.stored_bytes`: of an export, where A_s W is as long as A_p, and every layer has a bias if one
        has."""
        pairs, biases = self.scaled_pairs().values(), self.biases()
        export = [factor for pair in pairs for factor in pair] + [B[:, 0] for B, _ in pairs if biases]
        return sum(factor.nbytes for factor in export) + self.head_bytes()

    @contextlib.contextmanager
    def at_rank(self, rank: int) -> Iterator[None]:
        """See `Adaptation.at_rank`: the best approximation of the weight's update, which is its projection onto its
        first left singular vectors. Both B are projected, and with them what is added to the bias."""
        from methods.shared.truncation import swapped

        if rank >= self.method.rank:
            yield
            return
        values: dict[Tensor, Tensor] = {}
        for name, (B, A) in self.scaled_pairs().items():
            for branch in self.layers[name].hydra.values():
                values[branch.B.weight] = _projected(branch.B.weight.detach(), B, A, rank)
        with swapped(values):
            self.cut_to = rank
            try:
                yield
            finally:
                self.cut_to = None

    def export(self, path: Path) -> None:
        """A stock LoRA adapter with the head; `lora_bias` holds what the sequential branch adds to the biases."""
        from methods.shared.stock_lora import write_stock_lora
        from methods.shared.truncation import best_approximation

        pairs = self.scaled_pairs()
        if self.cut_to is not None:  # in as many components as there are
            pairs = {name: best_approximation(B, A, self.cut_to) for name, (B, A) in pairs.items()}
        head = {name: self.model.get_submodule(name) for name in self.head}
        transposed = all(map(is_transposed, self.layers.values()))
        base_model = getattr(self.model, "name_or_path", None)
        write_stock_lora(path, pairs, head, base_model, transposed, self.biases())

    def scaled_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(B, A) of every adapted layer, (outputs, r) and (r, inputs), of a convolution with kernels: B is both B, and
        scaled, A the rows of A_p and of A_s W."""
        import torch

        pairs = {}
        for name, layer in self.layers.items():
            B, A = [], []
            for kind, branch in layer.hydra.items():
                down = branch.A.weight.detach()
                B.append(branch.B.weight.detach())
                A.append(_through_weight(down, layer) if kind == SEQUENTIAL else down)
            pairs[name] = self.method.scale * torch.cat(B, 1), torch.cat(A)
        return pairs

    def biases(self) -> dict[str, Tensor]:
        """What is added to the bias of each layer that has one, (outputs,): s B_s A_s b."""
        found = {}
        for name, layer in self.layers.items():
            if self.method.sequential_rank and layer.bias is not None:
                A, B = (factor.weight.detach().flatten(1) for factor in layer.hydra[SEQUENTIAL])
                found[name] = self.method.scale * (B @ (A @ layer.bias.detach().to(A.dtype)))
        return found


def _branches(layer: Any, outputs: int, method: Hydra) -> nn.ModuleDict:
    """The branches of a layer that have a rank, which add nothing yet: A is drawn as a LoRA's, B is 0. On a convolution
    B and A_s have kernels of 1 x 1.

    In float32 at least, as PEFT keeps adapters."""
    from collections import OrderedDict

    import torch
    from torch import nn

    weight, is_convolution = layer.weight, isinstance(layer, nn.Conv2d)
    like: dict[str, Any] = {
        "device": weight.device,
        "dtype": torch.promote_types(weight.dtype, torch.float32),
        "bias": False,
    }

    def pointwise(inputs: int, outputs: int) -> nn.Module:
        return nn.Conv2d(inputs, outputs, 1, **like) if is_convolution else nn.Linear(inputs, outputs, **like)

    def down(kind: str, rank: int) -> nn.Module:
        if kind == SEQUENTIAL:
            return pointwise(outputs, rank)
        if is_convolution:
            return nn.Conv2d(layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, **like)
        return nn.Linear(as_matrix(layer, weight).shape[1], rank, **like)

    branches = nn.ModuleDict()
    for kind, rank in ((PARALLEL, method.parallel_rank), (SEQUENTIAL, method.sequential_rank)):
        if rank:
            A, B = down(kind, rank), pointwise(rank, outputs)
            nn.init.kaiming_uniform_(A.get_parameter("weight"), a=math.sqrt(5))
            nn.init.zeros_(B.get_parameter("weight"))
            branches[kind] = nn.Sequential(OrderedDict(A=A, B=B))
    return branches


def _add_branches(scale: float, layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Hook of an adapted layer: what it gives is h."""
    changed = output
    for kind, branch in layer.hydra.items():
        taken = output if kind == SEQUENTIAL else args[0]
        changed = changed + branch(taken.to(branch.A.weight.dtype)) * scale
    return changed.to(output.dtype)


def _through_weight(A: Tensor, layer: Any) -> Tensor:
    """A_s W, (r, inputs), of a convolution with the layer's kernels."""
    weight = layer.weight.detach()
    product = A.flatten(1) @ as_matrix(layer, weight).to(A.dtype)
    return product.reshape(-1, *weight.shape[1:]) if weight.dim() > 2 else product


def _projected(own: Tensor, B: Tensor, A: Tensor, rank: int) -> Tensor:
    """A factor, (m, k), its columns projected onto the first `rank` left singular vectors of B A."""
    from torch.nn.functional import normalize

    from methods.shared.canonical import lora_basis

    left = normalize(lora_basis(B, A).factors[0][:, :rank].double(), dim=0)
    return (left @ (left.T @ own.flatten(1).double())).reshape(own.shape).to(own.dtype)
