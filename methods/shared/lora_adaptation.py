"""One run of LoRA, at any ranks: PEFT's model in training, for every method that trains one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from harness.method import Adaptation, Backbone
from harness.storage import os_errors
from methods.shared.peft_names import ADAPTER, PREFIX

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class LoraAdaptation(Adaptation):
    """A PEFT LoRA model in training.

    targets: the layers that `ranks` tells of; of those without an adapter the rank is 0.
    changes_backbone: the init took (alpha / rank) B A out of the frozen weights.
    written_by_peft: PEFT can write the adapter, as its configuration has the ranks and scales of all layers.
    """

    written_by_peft: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        backbone: Backbone,
        targets: tuple[str, ...] = (),
        changes_backbone: bool = False,
    ) -> None:
        from peft.tuners.lora import LoraLayer

        super().__init__(model, optimizer, backbone)
        self.targets = targets
        self.layers: dict[str, Any] = {
            name.removeprefix(PREFIX): layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)
        }
        # What the init took out of the layers' weights, as `scaled_pairs` gives it.
        pairs = self.scaled_pairs() if changes_backbone else {}
        self.taken = {name: (B, A.clone()) for name, (B, A) in pairs.items()}

    def ranks(self) -> dict[str, int]:
        """See `Adaptation.ranks`."""
        live = {name: layer.lora_A[ADAPTER].weight.shape[0] for name, layer in self.layers.items()}
        return {name: live.get(name, 0) for name in self.targets or live}

    def at_rank(self, rank: int) -> AbstractContextManager[None] | None:
        """See `Adaptation.at_rank`: the best approximation of B A; None where that is not the update (DoRA; inits that
        take a part out of the frozen weights)."""
        if self.taken or any(layer.use_dora[ADAPTER] for layer in self.layers.values()):
            return None
        from methods.shared.truncation import best_approximation, swapped

        pairs = [(layer.lora_B[ADAPTER].weight, layer.lora_A[ADAPTER].weight) for layer in self.layers.values()]
        cut = {pair: best_approximation(*pair, rank) for pair in pairs}
        return swapped({own: value for pair in cut for own, value in zip(pair, cut[pair], strict=True)})

    def stored_bytes(self) -> int:
        """See `Adaptation.stored_bytes`; what was taken out of the frozen weights is stored as well."""
        taken = sum(factor.numel() * factor.element_size() for pair in self.taken.values() for factor in pair)
        return super().stored_bytes() + taken

    def state_dict(self) -> dict[str, Any]:
        """See `Adaptation.state_dict`. Frozen weights that the init changed are in it: an SVD need not give the same
        on another machine."""
        changed = {name: self.layers[name].get_base_layer().weight.detach() for name in self.taken}
        return super().state_dict() | {"changed": changed, "taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Adaptation.load_state_dict`."""
        super().load_state_dict(state)
        for name, pair in self.taken.items():
            self.layers[name].get_base_layer().weight.data.copy_(state["changed"][name])
            for own, value in zip(pair, state["taken"][name], strict=True):
                own.copy_(value)

    def export(self, path: Path) -> None:
        """A stock LoRA adapter with the head, as `PeftModel.from_pretrained` reads it, for the backbone as it was, at
        the ranks that it has now, within `at_rank` too."""
        import torch

        from methods.shared.stock_lora import export_stock_lora, is_cut

        pairs = self.scaled_pairs()
        if self.written_by_peft and not self.taken and not any(is_cut(*pair).any() for pair in pairs.values()):
            model: Any = self.model
            with os_errors():
                model.save_pretrained(str(path))
            return
        for name, (taken_B, taken_A) in self.taken.items():
            B, A = pairs[name]
            pairs[name] = torch.cat([B, -taken_B], 1), torch.cat([A, taken_A], 0)
        export_stock_lora(path, pairs, self.model, self.head)

    def scaled_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(B, A) of every adapted layer, (outputs, r) and (r, inputs), of a convolution with kernels; B is scaled."""
        pairs = {}
        for name, layer in self.layers.items():
            A, B = layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach()
            pairs[name] = layer.scaling[ADAPTER] * B, A
        return pairs
