"""What a reader of a leaderboard should know beside its numbers, a line each."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence

from harness.report.board.leaderboard import Board
from harness.report.board.provenance import provenance_notes
from harness.report.board.rows import Column, Row, status_text
from harness.report.board.runs import Run
from harness.report.redact import cut, one_line
from harness.report.wording import few, seeds_text


def with_notes(board: Board) -> Board:
    """The board with notes on failures and their reasons, on how runs say that they went, on seeds, data, devices
    and versions that differ, on gradient checkpointing, on how generation was timed, and on where the methods come
    from."""
    runs = [run for row in board.rows for run in row.runs]
    notes = [
        *_failure_notes(board.rows, board.tasks),
        *_remarks(board.rows, board.tasks),
        *_seed_notes(board.rows, board.tasks),
        *_data_notes(board.rows, board.tasks),
        *_split_notes(board.columns),
        *_device_notes(runs),
        *_checkpointing_notes(runs),
        *_generation_notes(runs),
        *_version_notes(runs),
        *provenance_notes(board),
    ]
    return dataclasses.replace(board, notes=(*map(cut, notes), *board.notes))


def _failure_notes(rows: Iterable[Row], columns: Sequence[Column]) -> list[str]:
    """One line for each reason why runs of a cell gave no score."""
    notes = []
    for row in rows:
        for title, cell in ((column.title, row.cells[column.title]) for column in columns if column.title in row.cells):
            seeds: dict[tuple[str, str], list[int]] = defaultdict(list)
            for run in cell.runs:
                if run.score is None:
                    reason = one_line(run.error) if run.error is not None else "no reason recorded"
                    seeds[status_text(run), reason].append(run.seed)
            for (status, reason), which in seeds.items():
                notes.append(f"{row.label} on {title}: {status} (seed {_listed(which)}): {reason}")
    return notes


def _remarks(rows: Iterable[Row], columns: Sequence[Column]) -> list[str]:
    """One line for each thing that runs of a cell say of how they went."""
    notes = []
    for row in rows:
        for title, cell in ((column.title, row.cells[column.title]) for column in columns if column.title in row.cells):
            seeds: dict[str, list[int]] = defaultdict(list)
            for run in cell.runs:
                for remark in run.record.notes:
                    seeds[remark].append(run.seed)
            notes += [f"{row.label} on {title} (seed {_listed(which)}): {remark}" for remark, which in seeds.items()]
    return notes


def _seed_notes(rows: Iterable[Row], columns: Iterable[Column]) -> list[str]:
    """A line for each column whose means are over different seeds, and so are not means of paired runs."""
    notes = []
    for column in columns:
        labels: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            if column.title in row.cells and row.cells[column.title].score.n:
                labels[seeds_text([run.seed for run in row.cells[column.title].scored])].append(row.label)
        if len(labels) > 1:
            groups = "; ".join(f"{seeds}: {few(names)}" for seeds, names in sorted(labels.items()))
            notes.append(f"Scores on {column.title} are over different seeds: {groups}.")
    return notes


def _data_notes(rows: Sequence[Row], columns: Iterable[Column]) -> list[str]:
    """A line for each task whose runs are on several data sets: these are never averaged together."""
    titles: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for column in columns:
        for row in rows:
            if column.title in row.cells:
                run = row.cells[column.title].runs[0]
                titles[run.task][run.spec.data_fingerprint].append(row.label)
    notes = []
    for task, prints in titles.items():
        if len(prints) > 1:
            groups = "; ".join(f"{data[:8]}: {few(names)}" for data, names in sorted(prints.items()))
            notes.append(f"Runs on {task} are on different data ({groups}); they are not averaged together.")
    return notes


def _split_notes(columns: Iterable[Column]) -> list[str]:
    """A line about the columns of splits that do not count."""
    titles = [column.title for column in columns if not column.counts]
    if not titles:
        return []
    return [f"Left out of averages and of the order of rows, where each task counts once: {'; '.join(titles)}."]


def _version_notes(runs: Iterable[Run]) -> list[str]:
    versions = sorted({run.versions for run in runs})
    return [f"Runs were made with different versions ({'; '.join(versions)})."] if len(versions) > 1 else []


def _device_notes(runs: Iterable[Run]) -> list[str]:
    devices = sorted({run.record.environment.device for run in runs})
    if len(devices) == 1:
        return []
    return [f"Runs were made on different devices ({', '.join(devices)}): do not compare their seconds and memory."]


def _checkpointing_notes(runs: Sequence[Run]) -> list[str]:
    again = [run for run in runs if run.spec.place.gradient_checkpointing]
    if not again:
        return []
    if len(again) == len(runs):
        return ["Runs were made with gradient checkpointing, which saves memory and takes time."]
    labels = few(list(dict.fromkeys(run.label for run in again)))
    return [f"Gradient checkpointing was on in runs of {labels} alone: do not compare their seconds and memory."]


def _generation_notes(runs: Iterable[Run]) -> list[str]:
    sizes = sorted({(timed.rows, timed.tokens) for run in runs if (timed := run.record.generation) is not None})
    if len(sizes) < 2:
        return []
    found = ", ".join(f"{rows} x {tokens}" for rows, tokens in sizes)
    return [f"Generated tokens were timed in batches of different sizes (rows x tokens: {found}): do not compare them."]


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(str(seed) for seed in seeds)
