"""Tokenised texts and decoded images, kept on disk by a fingerprint of what they were made from.

The folder is HARNESS_CACHE, else rank-adaptive-harness in the user's cache folder; HARNESS_CACHE= (empty) keeps
nothing. It can be deleted at any time. A file appears whole, by one rename, so that any number of processes may write
the same entry at once: the content is the same, and the last rename stays. An entry says what it was made from and
carries a checksum; one that does not hold to both is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from harness.storage import replaced, save_arrays

if TYPE_CHECKING:
    import numpy as np

VARIABLE = "HARNESS_CACHE"
FORMAT = 6  # raise it when what is kept, or the code that makes it, changes
IDENTITY, CHECKSUM = "made_from", "sha256"  # of an entry's metadata


def cached(
    kind: str, made_from: tuple[str | int, ...], libraries: tuple[str, ...], make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """What `make` returns, from disk where it was made before.

    `made_from`: fingerprints and settings that decide the content. `libraries`: packages whose version does too.
    An entry that is damaged, another's or no file is made again; where it cannot be written nothing is kept.
    """
    folder = cache_folder()
    if folder is None:
        return make()
    identity = repr((FORMAT, kind, made_from, [version(name) for name in libraries]))
    path = folder / f"{kind}-{hashlib.sha256(identity.encode()).hexdigest()[:32]}.safetensors"
    found = _read(path, identity)
    if found is None:
        found = make()
        with contextlib.suppress(OSError):  # no room, no permission, a folder of that name: the next run makes it again
            folder.mkdir(parents=True, exist_ok=True)
            with replaced(path) as draft:
                save_arrays(found, draft, {IDENTITY: identity, CHECKSUM: content_sum(found)})
    return found


def cache_folder() -> Path | None:
    """Where entries are; None where nothing is to be kept, or the user has no folder of their own."""
    own = os.environ.get(VARIABLE)
    if own == "":
        return None
    with contextlib.suppress(RuntimeError):  # no such user, or one without a home
        if own is not None:
            return Path(own).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rank-adaptive-harness"
    return None


def content_sum(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 over names, types, shapes and numbers."""
    import numpy as np

    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        whole = np.ascontiguousarray(array)
        digest.update(repr((name, whole.dtype.str, whole.shape)).encode())
        digest.update(whole.data)
    return digest.hexdigest()


def _read(path: Path, identity: str) -> dict[str, np.ndarray] | None:
    """The arrays of the entry; None where there is none to be believed."""
    from safetensors import safe_open

    try:
        if not stat.S_ISREG(path.lstat().st_mode):  # opening a pipe would wait for its other end
            return None
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get(IDENTITY) != identity:
                return None
            arrays = {name: file.get_tensor(name) for name in set(file.keys())}
    except Exception:  # whatever a file of other content makes its reader raise
        return None
    return arrays if metadata.get(CHECKSUM) == content_sum(arrays) else None
