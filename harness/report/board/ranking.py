"""What is best in a column, and among which rows: a mean over fewer seeds than its neighbours have is never best."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from harness.report.board.rows import Cell, Column, Row
from harness.report.wording import score_text, seeds_text


def common_seeds(cells: Iterable[Cell]) -> tuple[int, ...]:
    """The seeds that a column is about, ascending: those of the largest group of cells with scores of the same two or
    more seeds; of groups of one size, the one with more seeds, then with the smaller ones. None where every cell has a
    score of one seed at most: single runs are not ranked."""
    groups = Counter(tuple(sorted(run.seed for run in cell.scored)) for cell in cells)
    several = [seeds for seeds in groups if len(seeds) > 1]
    return max(several, key=lambda seeds: (groups[seeds], len(seeds), [-seed for seed in seeds]), default=())


def has_all(cell: Cell | None, seeds: Iterable[int]) -> bool:
    """Whether the cell has a score of each of these seeds; it may have more."""
    return cell is not None and {run.seed for run in cell.scored}.issuperset(seeds)


def two_best(
    rows: Iterable[Row], columns: Iterable[Column], seeds: Mapping[str, Sequence[int]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Best and second best mean by title, where two or more rows have every seed of the column (see `common_seeds`):
    of cells without failures, the second the next that prints differently."""
    best: dict[str, float] = {}
    second: dict[str, float] = {}
    for column in columns:
        of_column = seeds[column.title]
        cells = [row.cells[column.title] for row in rows if has_all(row.cells.get(column.title), of_column)]
        means = [cell.score.mean for cell in cells if cell.score.mean is not None and not cell.failures]
        means.sort(key=column.merit, reverse=True)
        if of_column and means and len(cells) > 1:
            best[column.title] = means[0]
            others = [mean for mean in means if score_text(mean) != score_text(means[0])]
            second.update({column.title: others[0]} if others else {})
    return best, second


def among(seeds: Mapping[str, Sequence[int]]) -> str:
    """Which rows the marks of a table are among, a sentence. `seeds`: of its columns with scores, by title."""
    if not seeds:
        return ""
    if not any(seeds.values()):
        return "One run each: no best is marked."
    titles: dict[str, list[str]] = defaultdict(list)
    for title, of_column in seeds.items():
        titles[seeds_text(of_column)].append(title)
    where = {words: f" ({', '.join(of_words)})" if len(titles) > 1 else "" for words, of_words in titles.items()}
    marked = "; ".join(f"seeds {words}{where[words]}" for words in titles if words)
    single = f" One run each{where['']}: no best is marked." if "" in where else ""
    return f"Best among rows with {marked}.{single}"
