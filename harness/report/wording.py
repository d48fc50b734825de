"""How numbers, scores and labels are worded, in every form of a table."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from harness.report.board.rows import Cell
from harness.report.statistics import Summary

NOTHING = "-"
DECIMALS = 3  # of a score, in tables; scores that are equal when printed are equally good
TIE = "not significantly different from the best"


def legend(words: Mapping[str, str], over: str = "n runs (seeds)", nothing: str = NOTHING, alone: str = "n/a") -> str:
    """How to read a leaderboard. `words`: what its columns beside the scores are, by their headings; `over`: what a
    mean is over; `nothing`: the sign for a cell without runs; `alone`: that for the interval of a single run."""
    columns = "; ".join(f"{heading} ({text})" for heading, text in words.items())
    marks = (
        f"Bold: the best mean of the rows that have every seed of the column; underlined: the second best; ≈: {TIE} "
        "(paired test over seeds and examples, Holm-corrected over the column)."
    )
    return (
        f"Scores: mean ± half-width of the 95 % confidence interval (Student's t) over {over}; {alone}: one run has no "
        f"interval; {nothing}: not run. {marks} Rows are ordered by their mean score, "
        f"those with a missing score last. Other columns, means over runs: {columns}."
    )


def score_text(score: float) -> str:
    """A score as tables print it."""
    return f"{round(score, DECIMALS) + 0.0:.{DECIMALS}f}"  # + 0.0: no "-0.000"


def human(number: float | None, unit: str = "") -> str:
    """Three digits and a decimal prefix: 1.33M, 36.9k, 512; "-" for None."""
    if number is None:
        return NOTHING
    for prefix in ("", "k", "M", "G"):
        digits = f"{number:.0f}" if prefix == "" and number == int(number) else f"{number:#.3g}".rstrip(".")
        if abs(float(digits)) < 1000:
            return f"{digits}{prefix}{unit}"
        number /= 1000
    return f"{number:.3g}T{unit}"


def summary_text(summary: Summary, with_n: bool = True) -> str:
    """0.823 ± 0.004 (n=2), with the half-width of the 95 % interval; "-" where there is no value."""
    if summary.mean is None:
        return NOTHING
    return f"{score_text(summary.mean)} ± {spread_text(summary)}" + (f" (n={summary.n})" if with_n else "")


def folded_label(label: str) -> str:
    """A row's label in lines that leave room for numbers."""
    return textwrap.fill(label.replace(",", ", "), 36, break_on_hyphens=False)


def spread_text(summary: Summary) -> str:
    """The half-width of the 95 % interval; n/a where there is none, from one run."""
    return "n/a" if summary.half_width is None else score_text(summary.half_width)


def failures_text(cell: Cell) -> str:
    """1 of 2 diverged; empty where every run gave a score."""
    return ", ".join(f"{count} of {len(cell.runs)} {status}" for status, count in cell.failures)


def cell_text(cell: Cell | None, with_n: bool = True) -> str:
    """The cell's score, its failures, or both."""
    if cell is None:
        return NOTHING
    score = summary_text(cell.score, with_n) if cell.score.n else ""
    return "; ".join(part for part in (score, failures_text(cell)) if part)


def seeds_text(seeds: Sequence[int]) -> str:
    """Seeds in ascending order, runs of them by their ends: 0-4, 7."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def few(names: Sequence[str], most: int = 3) -> str:
    """The first of the names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def decimal(number: float | None) -> str:
    """A count or a mean of counts; "-" for None."""
    if number is None:
        return NOTHING
    return f"{number:.0f}" if number == int(number) or number >= 100 else f"{number:.1f}"
