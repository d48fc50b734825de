"""The report: every table, picture and page that the records give, written below the results folder."""

from __future__ import annotations

import contextlib
import functools
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from harness.errors import InputError
from harness.record import RunRecord
from harness.record_store import Found, RecordStore
from harness.report.budget import costs, matched, sweeps, time_to_score
from harness.report.compare import ExampleReader, with_ties
from harness.report.data import csv_text, structured, tidy
from harness.report.frame import Naming, to_frame
from harness.report.latex import latex
from harness.report.leaderboard import Board, FamilyAverage, leaderboards
from harness.report.page import PICTURES, page
from harness.report.rank_curves import areas, rank_curves
from harness.report.text import markdown
from harness.report.trials import learning_rates, trials_frame

MOST_ILLUSTRATED = 6  # settings with pictures of their own


def build_report(
    store: RecordStore,
    found: Found | None = None,
    naming: Naming | None = None,
    boards: Sequence[Board] | None = None,
    forms: Sequence[str] = ("png", "pdf"),
) -> list[Path]:
    """Write tables/leaderboard.{md,tex,csv,json}, tables/trials.csv and those of `_tables` that have rows,
    pictures/*.{png,pdf} and report.html, all below `store.results`.

    `found`: what to report on; None for all of the store. `naming`: see `to_frame`. `boards`: those of the
    records, where they are made already (see `boards_of`).
    `forms`: of the pictures, "png" among them, which the page takes in; a PDF takes as long again, for its fonts.
    Several settings become sections of the same tables, and the first ones have pictures each, their names ending in
    the setting's key. Each file is replaced whole or stays as it was; files of an earlier report that this one does
    not make are removed.

    Returns the paths of the files. Raises InputError where there is no record to report on.
    """
    chosen, damaged = store.read_all() if found is None else found
    if all(record.spec.is_trial for record in chosen):
        left_out = f" (unreadable: {', '.join(damaged)})" if damaged else ""
        raise InputError(f"no records in {store.runs}{left_out}: run `python -m harness run ...` first")
    frame, trials = to_frame(chosen, naming), trials_frame(chosen, naming)
    records = {record.run_id: record for record in chosen}
    boards = boards_of(store, frame) if boards is None else boards
    tables = {board.key: _tables(board, _of(board, trials), store, records) for board in boards}
    whole = {name: _by_setting(name, tables) for name in tables[boards[0].key]} | {"trials": trials}
    texts = {
        "leaderboard.md": markdown(boards, damaged),
        "leaderboard.tex": latex(boards, damaged),
        "leaderboard.csv": csv_text(tidy(boards)),
        "leaderboard.json": json.dumps(structured(boards), indent=1, ensure_ascii=False) + "\n",
    } | {f"{name}.csv": csv_text(table) for name, table in whole.items() if len(table)}
    paths = [_write(store.results / "tables" / name, text) for name, text in texts.items()]
    for name in whole:
        if f"{name}.csv" not in texts:
            (store.results / "tables" / f"{name}.csv").unlink(missing_ok=True)
    drawn = _pictures(frame, trials, boards, store, records, forms)
    pngs = {key: [path for path in drawn[key] if path.suffix == ".png"] for key in drawn}
    paths += [path for of_board in drawn.values() for path in of_board]
    return [*paths, _write(store.results / "report.html", page(boards, damaged, tables, pngs))]


def boards_of(store: RecordStore, frame: pd.DataFrame, average: FamilyAverage | None = None) -> list[Board]:
    """The leaderboards of a frame (see `to_frame`) with their ties; `average`: see `leaderboards`."""
    read = ExampleReader(store)
    return [with_ties(board, read) for board in leaderboards(frame, average)]


def _tables(
    board: Board, trials: pd.DataFrame, store: RecordStore, records: Mapping[str, RunRecord]
) -> dict[str, pd.DataFrame]:
    """The board's tables beside the leaderboard, by name; some have no rows."""
    return {
        "costs": costs(board),
        "matched": matched(board),
        "sweeps": sweeps(board),
        "time_to_score": time_to_score(board, store),
        "learning_rates": learning_rates(board, trials),
        "rank_curves": rank_curves(board, records),
        "rank_aurac": areas(board, records),
    }


def _of(board: Board, table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the board's setting."""
    return table if table.empty else table[table["setting"] == board.key].drop(columns="setting")


def _by_setting(name: str, tables: Mapping[str, Mapping[str, pd.DataFrame]]) -> pd.DataFrame:
    """The boards' tables of this name below each other, the setting's key first."""
    parts = []
    for key, of_board in tables.items():
        part = of_board[name].astype(object)
        part.insert(0, "setting", key)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _pictures(
    frame: pd.DataFrame,
    trials: pd.DataFrame,
    boards: Sequence[Board],
    store: RecordStore,
    records: Mapping[str, RunRecord],
    forms: Sequence[str],
) -> dict[str, list[Path]]:
    """The pictures' paths by setting."""
    from harness.report.figures import save  # takes matplotlib a second to import
    from harness.report.pictures import pictures

    folder = store.results / "pictures"
    paths: dict[str, list[Path]] = {}
    for board in boards[:MOST_ILLUSTRATED]:
        paths[board.key] = []
        for name, figure in pictures(board, _of(board, frame), _of(board, trials), store, records):
            full = name if len(boards) == 1 else f"{name}_{board.key}"
            files = [folder / f"{full}.{form}" for form in forms]
            _replace(files, functools.partial(save, figure))
            paths[board.key] += files
    kept = {path for of_board in paths.values() for path in of_board}
    for name in PICTURES:
        for old in [*folder.glob(f"{name}.p*"), *folder.glob(f"{name}_????????.p*")]:
            if old not in kept and old.suffix in (".png", ".pdf"):
                old.unlink()
    return paths


def _write(path: Path, text: str) -> Path:
    _replace([path], functools.partial(Path.write_text, data=text, encoding="utf-8"))
    return path


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
