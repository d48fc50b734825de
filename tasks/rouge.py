"""ROUGE of two texts (Lin, 2004): F1 of common words, without stemming, in any script."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

import regex

# Scripts that put no spaces between words. Line_Break=SA is Thai, Lao, Khmer, Burmese and their like.
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\p{Line_Break=SA}ー]"
SIGN = regex.compile(rf"(?V1)[{UNSPACED}&&[\p{{L}}\p{{N}}]]")
WORD = regex.compile(
    rf"(?V1)[{UNSPACED}&&[\p{{L}}\p{{N}}]]\p{{M}}*|[[\p{{L}}\p{{N}}]--{UNSPACED}][[\p{{L}}\p{{N}}\p{{M}}]--{UNSPACED}]*"
)
INVISIBLE = regex.compile(r"(?V1)[[\p{Cf}\p{Variation_Selector}]--\u200b]")  # joiners and marks of direction
NOT_LATIN = regex.compile(r"(?V1)[\p{L}--\p{Latin}]")


def words(text: str) -> list[str]:
    """The words that ROUGE counts, in lower case: runs of letters and digits, with the marks on them; of scripts
    without spaces between words every letter by itself. Of ASCII texts those of Google's rouge-score."""
    return WORD.findall(INVISIBLE.sub("", unicodedata.normalize("NFKC", text).lower()))


def counting(texts: Sequence[str]) -> str | None:
    """How the words are counted, for texts of which one in a hundred or more is not in Latin letters alone; None for
    others."""
    others = [text for text in texts if NOT_LATIN.search(text)]
    if 100 * len(others) < max(1, len(texts)):
        return None
    line = "ROUGE counts words of letters and digits of any script"
    if any(SIGN.search(text) for text in others):
        line += "; of scripts without spaces (Chinese, Japanese, Thai) every letter is a word"
    return line


def rouge(prediction: str, reference: str, *, longest: bool) -> float:
    """F1 in [0, 1] of the longest common subsequence of words (ROUGE-L), or of the common words (ROUGE-1).

    Two texts of which one has no `words` score 1 if they are equal, else 0.
    """
    guess, truth = words(prediction), words(reference)
    if not guess or not truth:
        return float(prediction.strip() == reference.strip())
    common = _subsequence(guess, truth) if longest else (Counter(guess) & Counter(truth)).total()
    return 2 * common / (len(guess) + len(truth))


def _subsequence(one: Sequence[str], two: Sequence[str]) -> int:
    """Length of the longest common subsequence: the usual table, each row the bits of a number (Hyyrö, 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    everything = (1 << len(one)) - 1
    row = everything
    for word in two:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & everything
    return len(one) - row.bit_count()
