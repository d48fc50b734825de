"""What a run takes from the runs that it waited for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from harness.backbone_dtype import unfit
from harness.errors import InputError
from harness.method import Backbone, Finished, Method
from harness.record.record import RETRIED, RunRecord, Status
from harness.record.store import RecordStore
from harness.spec import RunSpec

Parents = Mapping[str, RunRecord]  # by the method's parameter that names their configuration


class Lacking(NamedTuple):
    """Why a run cannot be made, and the status of its record."""

    status: Status
    error: str


def parents_of(spec: RunSpec, store: RecordStore) -> Parents:
    """The records of the runs that this one waited for. Raises InputError where one is not there."""
    return {parameter: store.find(run_id) for parameter, run_id in spec.parents.items()}


def lacking(spec: RunSpec, parents: Parents) -> Lacking | None:
    """The first parent that has no result, if any: where it may be made again, so may this run."""
    for parameter, parent in parents.items():
        if parent.status != "done":
            label, status = spec.method_parameters[parameter], parent.status.replace("_", " ")
            error = f"it waited for {label}, whose run {parent.run_id} is {status}: {parent.error}"
            return Lacking("failed" if parent.status in RETRIED else "unsupported", error)
    return None


def inherited(method: Method, backbone: Backbone, parents: Parents) -> tuple[Method, str | None]:
    """The method with what it takes from its parents, and why it cannot work with that, or None.

    Raises InputError where a method without parents does not fit.
    """
    found = {parameter: Finished(record.ranks, record.parameters) for parameter, record in parents.items()}
    try:
        method = method.inherit(backbone, found)
        return method, unfit(method, backbone)
    except InputError as error:
        if not parents:
            raise
        return method, str(error)
