"""This process and others: who has left a file, and whether it lives."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import socket
import uuid
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from harness.parameters import Strict

HOST = re.sub(r"[^\w.]", "_", socket.gethostname())
KINDS = ("draft", "old", "stack", "marker", "told", "cells", "owner")  # of what `own_name` names


class Owner(Strict):
    """A process, by what no other process on any machine ever has in common with it."""

    host: str
    boot: str = Field(description="of the machine's last start")
    namespace: str = Field(description="of process numbers: containers have their own")
    process: int = Field(ge=1, lt=2**31)
    started: int = Field(description="when the process began, in the system's own unit")

    @property
    def state(self) -> Literal["alive", "dead", "unknown"]:
        """Whether the process runs still; unknown where this process cannot look it up."""
        me = own()
        if (self.boot, self.namespace) != (me.boot, me.namespace):
            return "unknown"
        return "alive" if is_alive(self.process, self.started) else "dead"

    @property
    def name(self) -> str:
        """The owner as part of a file's name."""
        return "-".join(map(str, (self.host, self.boot, self.namespace, self.process, self.started)))

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


def own() -> Owner:
    """This process."""
    return _owner(os.getpid())  # asked for each time: a process may have been forked


@functools.cache
def _owner(process: int) -> Owner:
    namespace = "0"
    with contextlib.suppress(OSError):  # not Linux
        namespace = re.sub(r"\D", "", str(Path("/proc/self/ns/pid").readlink()))
    return Owner(host=HOST, boot=_boot(), namespace=namespace, process=process, started=_started(process) or 0)


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
    except OSError:
        import psutil

        return f"{HOST}_{psutil.boot_time():.0f}"


def _started(process: int) -> int | None:
    """When a process of this machine began; None where it has ended, or is a zombie."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])  # in ticks since the machine's start
    except OSError:
        import psutil

        try:
            found = psutil.Process(process)
            return None if found.status() == psutil.STATUS_ZOMBIE else int(found.create_time())
        except psutil.NoSuchProcess:
            return None


def is_alive(process: int, started: int) -> bool:
    """Whether the process of this machine that began then runs."""
    found = _started(process)
    if found is not None:
        return found == started
    try:
        os.kill(process, 0)
    except PermissionError:  # another user's, which a careful system hides
        return True
    except OSError:
        return False
    return False  # a zombie


def own_name(subject: str, kind: str) -> str:
    """The name of a file or folder of this process that is of no use without it: what the dead leave is removed."""
    return f"{subject}-{own().name}-{uuid.uuid4().hex[:8]}-{kind}"


def owner_of(name: str) -> Owner | None:
    """The process that gave a file its `own_name`; None for any other name."""
    parts = name.split("-")
    if len(parts) != 8 or parts[-1] not in KINDS:
        return None
    with contextlib.suppress(ValidationError):
        return Owner.model_validate(dict(zip(Owner.model_fields, parts[1:6], strict=True)))
    return None
