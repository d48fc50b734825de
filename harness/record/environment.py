"""What a run was made with: versions, commit, device."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import InputError
from harness.parameters import Strict

if TYPE_CHECKING:
    import torch

    from harness.spec import Place

PACKAGES = ("torch", "peft", "transformers", "datasets", "evaluate", "tokenizers", "numpy", "scikit-learn", "scipy")


class Environment(Strict):
    """The manifest kept in each record."""

    harness: str
    commit: str | None  # None outside a git checkout
    dirty: bool | None  # uncommitted changes in the checkout
    python: str
    platform: str
    processor: str
    packages: dict[str, str]
    device: str


def environment(device: str) -> Environment:
    """The manifest of this process, for a run on `device` (a torch device's name)."""
    commit, dirty = _checkout()
    return Environment(
        harness=_version("rank-adaptive-harness") or "not installed",
        commit=commit,
        dirty=dirty,
        python=platform.python_version(),
        platform=platform.platform(),
        processor=_processor(),
        packages={name: version for name in PACKAGES if (version := _version(name))},
        device=_device_name(device),
    )


def device_of(place: Place) -> torch.device:
    """The torch device of a place; "auto" is the first GPU, else the CPU. Raises InputError for one not there."""
    import torch

    if place.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(place.device)
        if device.type not in ("cpu", "cuda", "mps") or (device.type == "cpu" and device.index):
            raise RuntimeError  # torch takes any number for a CPU
        if str(device) != place.device:
            raise RuntimeError  # and of a number, only its last 8 bits
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        there = ["auto", "cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise InputError(f"--device '{place.device}' is not on this machine; available: {', '.join(there)}") from None
    return device


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _checkout() -> tuple[str | None, bool | None]:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None, None
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None, None
    if commit.returncode or status.returncode:
        return None, None
    return commit.stdout.strip(), bool(status.stdout.strip())


@functools.cache
def _processor() -> str:
    cores = os.cpu_count()
    try:
        with open("/proc/cpuinfo") as stream:
            name = next(line.split(":", 1)[1].strip() for line in stream if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {cores} cores"


def _device_name(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        return f"{device}: {torch.cuda.get_device_name(device)}"
    return device
