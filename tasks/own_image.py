"""Images of your own in classes: `--tasks image:photos`, a folder with one folder a class, or a table of them."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field

from harness.errors import InputError
from harness.task import Examples
from tasks import own
from tasks.cache import cached
from tasks.image_folders import class_folders
from tasks.images import ImageClassification
from tasks.text import group_numbers

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

MOST_UNREADABLE = 0.01  # share of the images of a split
LARGEST_FILE = 256 * 2**20  # bytes of an image file


class OwnImages(ImageClassification, own.TableFile):
    """Your own images in classes, called as image:PATH.

    PATH is a folder with one folder of images a class (also below train/ and test/ or validation/, in any case and by
    their usual other names), or a table (CSV, TSV, JSONL, parquet) whose `image` column holds file names, relative to
    the table, or encoded images. Without a test or validation split with labels a fifth of the images is the
    evaluation, each class in its proportion. Images are resized so that the shorter side fits and cropped in the
    middle.

    In a folder every file is an image, also without a suffix, unless its suffix is known for something else; those are
    counted before the runs. Images that cannot be read are left out and named in the record, up to 1 %; so are those
    that are no regular file, or above 256 MiB. Files outside the folder are never read, nor those of the operating
    system.
    """

    version: ClassVar[int] = 2
    default_model: ClassVar[str | None] = "microsoft/resnet-50"
    capabilities: ClassVar[tuple[str, ...]] = ("image", "conv2d", "own data")
    stratified: ClassVar[bool] = True

    path: str = Field("", description="set by the task's name, image:PATH")
    image: str = Field("image", description="column of the images, of a table")
    label: str = Field("label", description="column of the labels, of a table")
    group: str | None = Field(None, description="column whose equal values never go into different splits")
    classes: tuple[str, ...] | None = Field(
        None, description="the classes, in the order of their numbers; null: as in the data"
    )
    metric: str | None = Field(None, description="the score; null: accuracy; also f1, macro_f1, matthews_correlation")

    @classmethod
    def of(cls, values: dict[str, Any], owner: str) -> Self:
        """As `Strict.of`; what is null is looked up in the data. Raises InputError for what is wrong with them."""
        given = super().of(values, owner)
        found = own.described({**given.model_dump(mode="json"), "labels": "classes"}, lambda: given._rows([]))
        return super().of({name: value for name, value in found.items() if name != "labels"}, owner)

    @property
    def headline(self) -> str:
        assert self.metric is not None
        return self.metric

    @property
    def metric_names(self) -> tuple[str, ...]:
        return own.metric_names(self.metric, self.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes or ()

    @property
    def num_labels(self) -> int:
        return len(self.classes or ())

    def load(self, data_root: str | None) -> tuple[Examples, dict[str, Examples]]:
        """As `Task.load`; `data_root` is not used."""
        splits = self._rows([self.image, *([self.group] if self.group else [])])
        labels = own.Labels.of(splits, self.label)
        return own.with_evaluation({name: self._examples(name, rows, labels) for name, rows in splits.items()})

    def _rows(self, columns: list[str]) -> dict[str, own.OwnRows]:
        """The splits with these columns and the labels."""
        splits = class_folders(self.path)
        if not splits:
            return own.read_own(self.path, columns, self, self.label)
        for name in (*columns, self.label):
            if name not in ("image", "label"):
                raise InputError(f"'{self.path}' is a folder of images: it has no column '{name}'", name)
        return splits

    def _examples(self, split: str, rows: own.OwnRows, labels: own.Labels) -> Examples:
        import numpy as np

        base = Path(self.path).expanduser()
        cells = rows.filled(self.image).to_pylist()
        images, readable = decoded(cells, base if base.is_dir() else base.parent, self.image_size)
        names = unreadable([_name(cell, row) for row, cell in enumerate(cells)], readable, f"{rows.source}:", "images")
        groups = group_numbers(rows.texts(self.group)) if self.group else None
        numbers = labels.numbered(split, self.classes or ())
        whole = Examples({"image": images}, numbers, groups, names, rows.notes)
        return whole.select(np.flatnonzero(readable)) if names else whole

    def metrics(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return own.scored(self.metric, self.classes, predictions, references)


def decoded(cells: Sequence[Any], folder: Path, side: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 (cells, side, side, 3), which of the cells could be read); kept on disk by the content of the files.

    A cell is a file name, relative to `folder`, or {"bytes": an encoded image}. Raises InputError for a file outside
    the folder (also by way of a link), or one that is being written to.
    """
    import numpy as np

    root = folder.resolve()
    sums = [hashlib.sha256(_encoded(cell, root) or b"").digest() for cell in cells]

    def decode() -> dict[str, np.ndarray]:
        images = np.zeros((len(cells), side, side, 3), dtype=np.uint8)
        readable = np.zeros(len(cells), dtype=bool)
        for row, cell in enumerate(cells):
            encoded = _encoded(cell, root)
            if hashlib.sha256(encoded or b"").digest() != sums[row]:  # it would be kept under another file's sum
                raise InputError(f"image '{_name(cell, row)}' in '{folder}' changed while it was read: start again")
            image = _square(encoded, side)
            if image is not None:
                images[row], readable[row] = image, True
        return {"images": images, "readable": readable}

    found = cached("own-images", (hashlib.sha256(b"".join(sums)).hexdigest(), side), ("pillow",), decode)
    return found["images"], found["readable"]


