"""Splits of a Hub dataset: from a folder in the Hub's own layout (the data root), else from the Hub.

A data root holds `<owner>/<dataset>/<config>/<split>-*.parquet`, as `hf download --repo-type dataset --local-dir
DIR/owner/dataset owner/dataset` leaves it. The parquet files are read as they are: no README.md is needed, and no
copy is written to a cache.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import InputError
from tasks.cache import cached

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

HUB_SECONDS = 5.0  # how long the Hub may take to answer before it counts as out of reach


@dataclass(frozen=True)
class Rows:
    """The columns of one split that a task asked for. `source` is what errors call the split."""

    table: pa.Table
    source: str

    def texts(self, column: str) -> list[str]:
        """A column of strings. Raises InputError for another type or an empty cell."""
        import pyarrow as pa

        kind = self.table.schema.field(column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise InputError(f"{self.source}: column '{column}' holds {kind}; it should hold text")
        return self.filled(column).to_pylist()

    def classes(self, column: str, names: Sequence[str]) -> np.ndarray:
        """A column of class numbers, int64, 0 to len(names) - 1. Raises InputError for any other value."""
        import numpy as np
        import pyarrow as pa

        allowed = ", ".join(f"{number} ({name})" for number, name in enumerate(names))
        kind = self.table.schema.field(column).type
        if not pa.types.is_integer(kind):
            raise InputError(f"{self.source}: column '{column}' holds {kind}; it should hold integers: {allowed}")
        labels = self.filled(column).to_numpy().astype(np.int64)
        self._check(column, labels, (labels < 0) | (labels >= len(names)), allowed)
        return labels

    def values(self, column: str, low: float, high: float) -> np.ndarray:
        """A column of numbers, float64, within [low, high]. Raises InputError for any other value."""
        import numpy as np
        import pyarrow as pa

        allowed = f"{low:g} to {high:g}"
        kind = self.table.schema.field(column).type
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
            raise InputError(f"{self.source}: column '{column}' holds {kind}; it should hold numbers: {allowed}")
        values = self.filled(column).to_numpy().astype(np.float64)
        self._check(column, values, ~((values >= low) & (values <= high)), allowed)
        return values

    def images(self, column: str, size: int) -> np.ndarray:
        """A column of encoded RGB images (struct with `bytes`), uint8, (rows, size, size, 3).

        Raises InputError for a cell that is no image of that size.
        """
        import numpy as np

        found = (cell.get("bytes") if isinstance(cell, dict) else None for cell in self.filled(column).to_pylist())
        cells = [encoded if isinstance(encoded, bytes) else None for encoded in found]

        def decode() -> dict[str, np.ndarray]:
            images = np.empty((len(cells), size, size, 3), dtype=np.uint8)
            for row, encoded in enumerate(cells):
                images[row] = self._decoded(encoded, size, f"row {row} of column '{column}'")
            return {"images": images}

        digest = hashlib.sha256()
        for encoded in cells:
            digest.update(hashlib.sha256(encoded or b"").digest())
        return cached("images", (digest.hexdigest(), size), ("pillow",), decode)["images"]

    def _decoded(self, encoded: bytes | None, size: int, where: str) -> np.ndarray:
        import io

        import numpy as np
        from PIL import Image

        if not encoded:
            raise InputError(f"{self.source}: {where} holds no image bytes")
        try:
            with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(encoded)) as image:
                width, height = image.size
                pixels = np.asarray(image.convert("RGB")) if (width, height) == (size, size) else None
        except Exception as error:  # damaged images make Pillow raise anything, too large ones DecompressionBombError
            raise InputError(f"{self.source}: {where} is not a readable image ({error})") from None
        if pixels is None:
            raise InputError(f"{self.source}: {where} is {width}x{height}; it should be {size}x{size}")
        return pixels

    def filled(self, column: str) -> pa.ChunkedArray:
        cells = self.table.column(column)
        self.check_filled(column, cells.null_count)
        return cells

    def check_filled(self, column: str, empty: int, kind: str = "empty") -> None:
        """Raises InputError where there are empty cells."""
        if empty:
            raise InputError(f"{self.source}: column '{column}' has {empty} {kind} cells; it may have none")

    def _check(self, column: str, values: np.ndarray, wrong: np.ndarray, allowed: str) -> None:
        if wrong.any():
            raise InputError(
                f"{self.source}: column '{column}' holds {values[wrong][0]:g} ({int(wrong.sum())} rows outside the "
                f"allowed range); allowed is {allowed}"
            )


def read_split(dataset: str, config: str, split: str, columns: Sequence[str], data_root: str | None) -> Rows:
    """Read `columns` of a split of `dataset` ("owner/name"), from `data_root` if it holds the dataset's
    configuration, else from the Hub.

    Raises InputError where the data root is no folder, neither place has the data, files are missing or damaged, or
    a column is not there.
    """
    folder = None if data_root is None else checked_root(data_root) / dataset
    files = [] if folder is None else _split_files(folder, config, split)
    if not files:
        return _from_hub(dataset, config, split, columns, data_root)
    source = f"{dataset} {config} {split} in '{files[0].parent}'"
    return Rows(read_parquet(files, columns, source), source)


def first_split(dataset: str, config: str, names: Iterable[str], data_root: str | None) -> str | None:
    """The first of these splits that the dataset has, in the data root if it holds the training split, else on the Hub;
    None where it has none of them. Raises InputError where the Hub cannot be asked."""
    folder = None if data_root is None else checked_root(data_root) / dataset
    if folder is not None and _found_files(folder, config, "train"):
        return next((name for name in names if _found_files(folder, config, name)), None)
    import datasets

    _check_reachable(dataset, config, data_root)
    try:
        present = datasets.get_dataset_split_names(dataset, config)
    except (OSError, ValueError) as error:
        raise _unreachable(dataset, config, data_root, error) from None
    except Exception as error:
        raise _unreadable(dataset, error) from None
    return next((name for name in names if name in present), None)


def checked_root(data_root: str) -> Path:
    """The data root as a path. Raises InputError where it is no folder."""
    folder = Path(data_root).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"data root '{data_root}' is not a folder; --data-root needs one in the Hub's layout", data_root
        )
    return folder


def _split_files(folder: Path, config: str, split: str) -> list[Path]:
    """The split's parquet files in shard order; none where the folder does not hold the configuration."""
    files = _found_files(folder, config, split)
    if files:
        check_shards(files)
        return files
    if (folder / config).is_dir():
        present = ", ".join(sorted(path.name for path in (folder / config).iterdir())) or "nothing"
        raise InputError(f"no file '{split}-*.parquet' in '{folder / config}'; it holds: {present}")
    return []


