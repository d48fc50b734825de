"""The PEFT tuner, and its registration: import this module to load a saved dEBORA adapter with plain PEFT calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.optim import Optimizer

from harness.method import is_transposed
from methods.debora.tuner.config import PEFT_TYPE, DeboraConfig
from methods.debora.tuner.convolution import DeboraConv2d
from methods.debora.tuner.layer import DeboraLayer, DeboraLinear


class DeboraModel(BaseTuner):
    """A model whose targeted linear layers and convolutions carry an adapter, each at its own rank."""

    prefix = "debora_"
    tuner_layer_cls = DeboraLayer
    target_module_mapping: dict[str, list[str]] = {}  # no default targets for any architecture

    def _create_and_replace(
        self,
        peft_config: DeboraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        rank = peft_config.rank_pattern.get(current_key, peft_config.r)
        try:
            if isinstance(target, DeboraLayer):
                target.update_layer(adapter_name, rank, peft_config)
                return
            adapted = _layer_type(target)(target, adapter_name, rank, peft_config)
        except ValueError as error:
            raise ValueError(f"layer '{current_key}' cannot be adapted: {error}") from error
        if adapter_name not in self.active_adapters:
            adapted.requires_grad_(False)
        self._replace_module(parent, target_name, adapted, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's also copies weight and bias, which the adapted layer does not need and a head without a weight of its
        # own (a pooler) does not have.
        setattr(parent, child_name, new_module)

    def keep_columns(
        self, adapter_name: str, columns: Mapping[str, Tensor], optimizer: Optimizer | None = None
    ) -> None:
        """Cut layers, named as in the base model, down to these components; see `DeboraLayer.keep_columns`.

        The configuration takes the new ranks.
        """
        for name, kept in columns.items():
            layer: Any = self.model.get_submodule(name)
            layer.keep_columns(adapter_name, kept, optimizer)
            self.peft_config[adapter_name].rank_pattern[name] = len(kept)


def _layer_type(target: nn.Module) -> type[DeboraLayer]:
    """The adapted layer's class. Raises ValueError where there is none."""
    if isinstance(target, nn.Linear) or is_transposed(target):
        return DeboraLinear
    if isinstance(target, nn.Conv2d):
        return DeboraConv2d
    raise ValueError(f"it is a {type(target).__name__}, neither linear nor nn.Conv2d")


PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = DeboraConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = DeboraModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = DeboraModel.prefix
