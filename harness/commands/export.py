"""`export`: a trained adapter as a folder to hand on."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from harness.commands.report import chosen, naming_of
from harness.errors import InputError
from harness.record_store import RecordStore


def command(results: Path, run_id: str, to: Path) -> int:
    """Make the folder `to` with the run's adapter, a model card (README.md) and its record (record.json).

    Raises InputError for an unknown run, one that kept no adapter, or a folder that is there already or cannot be made.
    """
    from harness.report.card import model_card
    from harness.report.frame import to_frame
    from harness.report.leaderboard import leaderboards

    store, found = chosen(results, None, None)
    record = store.find(run_id)
    adapter = store.folder(run_id) / "adapter"
    if not adapter.is_dir():
        raise InputError(
            f"run '{run_id}' kept no adapter ({record.status}): delete its folder and run it again with --save-adapter"
        )
    if to.exists():
        raise InputError(f"--to '{to}' is there already: name a folder that is not")
    boards = leaderboards(to_frame(found.records, naming_of(found.records)))
    _write(store, run_id, to, model_card(record, boards, sorted(path.name for path in adapter.iterdir())))
    print(f"adapter, README.md and record.json of {run_id} are in {to}")
    return 0


def _write(store: RecordStore, run_id: str, to: Path, card: str) -> None:
    draft = to.with_name(f".{uuid.uuid4().hex[:8]}-{to.name}")
    try:
        shutil.copytree(store.folder(run_id) / "adapter", draft)
        (draft / "README.md").write_text(card, encoding="utf-8")
        shutil.copyfile(store.folder(run_id) / "record.json", draft / "record.json")
        draft.rename(to)
    except OSError as error:
        raise InputError(f"--to '{to}' cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