def unreadable(
    names: Sequence[str], readable: np.ndarray, source: str, kind: str, mention: str | None = None
) -> tuple[str, ...]:
    """The names that could not be read. Raises InputError, about `kind` of `source`, where they are more than 1 %."""
    lost = tuple(name for name, fine in zip(names, readable, strict=True) if not fine)
    if len(lost) > MOST_UNREADABLE * len(names):
        raise InputError(
            f"{source} {len(lost)} of {len(names)} {kind} cannot be read (at most 1 % may be left out): "
            f"{', '.join(lost[:5])}",
            mention,
        )
    return lost


def _encoded(cell: Any, root: Path) -> bytes | None:
    """The bytes of an image; None where there are none, or too many. `root`: a folder, resolved. Raises InputError for
    a file outside it."""
    own, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (None, cell)
    if own or name is None:
        return own if isinstance(own, bytes) and len(own) <= LARGEST_FILE else None
    try:
        path = (root / str(name)).resolve()
        inside = path.is_relative_to(root)
        # No pipe and no device, which would not come to an end.
        encoded = path.read_bytes() if inside and path.is_file() and path.stat().st_size <= LARGEST_FILE else None
    except (OSError, ValueError, RuntimeError):  # no permission; not a name; links in a circle
        return None
    if not inside:
        raise InputError(f"image '{name}' is not inside '{root}': only files in there are read; copy it", str(name))
    return encoded


def _square(encoded: bytes | None, side: int) -> np.ndarray | None:
    """The image, upright, RGB, its middle cut to a square of `side` pixels; None where it cannot be read."""
    import numpy as np
    from PIL import Image, ImageOps

    if encoded is None:
        return None
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(encoded)) as image:
            upright = _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
        return np.asarray(ImageOps.fit(upright, (side, side), method=Image.Resampling.BILINEAR))
    except MemoryError:  # the machine's fault, not to be kept as the image's
        raise
    except Exception:  # damaged files make Pillow raise anything, too large ones DecompressionBombError
        return None


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image, the upper half of 16 bits where it has them (Pillow would clip). Raises ValueError for other depths,
    whose range is not known."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}")
    return image


def _name(cell: Any, row: int) -> str:
    name = cell.get("path") if isinstance(cell, dict) else cell
    return Path(str(name)).name if name else f"row {row}"
