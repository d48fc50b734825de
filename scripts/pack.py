"""Pack a results folder's records into one file that git keeps: what tables and pictures are made of, and no more.

    python scripts/pack.py FOLDER     writes FOLDER/records.tar.xz of FOLDER/runs, or of FOLDER/PART/runs of each part

Of every run its record, as it may leave the machine, and its predictions; of dEBORA's runs the upper-level steps of the
history as well, without the singular values; and parents.json, where a part has one. Unpacked, it is a results folder
again: `report` reads it, and `run` finds its runs finished.
"""

from __future__ import annotations

import argparse
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

PACKED = "records.tar.xz"


def pack(folder: Path) -> Path:
    """Write the archive: equal records give equal bytes. Raises InputError where there are none, and for links."""
    files = list(_files(folder))
    if not files:
        raise InputError(f"'{folder}' has no runs", str(folder))
    packed = folder / PACKED
    draft = packed.with_suffix(".draft")
    with lzma.open(draft, "wb", preset=9) as stream, tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    draft.replace(packed)
    return packed


def _files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for record in sorted([*folder.glob("runs/*/record.json"), *folder.glob("*/runs/*/record.json")]):
        run = record.parent
        plain_files(run)  # no link is followed
        kept = handed_on(RunRecord.parse(record.read_bytes(), str(record)))
        files = {}
        if (run / PREDICTIONS).exists():
            files[PREDICTIONS] = (run / PREDICTIONS).read_bytes()
        if kept.spec.method == "debora" and (run / HISTORY).exists():
            files[HISTORY] = _upper_steps(run / HISTORY)
        sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        inside = run.relative_to(folder)
        yield f"{inside}/{RECORD}", kept.model_copy(update={"files": sums}).to_json().encode()
        for name, content in files.items():
            yield f"{inside}/{name}", content
    for parents in sorted([*folder.glob(PARENTS), *folder.glob(f"*/{PARENTS}")]):
        if (parents.parent / "runs").is_dir():
            yield str(parents.relative_to(folder)), parents.read_bytes()


def _upper_steps(history: Path) -> bytes:
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    kept = [row for row in rows if "active_components" in row]
    if rows and rows[-1] not in kept:
        kept.append(rows[-1])  # it says how long the run was
    return "".join(json.dumps({k: v for k, v in row.items() if k != "s"}) + "\n" for row in kept).encode()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a results folder, or one that holds some")
    try:
        written = pack(parser.parse_args().folder)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"{written}: {written.stat().st_size / 1e6:.2f} MB")
