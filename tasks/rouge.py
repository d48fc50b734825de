"""ROUGE of two texts (Lin, 2004): F1 of common words, without stemming."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

WORD = re.compile(r"[a-z0-9]+")


def rouge(prediction: str, reference: str, *, longest: bool) -> float:
    """F1 in [0, 1] of the longest common subsequence of words (ROUGE-L), or of the common words (ROUGE-1).

    Words are runs of a-z and 0-9 in lower case, as in Google's rouge-score; two texts without any score 0, equal texts
    without any 1.
    """
    guess, truth = WORD.findall(prediction.lower()), WORD.findall(reference.lower())
    if not guess or not truth:
        return float(prediction.strip() == reference.strip())
    common = _subsequence(guess, truth) if longest else (Counter(guess) & Counter(truth)).total()
    return 2 * common / (len(guess) + len(truth))


def _subsequence(one: Sequence[str], two: Sequence[str]) -> int:
    """Length of the longest common subsequence, row by row of the usual table."""
    row = [0] * (len(two) + 1)
    for word in one:
        diagonal = 0
        for place, other in enumerate(two, start=1):
            diagonal, row[place] = row[place], diagonal + 1 if word == other else max(row[place], row[place - 1])
    return row[-1]
