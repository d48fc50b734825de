"""The report: every table and picture that the records give, written below the results folder."""

from __future__ import annotations

import contextlib
import functools
import uuid
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from harness.errors import InputError
from harness.record import Found, RecordStore
from harness.report.frame import Defaults, to_frame, trials_frame
from harness.report.latex import latex
from harness.report.leaderboard import Board, leaderboards
from harness.report.text import markdown, tidy

PICTURE = "score_vs_parameters"


def build_report(store: RecordStore, found: Found | None = None, defaults: Defaults | None = None) -> list[Path]:
    """Write tables/leaderboard.{md,tex,csv}, tables/trials.csv where there was a search, and
    pictures/score_vs_parameters.{png,pdf} below `store.results`.

    `found`: what to report on; None for all of the store. `defaults`: see `to_frame`. Several settings become
    sections of the same tables, and a picture each, its name ending in the setting's key. Each file is replaced whole
    or stays as it was; pictures of an earlier report that this one does not make are removed.

    Returns the paths of the files. Raises InputError where there is no record to report on.
    """
    chosen, damaged = store.read_all() if found is None else found
    if all(record.spec.is_trial for record in chosen):
        left_out = f" (unreadable: {', '.join(damaged)})" if damaged else ""
        raise InputError(f"no records in {store.runs}{left_out}: run `python -m harness run ...` first")
    frame = to_frame(chosen, defaults)
    boards = leaderboards(frame)
    texts = {
        "leaderboard.md": markdown(boards, damaged),
        "leaderboard.tex": latex(boards, damaged),
        "leaderboard.csv": tidy(boards).to_csv(index=False, lineterminator="\n"),
    }
    trials = trials_frame(chosen)
    if len(trials):
        texts["trials.csv"] = trials.to_csv(index=False, lineterminator="\n")
    paths = []
    for name, text in texts.items():
        path = store.results / "tables" / name
        _replace([path], functools.partial(Path.write_text, data=text, encoding="utf-8"))
        paths.append(path)
    return paths + _pictures(frame, boards, store.results / "pictures")


def _pictures(frame: pd.DataFrame, boards: list[Board], folder: Path) -> list[Path]:
    from harness.report.plots import can_draw, save_pictures  # takes matplotlib a second to import

    paths: list[Path] = []
    for board in boards:
        runs = frame[frame["setting"] == board.key]
        name = PICTURE if len(boards) == 1 else f"{PICTURE}_{board.key}"
        if can_draw(runs):
            pair = [folder / f"{name}.png", folder / f"{name}.pdf"]
            _replace(pair, functools.partial(save_pictures, runs, board))
            paths += pair
    for old in [*folder.glob(f"{PICTURE}.p*"), *folder.glob(f"{PICTURE}_????????.p*")]:
        if old not in paths and old.suffix in (".png", ".pdf"):
            old.unlink()
    return paths


def _replace(paths: list[Path], write: Callable[..., object]) -> None:
    """Let `write` fill drafts, one beside each path, then put them in place; what was there stays if it fails."""
    mark = uuid.uuid4().hex[:8]
    drafts = [path.with_name(f".{mark}-{path.name}") for path in paths]
    try:
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        write(*drafts)
        for draft, path in zip(drafts, paths, strict=True):
            draft.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"'{paths[0].parent}' cannot be written ({reason}); make it a folder you may write to"
        ) from None
    finally:
        for draft in drafts:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
