"""The start of EVA (Paischer et al., 2024, arXiv 2410.07170), PEFT's: A and ranks of a LoRA from its layers' inputs."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor, nn

from harness.method import Step, TrainData, as_matrix
from harness.passes import evaluation_mode, observe_inputs
from methods.shared.optimizer_state import train_anew
from methods.shared.peft_names import ADAPTER, PREFIX


def eva_directions(step: Step, model: nn.Module, data: TrainData) -> dict[str, Tensor]:
    """A of each layer that EVA has directions for, (rank, inputs), by its name in `model`, a PEFT LoRA model whose
    configuration has `init_lora_weights="eva"`. Layers with equal inputs may share memory.

    Batches are drawn from the stream "all" until every direction that is taken has converged. They are put through the
    model in evaluation mode and in the precision of its weights; padding is left out. The first one only tells which
    layers have equal inputs.

    With micro batches the analysis goes on from one of them to the next.

    Raises RuntimeError where no batch would be left to train with, one has too few rows for PEFT's analysis, or the
    model does not call a layer.
    """
    layers = _layers(model)
    latest: dict[str, Tensor] = {}  # the rows of the layer called last, for which PEFT asks when it returns
    first, begun, called = step.used + 1, set[str](), set[str]()

    def see(name: str, rows: Tensor) -> None:
        latest.clear()
        latest[name] = rows
        called.add(name)

    def forward(model: nn.Module, inputs: Any) -> None:
        if step.used + 1 >= step.budget:
            raise RuntimeError(
                f"EVA's directions have not converged in {step.used} batches, which leaves none to train with: "
                "lower tau, or raise the batch size or the budget"
            )
        observe_inputs(step, model, layers, [data.draw("all")], see)
        if idle := layers.keys() - called:
            name = min(idle).removeprefix(PREFIX)
            raise RuntimeError(f"the model does not call layer '{name}': leave it out of target_modules")

    def rows_of(layer_input: Any, model_input: Any, name: str) -> Tensor:
        rows, most = latest[name], _components(model, name)
        if step.used > first and name not in begun and len(rows) >= most:  # PEFT passes over a batch with fewer
            if len(rows) < 2 * most:
                raise RuntimeError(
                    f"EVA looks for {most} directions in the inputs of layer '{name.removeprefix(PREFIX)}', and PEFT's "
                    f"analysis begins with at least {2 * most} rows; a batch has {len(rows)}: raise the batch size, or "
                    "lower rank or rho"
                )
            begun.add(name)
        return rows

    quiet = contextlib.redirect_stdout(io.StringIO())  # PEFT has a line for each small batch
    with evaluation_mode(model), _without_autocast(model), quiet:
        found: dict[str, Tensor] = get_eva_state_dict(
            model,
            [torch.empty(0)],  # which it goes through again and again: `forward` draws the batches
            forward_fn=forward,
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=rows_of,
            show_progress_bar=False,
        )
    return found


def no_directions(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """As `eva_directions`, of these ranks by the backbone's names, and 0: what a resumed run builds its layers from."""
    return {
        name: torch.zeros(
            ranks.get(name.removeprefix(PREFIX), 0), as_matrix(layer, layer.get_parameter("weight")).shape[1]
        )
        for name, layer in _layers(model).items()
    }


def start_from(
    directions: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, weight_decay: float
) -> None:
    """Give the layers these A and ranks, and the optimizer their new parameters; at rank 0 the base layer is back."""
    initialize_lora_eva_weights(model, eva_state_dict=directions)
    for part in model.modules():
        if isinstance(part, LoraLayer):  # whose new factors have the dtype of the frozen weights
            part.lora_A.to(torch.promote_types(part.get_base_layer().weight.dtype, torch.float32))
            part.lora_B.to(torch.promote_types(part.get_base_layer().weight.dtype, torch.float32))
    train_anew(optimizer, model, weight_decay)


@contextlib.contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Within it the model, and the analysis that hangs on it, leaves an autocast that is around it: torch has no QR
    decomposition in half precision."""
    device = next(model.parameters()).device.type
    handle = model.register_forward_pre_hook(lambda module, args: torch.set_autocast_enabled(device, False))
    try:
        yield
    finally:
        handle.remove()


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The base layers that EVA has directions for, by their names in the PEFT model: PEFT's knows no convolution."""
    adapted = {name: part.get_base_layer() for name, part in model.named_modules() if isinstance(part, LoraLayer)}
    return {name: layer for name, layer in adapted.items() if not isinstance(layer, nn.Conv2d)}


def _components(model: Any, name: str) -> int:
    """The most directions that the layer can get."""
    return round(model.get_submodule(name).r[ADAPTER] * model.peft_config[ADAPTER].eva_config.rho)
