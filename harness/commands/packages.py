"""What installed packages add to the report, for the report, which knows none of them."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from harness import installed, registry
from harness.record.record import RunRecord
from harness.report.board.added_columns import with_added
from harness.report.board.columns import TableColumn
from harness.report.known import Known
from harness.report.pictures.every import PICTURES
from harness.report.pictures.picture import Picture


def known_of(records: Iterable[RunRecord]) -> Known:
    """What is known of the methods of these records, and the pictures of packages; a line on stderr for each that
    cannot be used."""
    pictures, told = added_pictures()
    for line in told:
        print(line, file=sys.stderr)
    methods = {record.spec.method for record in records}
    traces, provenance = installed.traces_of(methods), installed.provenance_of(methods)
    return Known(traces, installed.singular_values, is_lora, tuple(pictures), provenance)


def is_lora(record: RunRecord) -> bool:
    """Whether a run is the training of a LoRA at its ranks."""
    return installed.is_lora(record.spec.method, record.spec.method_parameters, record.ranks)


def columns() -> tuple[TableColumn, ...]:
    """The columns beside the scores, with those of packages; a line on stderr for each that cannot be used."""
    added, told = registry.extensions(registry.COLUMNS)
    found, refused = with_added(added)
    for line in (*told, *refused):
        print(line, file=sys.stderr)
    return found


def added_pictures() -> tuple[list[Picture], list[str]]:
    """The pictures of packages, and a line for each that is none or has the name of another."""
    found, told = registry.extensions(registry.PICTURES)
    pictures: list[Picture] = []
    for name, picture in found.items():
        if not isinstance(picture, Picture):
            told.append(f"picture '{name}' is {picture!r}, which is not a harness.report.pictures.picture.Picture")
        elif any(picture.name == other.name for other in (*PICTURES, *pictures)):
            told.append(f"picture '{name}' is called '{picture.name}', and another is already: give it another name")
        else:
            pictures.append(picture)
    return pictures, told
