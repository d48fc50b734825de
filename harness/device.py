"""Which device a run is on."""

from __future__ import annotations

import torch

from harness.errors import InputError
from harness.spec import Place


def device_of(place: Place) -> torch.device:
    """The torch device of a place; "auto" is the first GPU, else the CPU. Raises InputError for one not there."""
    if place.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(place.device)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        there = ["auto", "cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise InputError(f"--device '{place.device}' is not on this machine; available: {', '.join(there)}") from None
    return device
