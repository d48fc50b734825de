"""Every method on a tiny model of every family: the table of docs/models.md, each cell from a run.

    python -m scripts.model_families [FAMILY ...] [--batches 6]

A cell is a whole run (training, evaluation, export) on 40 short texts and a model of two layers with random weights.
The last column is the largest difference between what the model says of a row alone and in a batch of rows of other
lengths, in fp32, as a share of its largest output. Some ten minutes on one core; with families named, their rows are
printed and nothing is written.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import warnings
from pathlib import Path

os.environ["HARNESS_CACHE"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from harness.contracts import Subject
from harness.contracts.subject import spec_of, task_of
from harness.errors import InputError
from harness.plan.trial import check_rows, difference
from harness.record.store import RecordStore
from harness.run.run import run_one
from harness.run.streams import seed_everything
from harness.spec import Place, TrainSpec
from harness.splits import make_splits
from tests.support import families

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- begin: scripts/model_families.py -->\n", "<!-- end -->\n"
METHODS = {
    "head": "head",
    "full": "full[learning_rate=1e-3]",
    "bitfit": "bitfit",
    "lora": "lora[rank=4]",
    "pruned_lora": "pruned_lora[rank=4,keep=0.5]",
    "adalora": "adalora[init_rank=4,target_rank=2]",
    "hadapter": "hadapter",
    "padapter": "padapter",
    "debora": "debora[rank=4,T_max=2,n0=0,step_size=0.5]",
    "peft lora": "peft[type=lora,r=4]",
    "peft ia3": "peft[type=ia3]",
}
SENTENCE = "film was a very long and quiet story about people who live near water and never"


def main() -> None:
    """Run what is asked for, and write the table where that is everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(families.FAMILIES))
    parser.add_argument("--batches", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # libraries' own, of each other
    reasons: list[str] = []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for family in options.families or families.FAMILIES:
            rows.append(row_of(family, Path(folder), options.batches, reasons))
            print(rows[-1], flush=True)
    head = ["family", *METHODS, "difference"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows, ""]
    lines += [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    table = "\n".join(lines) + "\n"
    if options.families:
        print(table)
        return
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + "\n" + table + "\n" + END + rest.partition(END)[2])


def row_of(family: str, folder: Path, batches: int, reasons: list[str]) -> str:
    """The family's line of the table: "yes", or the number of the reason why not."""
    model = str(families.write(family, folder / family))
    task_name = f"text:{write_texts(folder)}[max_length=48]"
    task = task_of(task_name)
    encoded = task.encode(make_splits(task, None).train, model)
    seed_everything(0)
    module = task.backbone(model).module
    try:
        check_rows(task, module, encoded, TrainSpec(), "the model")
        found = difference(task, module, encoded, range(16), TrainSpec())
        assert found is not None
        share = f"{found.largest / found.size:.0e}"
    except InputError as error:
        cells = [numbered(f"refused before the first run: {error}", reasons)] * len(METHODS)
        return f"| {' | '.join([family, *cells, '-'])} |"
    cells = []
    for name, method in METHODS.items():
        place = Place(model=model, save_adapter=True)
        subject = Subject(method, folder, task=task_name, batches=batches, place=place)
        store = RecordStore(folder / f"{family} {name}")
        store.make_ready()
        record = run_one(spec_of(subject), store)
        reason = f"{record.status}: {record.error}".replace(type(module).__name__, "the model")
        cells.append("yes" if record.status == "done" else numbered(reason, reasons))
    return f"| {' | '.join([family, *cells, share])} |"


def numbered(reason: str, reasons: list[str]) -> str:
    """The reason's number, in brackets."""
    if reason not in reasons:
        reasons.append(reason)
    return f"({1 + reasons.index(reason)})"


def write_texts(folder: Path) -> Path:
    """40 texts of 3 to 17 words in two classes."""
    path, words = folder / "texts.csv", SENTENCE.split()
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        for row in range(40):
            sign = ("bad", "good")[row % 2]
            writer.writerow([f"the {' '.join(words[row % 3 : 3 + row % 13])} {sign}", row % 2])
    return path


if __name__ == "__main__":
    main()
