"""Pack the study's records into one file that git keeps: what tables, tests and pictures are made of, and no more.

Of every run below results/study/ its record, as it may leave the machine, and predictions; of dEBORA's runs the
upper-level steps of the history as well, without the singular values; and which run each control took its ranks or size
from, where its record does not say so itself (parents.json). Usage: python scripts/study/pack.py
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from harness.commands.export import plain_files
from harness.errors import InputError
from harness.record.record import HISTORY, PREDICTIONS, RECORD, RunRecord
from harness.report.board.parents import PARENTS
from harness.report.redact import handed_on

STUDY = Path(__file__).parents[2] / "results" / "study"
PARTS = ("main", "parts", "convolutions")
PACKED = STUDY / "records.tar.xz"


def main() -> None:
    """Write the archive: equal records give equal bytes."""
    files = list(_files())
    draft = PACKED.with_suffix(".draft")
    with lzma.open(draft, "wb", preset=9) as stream, tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    draft.replace(PACKED)
    print(f"{PACKED}: {PACKED.stat().st_size / 1e6:.2f} MB")


def _files() -> Iterator[tuple[str, bytes]]:
    for part in PARTS:
        records = sorted((STUDY / part / "runs").glob("*/record.json"))
        if not records:
            sys.exit(f"error: {STUDY / part} has no runs: make them with `bash scripts/study.sh --run DIR`")
        for record in records:
            folder = record.parent
            _check(folder)
            kept = handed_on(RunRecord.parse(record.read_bytes(), str(record)))
            files = {}
            if (folder / PREDICTIONS).exists():
                files[PREDICTIONS] = (folder / PREDICTIONS).read_bytes()
            if kept.spec.method == "debora" and (folder / HISTORY).exists():
                files[HISTORY] = _upper_steps(folder / HISTORY)
            sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
            inside = f"{part}/runs/{folder.name}"
            yield f"{inside}/{RECORD}", kept.model_copy(update={"files": sums}).to_json().encode()
            for name, content in files.items():
                yield f"{inside}/{name}", content
    yield f"main/{PARENTS}", (STUDY / PARENTS).read_bytes()


def _check(folder: Path) -> None:
    """No link is followed."""
    try:
        plain_files(folder)
    except InputError as error:
        sys.exit(f"error: {error}")


def _upper_steps(history: Path) -> bytes:
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    kept = [row for row in rows if "active_components" in row]
    if rows and rows[-1] not in kept:
        kept.append(rows[-1])  # it says how long the run was
    return "".join(json.dumps({k: v for k, v in row.items() if k != "s"}) + "\n" for row in kept).encode()


if __name__ == "__main__":
    main()
