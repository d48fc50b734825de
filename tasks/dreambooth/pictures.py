"""A folder of pictures as one array."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import InputError
from tasks.image_folders import pictures as pictures_in
from tasks.own_image import decoded, unreadable

if TYPE_CHECKING:
    import numpy as np

FEWEST = 4  # pictures: one is evaluated, one is the holdout, two are trained on


def read_pictures(folder: str, side: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """(the folder's own pictures by name, uint8 (pictures, side, side, 3), names of those that cannot be read).

    A picture is resized to `side` pixels on its shorter side, and the middle square of that. Raises InputError where
    there is no such folder or fewer than 4 pictures in it, more than 1 % of them cannot be read, one is a link out of
    the folder, or two are one and the same (which could be on both sides of a split).
    """
    place = Path(folder).expanduser()
    if not place.is_dir():
        what = "is no folder" if place.exists() else "is not there"
        raise InputError(
            f"'{folder}' {what}: the subject's pictures belong in PATH, those for class_prompt in PATH/class",
            folder,
        )
    names = [path.name for path in pictures_in(place)]
    if len(names) < FEWEST:
        raise InputError(f"folder '{folder}' holds {len(names)} pictures; at least {FEWEST} are needed", folder)
    pictures, readable = decoded(names, place, side)
    left_out = unreadable(names, readable, f"folder '{folder}':", "pictures", mention=folder)
    pictures = pictures[readable]
    seen: dict[bytes, str] = {}
    for name, picture in zip((name for name in names if name not in left_out), pictures, strict=True):
        twin = seen.setdefault(picture.tobytes(), name)
        if twin != name:
            raise InputError(f"folder '{folder}': '{twin}' and '{name}' are the same picture: delete one", folder)
    return pictures, left_out
