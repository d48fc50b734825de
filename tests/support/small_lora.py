"""Small LoRAs with random pairs, whose columns have nothing to do with their singular vectors, and slow references."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from harness import registry
from harness.method import Backbone

NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 4)), (7, 9)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 1)), (2, 3, 5, 5)),
}


@dataclass
class FakeStep:
    """An update of a run of ten batches."""

    used: int
    index: int = 0
    budget: int = 10


def adapted(method: str, network: str, settings: dict[str, Any], seed: int = 0) -> Any:
    """A network of two layers in float64, with random pairs of rank 3."""
    torch.manual_seed(seed)
    backbone = Backbone(NETWORKS[network][0]().double(), (), ("0", "2"))
    made = registry.make_method(method, {"rank": 3} | settings)
    adaptation: Any = made.start(backbone, None, None, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    with torch.no_grad():
        for layer in adaptation.layers.values():
            for weight in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                weight.normal_()
    return adaptation


def outputs(adaptation: Any, network: str) -> Tensor:
    """What the model computes of fixed inputs."""
    inputs = torch.randn(*NETWORKS[network][1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        return adaptation.model(inputs)  # type: ignore[no-any-return]


def updates(adaptation: Any) -> dict[str, np.ndarray]:
    """The scaled update of each layer as a matrix (outputs, inputs); of a convolution (outputs, C kH kW)."""
    return {name: (B.flatten(1) @ A.flatten(1)).numpy() for name, (B, A) in adaptation.scaled_pairs().items()}


def singular_values(updates: dict[str, np.ndarray], rank: int = 3) -> dict[str, np.ndarray]:
    """Of whole matrices, the first `rank`."""
    return {name: np.linalg.svd(update, compute_uv=False)[:rank] for name, update in updates.items()}


def truncated(update: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation of this rank."""
    U, S, Vh = np.linalg.svd(update, full_matrices=False)
    return np.asarray((U[:, :rank] * S[:rank]) @ Vh[:rank])


def assert_export_is_stock_lora(started: Any, folder: Path) -> None:
    """What a run exports gives the run's own logits in stock PEFT, and holds its live ranks."""
    started.adaptation.export(folder)
    loaded = PeftModel.from_pretrained(started.before.module, str(folder)).eval()
    batch = started.task.collate(started.training.encoded, range(8), None)
    with torch.no_grad():
        found, wanted = loaded(**batch.inputs).logits, started.adaptation.model.eval()(**batch.inputs).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    spectrum = type(started.method).singular_values(folder)
    live = {name: rank for name, rank in started.adaptation.ranks().items() if rank}
    assert {name: len(values) for name, values in spectrum.items()} == live
