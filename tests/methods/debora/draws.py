"""Random float64 numbers for the tests of the mathematics."""

from __future__ import annotations

import torch


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Standard normal, float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
