"""What the report is told of installed packages: it knows no method and no package by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from harness.report.pictures.picture import Picture, SingularValues, no_lora, no_singular_values
from harness.report.tables.rank_curves import IsLora
from harness.trace import Trace


@dataclass(frozen=True)
class Known:
    """Nothing, unless a caller says more.

    traces: by method, the values of the history that it declares (of a method without an entry, an uninstalled plugin,
    every number in its histories is drawn under its own name). singular_values: reads a kept adapter. is_lora: see
    `PictureData`. pictures: of packages, beside the report's own. provenance: by method, where it comes from.
    """

    traces: Mapping[str, tuple[Trace, ...]] = field(default_factory=dict)
    singular_values: SingularValues = no_singular_values
    is_lora: IsLora = no_lora
    pictures: tuple[Picture, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)
