"""`--to`: a file or folder that a command makes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import storage
from harness.errors import InputError


def check_new(to: Path, replaces: bool = False) -> None:
    """Raises InputError where `to` has no name, is there already (a link too) or cannot be made. A plain file may be
    there where the command `replaces` it."""
    if to.name in ("", ".."):
        raise InputError(f"--to '{to}' is no name of its own: name a file or folder to make")
    try:
        if os.path.lexists(to) and not (replaces and to.is_file() and not to.is_symlink()):
            raise InputError(f"--to '{to}' is there already: name one that is not")
        above = next(parent for parent in to.absolute().parents if os.path.lexists(parent))
        if not above.is_dir():
            raise InputError(f"--to '{to}' cannot be made: '{above}' is not a folder")
        os.lstat(above / to.name)  # too long a name is told before anything is made
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _unwritable(to, error) from None


@contextmanager
def made(to: Path, replaces: bool = False) -> Iterator[Path]:
    """A draft for the caller to write, which becomes `to` when it is whole; see `check_new`. Raises InputError where it
    cannot be written."""
    check_new(to, replaces)
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with storage.os_errors(), storage.replaced(to) as draft:
            yield draft
    except OSError as error:
        raise _unwritable(to, error) from None


def _unwritable(to: Path, error: OSError) -> InputError:
    return InputError(f"--to '{to}' cannot be written ({error.strerror or error})")
