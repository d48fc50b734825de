"""Tokenised texts and decoded images, kept on disk by a fingerprint of what they were made from.

The folder is HARNESS_CACHE, else rank-adaptive-harness in the user's cache folder; HARNESS_CACHE= (empty) keeps
nothing. It can be deleted at any time. A file appears whole, by one rename, so that any number of processes may write
the same entry at once: the content is the same, and the last rename stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

VARIABLE = "HARNESS_CACHE"
FORMAT = 2  # raise it when what is kept, or the code that makes it, changes


def cached(
    kind: str, made_from: tuple[str | int, ...], libraries: tuple[str, ...], make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """What `make` returns, from disk where it was made before.

    `made_from`: fingerprints and settings that decide the content. `libraries`: packages whose version does too.
    A damaged entry is made again; where the folder cannot be written nothing is kept.
    """
    folder = cache_folder()
    if folder is None:
        return make()
    identity = repr((FORMAT, kind, made_from, [version(name) for name in libraries]))
    path = folder / f"{kind}-{hashlib.sha256(identity.encode()).hexdigest()[:32]}.safetensors"
    found = _read(path)
    if found is None:
        found = make()
        _write(path, found)
    return found


def cache_folder() -> Path | None:
    """Where entries are; None where nothing is to be kept."""
    own = os.environ.get(VARIABLE)
    if own is not None:
        return Path(own).expanduser() if own else None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rank-adaptive-harness"


def _read(path: Path) -> dict[str, np.ndarray] | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    draft = path.with_name(f".{path.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    with contextlib.suppress(OSError, SafetensorError):  # no room or no permission: the next run makes it again
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, draft)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
