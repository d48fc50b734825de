"""The samples that runs of `dreambooth` kept, side by side in one picture.

    python scripts/contact_sheet.py RESULTS SHEET.png [--seed 0]

A panel for the subject's own pictures, one for the model before training, then one for each method with its score. In
a panel of samples the upper row is of the instance prompt, the lower of the class prompt, and a column starts from one
noise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from harness.record.record import RunRecord
from harness.record.store import RecordStore
from harness.registry import label_of
from tasks.dreambooth.pictures import read_pictures

ACROSS = 2


def main() -> int:
    """Read the command line and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("sheet", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    store = RecordStore(options.results)
    records = [record for record in store.records() if record.spec.seed == options.seed and record.score is not None]
    records = [record for record in records if after(store, record).is_file()]
    if not records:
        print(f"error: no samples of runs with seed {options.seed} in '{options.results}'", file=sys.stderr)
        return 2
    records.sort(key=lambda record: record.merit(record.score or 0), reverse=True)
    draw(panels(store, records), options.sheet)
    return 0


def after(store: RecordStore, record: RunRecord) -> Path:
    """The samples of the trained model."""
    return store.folder(record.run_id) / "artifacts" / "after" / "samples.png"


def panels(store: RecordStore, records: list[RunRecord]) -> list[tuple[str, np.ndarray]]:
    """(title, picture), best run first."""
    spec = records[0].spec
    assert spec.place.path is not None
    before = after(store, records[0]).parents[1] / "before" / "samples.png"
    made = [
        ("the subject's pictures", montage(read_pictures(spec.place.path, spec.task_parameters["resolution"])[0])),
        ("samples before training", np.asarray(Image.open(before))),
    ]
    for record in records:
        name = label_of(record.spec.method, record.spec.method_parameters)
        made.append((f"{name}: {record.score:.4f}", np.asarray(Image.open(after(store, record)))))
    return made


def montage(pictures: np.ndarray) -> np.ndarray:
    """Up to 16 pictures in two rows, with a white gap between them."""
    padded = np.pad(pictures[:16], ((0, 0), (0, 2), (0, 2), (0, 0)), constant_values=255)
    rows = np.array_split(padded[: len(padded) // 2 * 2], 2)
    return np.concatenate([np.concatenate(row, axis=1) for row in rows])


def draw(shown: list[tuple[str, np.ndarray]], path: Path) -> None:
    """One picture of all panels."""
    down = -(-len(shown) // ACROSS)
    figure = Figure(figsize=(5 * ACROSS, 1.6 * down), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for panel in figure.subplots(down, ACROSS, squeeze=False).flatten():
        panel.set_axis_off()
    for panel, (title, picture) in zip(figure.axes, shown, strict=False):
        panel.imshow(picture, interpolation="nearest")
        panel.set_title(title, fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
