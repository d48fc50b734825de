"""ROUGE: by hand, against Google's on ASCII texts, and its words in other scripts."""

from __future__ import annotations

import re
import string
import unicodedata

import numpy as np
import pytest

from tasks.rouge import counting, rouge, words


@pytest.mark.parametrize(
    ("prediction", "reference", "one", "longest"),
    [
        ("the cat sat", "the cat sat", 1.0, 1.0),
        ("sat cat the", "the cat sat", 1.0, 1 / 3),
        ("The cat!", "the cat sat on the mat", 2 * 2 / 8, 2 * 2 / 8),
        ("the the the", "the cat", 2 * 1 / 5, 2 * 1 / 5),
        ("a b c d e", "a x c y e z", 2 * 3 / 11, 2 * 3 / 11),
        ("", "the cat", 0.0, 0.0),
        ("?", "?", 1.0, 1.0),
        ("приятный фильм", "Приятный фильм очень", 2 * 2 / 5, 2 * 2 / 5),
        ("фильм приятный", "приятный фильм", 1.0, 1 / 2),
        ("正确答案", "正确的答案", 2 * 4 / 9, 2 * 4 / 9),
        ("答案正确", "正确的答案", 2 * 4 / 9, 2 * 2 / 9),
        ("the café", "the cafe", 1 / 2, 1 / 2),
        ("the cafe\u0301", "the café", 1.0, 1.0),
    ],
)
def test_by_hand(prediction, reference, one, longest):
    assert rouge(prediction, reference, longest=False) == pytest.approx(one)
    assert rouge(prediction, reference, longest=True) == pytest.approx(longest)


def test_against_googles():
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge-score is not installed")
    known = scorer.RougeScorer(["rouge1", "rougeL"])
    generator = np.random.default_rng(0)
    for _ in range(200):
        guess, truth = (" ".join(generator.choice(list("abcdef"), generator.integers(1, 9))) for _ in range(2))
        found = known.score(truth, guess)
        assert rouge(guess, truth, longest=False) == pytest.approx(found["rouge1"].fmeasure)
        assert rouge(guess, truth, longest=True) == pytest.approx(found["rougeL"].fmeasure)


def test_words_of_ascii_texts_are_googles():
    generator = np.random.default_rng(0)
    for _ in range(2000):
        text = "".join(generator.choice(list(string.printable), 30))
        assert words(text) == re.findall("[a-z0-9]+", text.lower())


def test_the_longest_subsequence_is_that_of_the_usual_table():
    def table(one: list[str], two: list[str]) -> int:
        row = [0] * (len(two) + 1)
        for word in one:
            diagonal = 0
            for place, other in enumerate(two, start=1):
                diagonal, row[place] = row[place], diagonal + 1 if word == other else max(row[place], row[place - 1])
        return row[-1]

    generator = np.random.default_rng(0)
    for _ in range(200):
        one, two = (generator.choice(list("abcde"), generator.integers(1, 90)).tolist() for _ in range(2))
        expected = 2 * table(one, two) / (len(one) + len(two))
        assert rouge(" ".join(one), " ".join(two), longest=True) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ένα καλό ΕΡΓΟΣ", ["ένα", "καλό", "εργος"]),
        ("हिन्दी में लिखा है।", ["हिन्दी", "में", "लिखा", "है"]),  # marks stay with their letters
        ("שלום, עולם", ["שלום", "עולם"]),
        ("مرحبا بالعالم", ["مرحبا", "بالعالم"]),
        ("می\u200cروم", ["میروم"]),  # a joiner parts no word
        ("한국어 문장", ["한국어", "문장"]),
        ("カメラはＯＫ、2024年", ["カ", "メ", "ラ", "は", "ok", "2024", "年"]),
        ("ดีมาก", ["ดี", "ม", "า", "ก"]),
        ("မြန်မာ", ["မြ", "န်", "မာ"]),
        ("ខ្មែរ", ["ខ្", "មែ", "រ"]),
        ("don't_x", ["don", "t", "x"]),
        ("😀 !", []),
    ],
)
def test_words_of_other_scripts(text, expected):
    assert words(text) == expected
    assert words(unicodedata.normalize("NFD", text)) == expected


def test_how_words_are_counted_is_said_of_other_scripts_alone():
    assert counting(["the café", "naïve", "1 😀"]) is None
    assert counting(["the film"] * 200 + ["фильм"]) is None
    cyrillic, mixed = counting(["фильм", "film"]), counting(["the film", "评论"])
    assert cyrillic is not None
    assert cyrillic.endswith("any script")
    assert mixed is not None
    assert "every letter is a word" in mixed
