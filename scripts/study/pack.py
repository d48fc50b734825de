"""Pack the study's records into one file that git keeps: what tables, tests and pictures are made of, and no more.

Of every run below results/study/ its record and predictions; of dEBORA's runs the upper-level steps of the history as
well, without the singular values. Usage: python scripts/study/pack.py
"""

from __future__ import annotations

import io
import json
import lzma
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

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
            content, folder = json.loads(record.read_bytes()), record.parent
            spec = content["spec"]
            spec["place"]["data_root"] = None  # where somebody's files lie is nobody's business
            spec["place"]["model"] = spec["place"]["model"] and Path(spec["place"]["model"]).name
            content["environment"]["platform"] = content["environment"]["platform"].partition("-")[0]
            inside = f"{part}/runs/{folder.name}"
            yield f"{inside}/record.json", json.dumps(content, indent=1).encode()
            predictions = folder / "predictions.safetensors"
            if predictions.exists():
                yield f"{inside}/predictions.safetensors", predictions.read_bytes()
            history = folder / "history.jsonl"
            if spec["method"] == "debora" and history.exists():
                yield f"{inside}/history.jsonl", _upper_steps(history)


def _upper_steps(history: Path) -> bytes:
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    kept = [row for row in rows if "active_components" in row]
    if rows and rows[-1] not in kept:
        kept.append(rows[-1])  # it says how long the run was
    return "".join(json.dumps({k: v for k, v in row.items() if k != "s"}) + "\n" for row in kept).encode()


if __name__ == "__main__":
    main()
