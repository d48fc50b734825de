"""Multiple-choice data sets by their schemas on the Hub. Prompts are those of lm-evaluation-harness
(github.com/EleutherAI/lm-evaluation-harness, lm_eval/tasks)."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from harness.errors import InputError
from tasks.hub import read_split

Cells = Mapping[str, Any]
GAP = "_"  # in WinoGrande's sentences


class Question(NamedTuple):
    """contexts: what each choice continues, one text for all of them but in WinoGrande. choices: at least two.
    right: place of the right one. group: questions that share it stay on one side of a cut."""

    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    right: int
    group: Hashable


@dataclass(frozen=True)
class Source:
    """Where a data set is, and how a row of it becomes a question. `evaluation`: the split that lm-evaluation-harness
    scores, the first with public answers. `question` raises ValueError for a row of another schema."""

    repository: str
    configuration: str
    evaluation: str
    columns: tuple[str, ...]
    question: Callable[[Cells], Question]

    def read(self, split: str, data_root: str | None) -> list[Question]:
        """A split's questions. Raises InputError as `read_split` does, and for a row that is no question."""
        rows = read_split(self.repository, self.configuration, split, self.columns, data_root)
        found = []
        for number, cells in enumerate(rows.table.to_pylist()):
            try:
                found.append(self.question(cells))
            except ValueError as error:
                raise InputError(f"{rows.source}: row {number}: {error}") from None
        return found


def _listed(row: Cells, context: str, group: str) -> Question:
    """Of the columns choices {text, label} and answerKey."""
    found, key = row["choices"], row["answerKey"]
    if not isinstance(found, dict) or not all(isinstance(found.get(name), list) for name in ("text", "label")):
        raise ValueError(f"choices = {found!r} is not allowed: it should hold lists of text and label")
    texts, labels = found["text"], found["label"]
    if len(texts) != len(labels):
        raise ValueError(f"choices has {len(texts)} texts and {len(labels)} labels; it should have as many of each")
    if key not in labels:
        raise ValueError(f"answerKey = {key!r} is not among the labels {', '.join(map(str, labels))}")
    return _question(context, texts, labels.index(key), group)


def _question(context: str, choices: Sequence[Any], right: int, group: Hashable) -> Question:
    if len(choices) < 2:
        raise ValueError(f"{len(choices)} choices are not enough: at least 2 are needed")
    if odd := [choice for choice in choices if not isinstance(choice, str) or not choice.strip()]:
        raise ValueError(f"choice {odd[0]!r} is not allowed: it should be a text")
    return Question((context,) * len(choices), tuple(choices), right, group)


def _text(row: Cells, column: str) -> str:
    if not isinstance(row[column], str) or not row[column].strip():
        raise ValueError(f"{column} = {row[column]!r} is not allowed: it should be a text")
    return str(row[column])


def _place(row: Cells, column: str, allowed: Sequence[Any]) -> int:
    if row[column] not in allowed:
        raise ValueError(f"{column} = {row[column]!r} is not allowed: it should be {' or '.join(map(repr, allowed))}")
    return allowed.index(row[column])


def _arc(row: Cells) -> Question:
    question = _text(row, "question")
    return _listed(row, f"Question: {question}\nAnswer:", question)


def _openbookqa(row: Cells) -> Question:
    stem = _text(row, "question_stem")
    return _listed(row, stem, stem)


def _boolq(row: Cells) -> Question:
    passage, question = _text(row, "passage"), _text(row, "question")
    right = _place(row, "answer", [False, True])
    return _question(f"{passage}\nQuestion: {question}?\nAnswer:", ("no", "yes"), right, passage)


def _hellaswag(row: Cells) -> Question:
    first, second = _text(row, "ctx_a"), _text(row, "ctx_b") if row["ctx_b"] else ""
    if not isinstance(row["endings"], list):
        raise ValueError(f"endings = {row['endings']!r} is not allowed: it should be a list of texts")
    right = _place(row, "label", [str(number) for number in range(len(row["endings"]))])
    context = _without_marks(f"{_text(row, 'activity_label')}: {first} {second.capitalize()}")
    return _question(context, [_without_marks(str(ending)) for ending in row["endings"]], right, first)


def _without_marks(text: str) -> str:
    """As lm-evaluation-harness has it: WikiHow's headings in brackets taken out."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _piqa(row: Cells) -> Question:
    goal, right = _text(row, "goal"), _place(row, "label", [0, 1])
    return _question(f"Question: {goal}\nAnswer:", (row["sol1"], row["sol2"]), right, goal)


def _winogrande(row: Cells) -> Question:
    """Each option is put into the gap; what is scored is the rest of the sentence after it."""
    sentence, options = _text(row, "sentence"), (_text(row, "option1"), _text(row, "option2"))
    before, gap, after = sentence.partition(GAP)
    if not gap or not after.strip():
        raise ValueError(f"sentence = {sentence!r} is not allowed: it should have a gap '{GAP}' and text after it")
    right = _place(row, "answer", ["1", "2"])
    # Twin sentences differ in a word and have the same two options.
    return Question(tuple(before + option for option in options), (after.strip(),) * 2, right, frozenset(options))


LISTED = ("choices", "answerKey")
SOURCES = {
    "arc_easy": Source("allenai/ai2_arc", "ARC-Easy", "test", ("question", *LISTED), _arc),
    "arc_challenge": Source("allenai/ai2_arc", "ARC-Challenge", "test", ("question", *LISTED), _arc),
    "openbookqa": Source("allenai/openbookqa", "main", "test", ("question_stem", *LISTED), _openbookqa),
    "boolq": Source("google/boolq", "default", "validation", ("passage", "question", "answer"), _boolq),
    "hellaswag": Source(
        "Rowan/hellaswag",
        "default",
        "validation",
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        _hellaswag,
    ),
    "piqa": Source("ybisk/piqa", "plain_text", "validation", ("goal", "sol1", "sol2", "label"), _piqa),
    "winogrande": Source(
        "allenai/winogrande", "winogrande_xl", "validation", ("sentence", "option1", "option2", "answer"), _winogrande
    ),
}
