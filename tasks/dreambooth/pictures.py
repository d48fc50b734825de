"""A folder of pictures as one array."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import InputError

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


def read_pictures(folder: str, side: int, data_root: str | None, parameter: str) -> np.ndarray:
    """The folder's pictures by name, uint8 (pictures, side, side, 3): resized to `side` pixels on their shorter side,
    and the middle square of that.

    `folder` is absolute, or relative to the data root, else to the working directory; `parameter` is what errors call
    it. Raises InputError where there is no such folder or no picture in it, a picture does not decode, or two of them
    are one and the same (which could be on both sides of a split).
    """
    import numpy as np

    place = _place(folder, data_root, parameter)
    paths = sorted(path for path in place.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise InputError(f"{parameter} = '{folder}': '{place}' holds no picture ({', '.join(SUFFIXES)})", folder)
    decoded = {path.name: _decoded(path, side) for path in paths}
    broken = [name for name, picture in decoded.items() if picture is None]
    if broken:
        raise InputError(
            f"{parameter} = '{folder}': {len(broken)} of {len(paths)} pictures in '{place}' cannot be decoded, "
            f"first '{broken[0]}': replace or delete them",
            folder,
        )
    names: dict[bytes, str] = {}
    for name, picture in decoded.items():
        assert picture is not None
        twin = names.setdefault(picture.tobytes(), name)
        if twin != name:
            raise InputError(
                f"{parameter} = '{folder}': '{twin}' and '{name}' are the same picture: delete one", folder
            )
    return np.stack([picture for picture in decoded.values() if picture is not None])


def _place(folder: str, data_root: str | None, parameter: str) -> Path:
    tried = [Path(folder).expanduser()]
    if data_root is not None:
        tried.insert(0, Path(data_root).expanduser() / tried[0])  # an absolute path stays as it is
    for place in tried:
        if place.is_dir():
            return place
    places = " or ".join(f"'{place}'" for place in dict.fromkeys(tried))
    raise InputError(
        f"{parameter} = '{folder}': there is no folder {places}; give one with the pictures, relative to --data-root",
        folder,
    )


def _decoded(path: Path, side: int) -> np.ndarray | None:
    """uint8 (side, side, 3); None for a file that is no picture."""
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            return np.asarray(ImageOps.fit(upright, (side, side), Image.Resampling.LANCZOS))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
