"""The report: every table, picture and page that the records give, written below the results folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from harness.errors import InputError
from harness.record.garbage import uncollected
from harness.record.store import Found, RecordStore
from harness.report.board.columns import COLUMNS, TableColumn
from harness.report.board.labels import Naming
from harness.report.board.leaderboard import Board, FamilyAverage, leaderboards
from harness.report.board.notes import with_notes
from harness.report.board.parents import grouped
from harness.report.board.runs import Run, runs_of
from harness.report.board.selection import selected
from harness.report.evidence.compare import ExampleReader, with_ties
from harness.report.evidence.examples import FindMetric, common
from harness.report.forms import plain
from harness.report.forms.data import csv_text, structured, tidy
from harness.report.forms.latex import latex
from harness.report.forms.latex_cells import STYLES
from harness.report.forms.page import page
from harness.report.forms.text import markdown
from harness.report.known import Known
from harness.report.pictures.histories import Traced, one_line, traced
from harness.report.pictures.picture import Picture, PictureData
from harness.report.tables.budget import costs, matched, sweeps, time_to_score
from harness.report.tables.differences import Differences, differences_frame, differences_json, differences_table
from harness.report.tables.forgetting import forgetting_frame, forgetting_table, forgotten
from harness.report.tables.rank_agreement import agreement_frame, agreement_table, agreements
from harness.report.tables.rank_curves import areas, rank_curves
from harness.report.tables.rank_scores import RankScores, rank_differences, rank_tables
from harness.report.tables.table import Table
from harness.report.tables.trials import learning_rates, trials_frame
from harness.spec import EVERYTHING, Selection
from harness.storage import remove

MOST_ILLUSTRATED = 6  # settings with pictures of their own
AT_TIMES = {  # tables for people
    "differences": "Differences",
    "rank_curves": "Scores at ranks",
    "rank_agreement": "Agreement of seeds on ranks",
    "forgetting": "Forgetting",
}
Tell = Callable[[str], None]


class Unwritten(InputError):
    """Some of a report's files could not be written; `paths` are those that were."""

    def __init__(self, message: str, paths: list[Path]) -> None:
        super().__init__(message)
        self.paths = paths


def to_stderr(line: str) -> None:
    """Tell a person something beside the report."""
    print(line, file=sys.stderr)


def build_report(
    store: RecordStore,
    found: Found | None = None,
    naming: Naming | None = None,
    boards: Sequence[Board] | None = None,
    forms: Sequence[str] = ("png", "pdf"),
    tell: Tell = to_stderr,
    known: Known | None = None,
    differences: Mapping[str, Differences] | None = None,
    latex_style: str = STYLES[0],
    ranks: Mapping[str, RankScores] | None = None,
) -> list[Path]:
    """Write tables/leaderboard.{md,tex,csv,json}, tables/trials.csv and those of `_tables` that have rows,
    tables/differences.{md,tex,csv,json} where there are `differences` (by a board's key), the tables of scores at
    `ranks` (in the same way), of ranks' agreement and of forgetting in the same forms, pictures/*.{png,pdf} and
    report.html, all below `store.results`.

    `found`: what to report on; None for all of the store. `naming`: see `labels_of`. `boards`: those of the
    records, where they are made already (see `boards_of`).
    `forms`: of the pictures, "png" among them, which the page takes in; a PDF takes as long again, for its fonts.
    `tell`: gets a line about each file of a run that is damaged, and about each picture that cannot be made.
    `known`: what installed packages tell of their methods' histories and adapters, and their pictures.
    `latex_style`: see `harness.report.forms.latex`.
    Several settings become sections of the same tables, and the first ones have pictures each, their names ending in
    the setting's key. All is made in a folder of its own first, so that reports at the same time do not meet; then each
    file is replaced whole or stays as it was; files of an earlier report that this one does not make are removed.

    Returns the paths of the files. Raises InputError where there is no record to report on, and Unwritten, when all
    else is in place, where a file could not be written.
    """
    from harness.report.pictures.every import PICTURES  # takes matplotlib a second to import

    known = known or Known()
    pictures = (*PICTURES, *known.pictures)
    chosen, damaged = store.read_all() if found is None else found
    if all(record.spec.is_trial for record in chosen):
        left_out = f" (unreadable: {', '.join(damaged)})" if damaged else ""
        raise InputError(f"no records in {store.runs}{left_out}: run `python -m harness run ...` first")
    trials = trials_frame(chosen, naming)
    records = {record.run_id: record for record in chosen}
    if boards is None:
        runs = runs_of(grouped(store, chosen, naming or {}), naming)
        boards = boards_of(store, runs, provenance=known.provenance)
    with _draft(store) as folder:
        drawing, tables, further = _Drawing(folder, forms, tell), {}, _Further(store, differences or {}, ranks or {})
        for place, board in enumerate(boards):  # one after the other: histories are large
            of_board, histories = _of(board, trials), _histories(board, store, known, tell)
            tables[board.key] = _tables(board, of_board, histories) | further.frames(board)
            if place < MOST_ILLUSTRATED:
                data = PictureData(board, of_board, store, records, histories, known.singular_values, known.is_lora)
                drawing.draw(pictures, data, f"_{board.key}" if len(boards) > 1 else "")
        whole = {name: _by_setting(name, tables) for name in tables[boards[0].key]} | {"trials": trials}
        texts = _texts(boards, whole, damaged, latex_style) | further.texts()
        html = {"report.html": page(boards, damaged, tables, drawing.pngs, further.tables)}
        for name, text in (texts | html).items():
            (folder / name).write_text(text, encoding="utf-8")
        names = [*texts, *drawing.names, *html]
        old = {f"tables/{name}.csv" for name in whole} | further.may_write | _drawn_before(store.results, pictures)
        _remove_old(store.results, old, {*names, *drawing.failed})
        return _put(folder, store.results, names)