def _found_files(folder: Path, config: str, split: str) -> list[Path]:
    for place in [folder / config] if (folder / config).is_dir() else [folder / "data", folder]:
        patterns = (f"{split}-*.parquet", f"{split}.parquet", f"{split}/*.parquet")
        if files := sorted(path for pattern in patterns for path in place.glob(pattern)):
            return files
    return []


def check_shards(files: list[Path]) -> None:
    """Raises InputError where files are missing of a set that is numbered as in train-00000-of-00003.parquet."""
    totals = {int(number[1]) for file in files if (number := re.search(r"-of-(\d+)\.parquet$", file.name.lower()))}
    if totals and totals != {len(files)}:
        raise InputError(
            f"'{files[0].parent}' holds {len(files)} of the {max(totals)} files like '{files[0].name}'; "
            "download the dataset again",
            files[0].name,
        )


def read_parquet(files: list[Path], columns: Sequence[str], source: str, optional: Sequence[str] = ()) -> pa.Table:
    """These columns of the files, one after the other, without dictionaries; of the `optional` ones those that are
    there.

    Raises InputError for a file that is damaged or no regular one, a column that is not there or there twice, and for
    types of a column that do not go together.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for path in files:
        if not path.is_file():  # a pipe would be waited for
            raise InputError(f"'{path}' is not a regular file; a parquet file is needed")
        try:
            file = pq.ParquetFile(path)
            present = file.schema_arrow.names
            wanted = [column for column in columns if column in present or column not in optional]
            check_columns(wanted, present, f"{source} ({path.name})")
            table = file.read(columns=wanted).select(wanted)
            tables.append(_without_dictionaries(table).replace_schema_metadata(None))
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"'{path}' is not a readable parquet file ({reason}); download it again") from None
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(f"the files of '{files[0].parent}' differ: {str(error).splitlines()[0]}") from None


def _without_dictionaries(table: pa.Table) -> pa.Table:
    """The table with the values of dictionaries (categories) in their place, and strings of one kind."""
    import pyarrow as pa

    for place, field in enumerate(table.schema):
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        kind = pa.string() if pa.types.is_string_view(kind) else kind
        if kind != field.type:
            table = table.set_column(place, field.name, table.column(place).cast(kind))
    return table


def check_columns(wanted: Sequence[str], present: Sequence[str], source: str) -> None:
    for column in wanted:
        if column not in present:
            nearest = difflib.get_close_matches(column, present, n=1, cutoff=0.5)
            hint = f" (nearest: '{nearest[0]}')" if nearest else ""
            raise InputError(f"{source} has no column '{column}'; its columns are: {', '.join(present)}{hint}")
        if (count := list(present).count(column)) > 1:
            raise InputError(f"{source} has {count} columns '{column}'; one is needed")


def _from_hub(dataset: str, config: str, split: str, columns: Sequence[str], data_root: str | None) -> Rows:
    import datasets

    _check_reachable(dataset, config, data_root)
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(dataset, config, split=split)
    except OSError as error:  # datasets' ConnectionError and DatasetNotFoundError are OSErrors
        raise _unreachable(dataset, config, data_root, error) from None
    except Exception as error:  # an unknown configuration or split, a data set that is a script, files that differ
        raise _unreadable(dataset, error) from None
    source = f"{dataset} {config} {split} on the Hub"
    check_columns(columns, rows.column_names, source)
    return Rows(rows.select_columns(list(columns)).with_format("arrow")[:], source)


def _unreadable(dataset: str, error: Exception) -> InputError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    hint = ""
    if not isinstance(error, ValueError):  # which names what there is
        hint = (
            "; its parquet form may do: --data-root DIR, filled by 'hf download --repo-type dataset --revision "
            f"refs/convert/parquet --local-dir DIR/{dataset} {dataset}'"
        )
    return InputError(f"dataset '{dataset}' on the Hub: {reason}{hint}")


def _check_reachable(dataset: str, config: str, data_root: str | None) -> None:
    """Ask the Hub once: without internet `load_dataset` retries for half a minute before it gives up."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:  # load_dataset then reads its cache or fails at once
        return
    try:
        HfApi().dataset_info(dataset, timeout=HUB_SECONDS)
    except Exception as error:  # the client's HTTP library, and with it the error's type, differs by version
        raise _unreachable(dataset, config, data_root, error) from None


def _holding(data_root: str, dataset: str) -> str:
    """What a data root has instead of what was asked for."""
    folder = Path(data_root).expanduser()
    if (folder / dataset).is_dir():
        present = sorted(path.name for path in (folder / dataset).iterdir() if path.is_dir())
        return f"does not hold it; of '{dataset}' it holds: {', '.join(present) or 'nothing'}"
    present = sorted(str(path.relative_to(folder)) for path in folder.glob("*/*") if path.is_dir())
    return f"does not hold it; it holds: {', '.join(present[:12]) or 'nothing'}"


def _unreachable(dataset: str, config: str, data_root: str | None, error: Exception) -> InputError:
    place = f"data root '{data_root}' {_holding(data_root, dataset)}" if data_root else "no --data-root was given"
    return InputError(
        f"dataset '{dataset}' ({config}) cannot be had: {place}, and the Hub gave {type(error).__name__}. "
        f"Either give --data-root DIR, filled elsewhere by 'hf download --repo-type dataset --local-dir "
        f"DIR/{dataset} {dataset}', or run on a machine with internet."
    )
