"""Singular values of an exported LoRA adapter, as PEFT keeps it. NumPy alone: the report asks for them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from methods.shared.peft_names import PREFIX


def spectrum(folder: Path) -> dict[str, np.ndarray]:
    """Singular values of scaling x B A by layer, (rank,), from a stock LoRA adapter's folder.

    {} without one, for one in a precision that NumPy does not know, and for one that is damaged.
    """
    from safetensors.numpy import load_file

    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if not (weights.is_file() and settings.is_file()):
        return {}
    try:
        with np.errstate(all="ignore"):
            found = _spectra(load_file(weights), json.loads(settings.read_bytes()))
    except Exception:  # a picture is not worth a report: whatever other content makes the readers and NumPy raise
        return {}
    return found if all(np.isfinite(values).all() for values in found.values()) else {}


def _spectra(tensors: Mapping[str, np.ndarray], config: Mapping[str, object]) -> dict[str, np.ndarray]:
    """As `spectrum`. Raises an error of any kind for what is no stock LoRA adapter."""
    found = {}
    for name, down in tensors.items():
        if ".lora_A." in name:
            up = tensors[name.replace(".lora_A.", ".lora_B.")]
            if not all(matrix.ndim >= 2 and matrix.dtype.kind == "f" for matrix in (up, down)):
                raise TypeError(f"{name} and its counterpart are no matrices of numbers")
            layer = name.split(".lora_A.")[0].removeprefix(PREFIX)
            B, A = up.reshape(up.shape[0], -1), down.reshape(down.shape[0], -1)
            found[layer] = _scaling(layer, len(A), config) * _product_singular_values(B, A)
    return found


def _product_singular_values(B: np.ndarray, A: np.ndarray) -> np.ndarray:
    """Of B A, with B (m, r) and A (r, n), without the product: those of R_B R_A^T of two thin QR factorisations."""
    triangles = [np.asarray(np.linalg.qr(matrix.astype(np.float64), mode="r")) for matrix in (B, A.T)]
    return np.linalg.svd(triangles[0] @ triangles[1].T, compute_uv=False)


def _scaling(layer: str, rank: int, config: Mapping[str, object]) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA; patterns are matched as PEFT does, at the end of the name."""
    alpha = config.get("lora_alpha", rank)
    patterns = config.get("alpha_pattern")
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = value
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or alpha < 0:
        raise ValueError(f"alpha = {alpha!r} of layer {layer} is no scale")
    root = config.get("use_rslora", False)
    if not isinstance(root, bool):
        raise TypeError(f"use_rslora = {root!r} is neither true nor false")
    return float(alpha) / (rank**0.5 if root else rank)
