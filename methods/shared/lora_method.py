"""What methods have in common whose adapter is exported as a stock LoRA."""

from __future__ import annotations

from abc import ABC
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from harness.method import FLOATS, BackboneDtype, Method

if TYPE_CHECKING:
    import numpy as np


class LoraMethod(Method, ABC):
    """A method whose export is, at least for some of its settings, a LoRA adapter as PEFT keeps it."""

    backbone_dtypes: ClassVar[tuple[BackboneDtype, ...]] = (
        FLOATS  # one that reads no weight's numbers takes them packed
    )

    @classmethod
    def singular_values(cls, folder: Path) -> dict[str, np.ndarray]:
        """See `Method.singular_values`."""
        from methods.shared.spectrum import spectrum

        return spectrum(folder)
