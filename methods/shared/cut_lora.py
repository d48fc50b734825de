"""A LoRA whose layers lose components for good, down to none: for every method that cuts one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.method import Backbone, Method
from methods.shared.lora_adaptation import LoraAdaptation
from methods.shared.peft_names import ADAPTER

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from methods.shared.canonical import Basis


class CutLoraAdaptation(LoraAdaptation):
    """A PEFT LoRA model that is cut while it trains, or afterwards.

    Parameters keep their place in the optimizer at fewer columns, with what it holds of them, and the scale of the
    updates stays. A layer without components is left to its base layer.
    """

    written_by_peft = False

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        backbone: Backbone,
        targets: tuple[str, ...],
    ) -> None:
        super().__init__(model, optimizer, backbone, targets)
        self.method = method

    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(B, A) of every layer of `targets`, all of which have an adapter."""
        layers = [self.layers[name] for name in self.targets]
        return [(layer.lora_B[ADAPTER].weight, layer.lora_A[ADAPTER].weight) for layer in layers]

    def rotate(self) -> list[Basis]:
        """Bring every layer to the SVD of its update; see `methods.shared.canonical.rotate_lora`."""
        from methods.shared.canonical import rotate_lora

        return [rotate_lora(B, A, self.optimizer) for B, A in self.pairs()]

    def keep(self, places: Sequence[Sequence[int]]) -> None:
        """Remove all components but those at these places of each layer of `targets`, in their order."""
        import torch

        from methods.shared.optimizer_state import keep

        for (B, A), own in zip(self.pairs(), places, strict=True):
            if len(own) < len(A):
                kept = torch.tensor(own, dtype=torch.int64, device=A.device)
                keep(A, kept, 0, self.optimizer)
                keep(B, kept, 1, self.optimizer)
        self._leave_empty_layers()

    def state_dict(self) -> dict[str, Any]:
        """See `Adaptation.state_dict`."""
        from methods.shared.optimizer_state import shapes

        return super().state_dict() | {"shapes": shapes(self.optimizer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Adaptation.load_state_dict`. The layers are cut down to the saved ranks first."""
        from methods.shared.optimizer_state import match_shapes

        match_shapes(self.optimizer, state["shapes"])
        self._leave_empty_layers()
        super().load_state_dict(state)

    def _leave_empty_layers(self) -> None:
        for layer in self.layers.values():
            if len(layer.lora_A[ADAPTER].weight) == 0:
                layer.enable_adapters(False)


def among_largest(values: Sequence[Tensor], number: int) -> list[int]:
    """How many of each layer's values, which descend, are among the `number` largest of all; of equals the first."""
    import torch

    order = torch.cat([*values]).argsort(descending=True, stable=True)[:number].cpu()
    layers = torch.arange(len(values)).repeat_interleave(torch.tensor([len(own) for own in values]))
    return torch.bincount(layers[order], minlength=len(values)).tolist()


def along(weights: Tensor, factor: Tensor, dim: int) -> Tensor:
    """One weight for each component in the shape that multiplies a factor along its dimension `dim`."""
    shape = [1] * factor.dim()
    shape[dim] = len(weights)
    return weights.view(shape)


def weighted(factor: nn.Module, output: Tensor, weights: Tensor) -> Tensor:
    """What A, the factor, computes, times one weight for each component."""
    places = (1,) * (factor.get_parameter("weight").dim() - 2)  # of a convolution: the output's last dimensions
    return (output * weights.view(-1, *places)).to(output.dtype)
