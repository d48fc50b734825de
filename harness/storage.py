"""Files that are kept: how they are written, and why what is read from one can be believed.

Other processes, other versions and bad disks write to the same folders. So JSON carries its own checksum and the
version of its schema, files beside a record are known to it by their checksums, and a disk that is full is an OSError
whatever library meets it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import torch

UMASK = os.umask(0)
os.umask(UMASK)
FILE_MODE = 0o666 & ~UMASK  # safetensors would let nobody else read its files, on a disk that a group shares
CHECKSUM, VERSION = "checksum", "schema_version"  # keys of kept JSON
# What a disk or a folder does to whoever writes; any other OSError is the writer's own affair.
DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ENOENT,
    errno.ENOTDIR, errno.ESTALE, errno.ENODEV, errno.ENXIO,
}  # fmt: skip


class Unwritable(InputError):
    """A place to keep results cannot be written: no run's own failure, so that it never becomes a record.

    `is_gone`: what was to be written into is not there any more.
    """

    def __init__(self, message: str, is_gone: bool = False) -> None:
        super().__init__(message)
        self.is_gone = is_gone


class Damaged(ValueError):
    """A kept file does not hold what was written into it. The message is one line."""


class Unreadable(InputError):
    """A kept file is there and cannot be read, or is of a newer version: neither absent nor to be written over."""


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object with its checksum."""
    return {**content, CHECKSUM: checksum(content)}


def sealed_text(content: Mapping[str, Any]) -> str:
    """The JSON object with its checksum, as a file holds it."""
    return json.dumps(seal(content), indent=1) + "\n"


def unseal(raw: bytes | str, newest: int, what: str, sealed_from: int = 0) -> dict[str, Any]:
    """The JSON object that `seal` was given, from what a file holds.

    `newest`: the highest schema version that can be read; `what`: what the file is, as a message names it; versions
    before `sealed_from` had no checksum.
    Raises Damaged for anything that is not such an object, and Unreadable for one of a newer version.
    """
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{what} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise Damaged(f"{what} is not a JSON object")
    version = content.get(VERSION)
    if isinstance(version, int) and version > newest:
        raise Unreadable(
            f"{what} has schema version {version}, and this program reads up to {newest}: use a newer one; "
            "it was left as it is"
        )
    if isinstance(version, int) and version < sealed_from:
        return content
    if content.pop(CHECKSUM, None) != checksum(content):
        raise Damaged(f"the checksum of {what} is not that of its content")
    return content


def checksum(content: Any) -> str:
    """SHA-256 of a JSON value, whatever its spacing and the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_sum(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_sums(folder: Path) -> dict[str, str]:
    """`file_sum` of every file below a folder, by its path there with "/". Links are neither followed nor listed."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {path.relative_to(folder).as_posix(): file_sum(path) for path in files}


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """safetensors from torch. Raises OSError, with its number, where the disk is full or cannot be written."""
    from safetensors.torch import save_file

    with os_errors():
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(FILE_MODE)


def save_arrays(arrays: Mapping[str, np.ndarray], path: Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors from NumPy. Raises OSError, with its number, where the disk is full or cannot be written."""
    import numpy as np
    from safetensors.numpy import save_file

    with os_errors():
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, metadata)
    path.chmod(FILE_MODE)


@contextmanager
def os_errors() -> Iterator[None]:
    """safetensors' own error for a full disk becomes the OSError that it stands for."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A draft beside `path`, a file or folder for the caller to write, which takes its place in one rename.

    Where the caller fails, what was there stays and the draft goes.
    """
    draft = path.with_name(f".{os.getpid()}-{os.urandom(4).hex()}-{path.name}")
    try:
        yield draft
        draft.replace(path)
    finally:
        remove(draft)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it, if it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def check_results(results: Path) -> None:
    """Raises InputError where no results folder is or can be."""
    longest = results / "runs" / "0123456789abcdef" / "predictions.safetensors"
    for path in (longest, *longest.parents):
        try:
            if path.is_dir():
                return
            if path.exists() and path != longest:
                raise InputError(f"--results '{results}' cannot be written: '{path}' is not a folder")
        except OSError as error:
            raise InputError(f"--results '{results}' cannot be written: {error.strerror}") from None