def boards_of(
    store: RecordStore,
    runs: Iterable[Run],
    average: FamilyAverage | None = None,
    metric: FindMetric = common,
    table: Sequence[TableColumn] = COLUMNS,
    selection: Selection = EVERYTHING,
    tell: Tell | None = None,
    provenance: Mapping[str, str] | None = None,
) -> list[Board]:
    """The leaderboards of runs (see `runs_of`) with their notes and ties; `average`, `table`: see `leaderboards`,
    `metric`: see `ExampleReader`, `selection`, `tell`: see `selected`, `provenance`: see `Board`."""
    read = ExampleReader(store, metric)
    boards = [with_ties(board, read) for board in leaderboards(runs, average, table)]
    boards = [dataclasses.replace(board, provenance=provenance or {}) for board in boards]
    return [with_notes(board) for board in selected(boards, selection, tell)]


def _histories(board: Board, store: RecordStore, known: Known, tell: Tell) -> list[Traced]:
    lines: dict[str, str] = {}
    found = traced(board, store, lines, known.traces)
    for line in lines.values():
        tell(f"{line}; it is in no picture over time")
    return found


def _tables(board: Board, trials: pd.DataFrame, found: Sequence[Traced]) -> dict[str, pd.DataFrame]:
    """The board's tables beside the leaderboard, by name; some have no rows."""
    return {
        "costs": costs(board),
        "matched": matched(board),
        "sweeps": sweeps(board),
        "time_to_score": time_to_score(board, found),
        "learning_rates": learning_rates(board, trials),
        "rank_curves": rank_curves(board),
        "rank_aurac": areas(board),
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


@contextmanager
def _draft(store: RecordStore) -> Iterator[Path]:
    """A folder for the report's files, which goes in the end; those of killed processes go, too."""
    with store.writing():
        store.running.mkdir(exist_ok=True)
        store.clear("report")
        folder = store.draft("report")
        try:
            for part in ("tables", "pictures"):
                (folder / part).mkdir()
            yield folder
        finally:
            remove(folder)


def _texts(
    boards: Sequence[Board], whole: Mapping[str, pd.DataFrame], damaged: Sequence[str], latex_style: str
) -> dict[str, str]:
    """The tables as text by the names of their files."""
    texts = {
        "leaderboard.md": markdown(boards, damaged),
        "leaderboard.tex": latex(boards, damaged, latex_style),
        "leaderboard.csv": csv_text(tidy(boards)),
        "leaderboard.json": json.dumps(structured(boards), indent=1, ensure_ascii=False) + "\n",
    } | {f"{name}.csv": csv_text(table) for name, table in whole.items() if len(table)}
    return {f"tables/{name}": text for name, text in texts.items()}


class _Further:
    """The tables for people that some reports have, setting by setting; see `AT_TIMES`."""

    may_write = frozenset(f"tables/{name}.{form}" for name in AT_TIMES for form in ("md", "tex", "json"))

    def __init__(
        self, store: RecordStore, differences: Mapping[str, Differences], ranks: Mapping[str, RankScores]
    ) -> None:
        self._store, self._differences, self._ranks = store, differences, ranks
        self._found: dict[str, list[Table]] = {name: [] for name in AT_TIMES}

    def frames(self, board: Board) -> dict[str, pd.DataFrame]:
        """The board's tables as data; without rows where it has none."""
        agreed = list(agreements(board))
        self._found["rank_agreement"] += [agreement_table(board, agreed)] if agreed else []
        against, at_ranks = self._differences.get(board.key), self._ranks.get(board.key)
        self._found["differences"] += [] if against is None else [differences_table(against)]
        self._found["rank_curves"] += rank_tables(at_ranks)
        frames = {"differences": differences_frame(against), "rank_differences": rank_differences(at_ranks)}
        forgot = forgotten(board, self._store)
        self._found["forgetting"] += [forgetting_table(board, forgot)] if forgot else []
        return frames | {"rank_agreement": agreement_frame(agreed), "forgetting": forgetting_frame(forgot)}

    @property
    def tables(self) -> list[Table]:
        return [table for tables in self._found.values() for table in tables]

    def texts(self) -> dict[str, str]:
        """The tables of all boards by the names of their files."""
        texts = {}
        for name, tables in self._found.items():
            if tables:
                texts[f"tables/{name}.md"] = plain.markdown(AT_TIMES[name], tables)
                texts[f"tables/{name}.tex"] = plain.latex(tables, name)
        if self._differences:
            content = differences_json(self._differences.values())
            texts["tables/differences.json"] = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        return texts


class _Drawing:
    """The pictures' files, below `folder`: one that cannot be made must not cost the others."""

    def __init__(self, folder: Path, forms: Sequence[str], tell: Tell) -> None:
        self._folder, self._forms, self._tell = folder, forms, tell
        self.names: list[str] = []
        self.failed: set[str] = set()
        self.pngs: dict[str, list[tuple[str, Path]]] = {}  # by setting: title and file

    def draw(self, pictures: Iterable[Picture], data: PictureData, ending: str) -> None:
        """Make the pictures of one setting."""
        from harness.report.pictures.figures import in_house_style, save

        pngs = self.pngs[data.board.key] = []
        for picture in pictures:
            names = [f"pictures/{picture.name}{ending}.{form}" for form in self._forms]
            try:
                with uncollected(), in_house_style():
                    figure = picture.draw(data)
                    if figure is None:
                        continue
                    save(figure, *(self._folder / name for name in names))
                    figure = None
            except (Exception, SystemExit) as error:
                self.failed |= set(names)
                self._tell(
                    f"picture '{picture.name}{ending}' cannot be made ({one_line(error)}); the rest of the report is"
                )
            else:
                self.names += names
                pngs += [(picture.title, self._folder / name) for name in names if name.endswith(".png")]


def _drawn_before(results: Path, pictures: Iterable[Picture]) -> set[str]:
    """What earlier reports have made of these pictures, of any setting."""
    patterns = (f"{picture.name}{ending}.p*" for picture in pictures for ending in ("", "_????????"))
    return {f"pictures/{path.name}" for pattern in patterns for path in (results / "pictures").glob(pattern)}


def _remove_old(results: Path, old: set[str], kept: set[str]) -> None:
    """Remove what an earlier report has made, but for what is `kept`."""
    for name in old - kept:
        if name.endswith((".csv", ".md", ".tex", ".json", ".png", ".pdf")):
            with contextlib.suppress(OSError):  # another report may have been faster
                (results / name).unlink()


def _put(folder: Path, results: Path, names: Sequence[str]) -> list[Path]:
    """Move the files into place. Returns their paths there. Raises Unwritten."""
    paths: list[Path] = []
    reasons: dict[str, None] = {}
    for name in names:
        path = results / name
        try:
            path.parent.mkdir(exist_ok=True)
            (folder / name).replace(path)
            paths.append(path)
        except OSError as error:
            reasons[f"'{path.parent}' cannot be written ({error.strerror or error})"] = None
    if reasons:
        raise Unwritten(f"{'; '.join(reasons)}; make it a folder you may write to", paths)
    return paths
