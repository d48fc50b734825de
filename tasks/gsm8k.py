"""Grade-school mathematics in words (GSM8K, Cobbe et al., 2021): a question, its reasoning, a number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from harness.errors import InputError
from harness.metric import Metric, mean_of
from harness.task import Examples
from tasks.answers import PERPLEXITY, AnswerTask, each
from tasks.hub import Rows, read_split
from tasks.text import group_numbers
from tasks.wording import PROMPT

if TYPE_CHECKING:
    import numpy as np

REPOSITORY, CONFIGURATION = "openai/gsm8k", "main"
COLUMNS = ("question", "answer")
STATED = "'####' or 'The answer is'"
NAMED = 3  # rows without a number that are named
MINUS = "\u2212"  # the sign that is typeset for "-"
# A number after its mark, as "$1,234.50" is written; not the beginning of a list ("7,2"), a time or a term ("1/2",
# "5 1/2", "3x", "10^5", "10**5", "2 \sqrt{3}"). What the next line says is no part of it.
ANSWER = re.compile(
    rf"(?:####|the answer is)[\s:*]*([-+{MINUS}]?)(?:\\?\$[ \t]*)?([-+{MINUS}]?)"
    r"((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?![\w\\^{(/])(?!\.[0-9])(?![,:][0-9])"
    r"(?![ \t]*(?:[/^+=]|(?:-|\*{1,2})[ \t]*[0-9]|\\(?:sqrt|[dt]?frac|times|cdot|div|pi|pm)))(?![ \t]+[0-9]+[ \t]*/)",
    re.IGNORECASE,
)


def stated_number(text: str) -> Decimal | None:
    """The first number that a text states after "####" or "The answer is"; None where it states none."""
    found = ANSWER.search(text)
    if found is None:
        return None
    sign = (found[1] + found[2]).replace(MINUS, "-")
    return Decimal(sign + found[3].replace(",", "")) if len(sign) < 2 else None


def _right(answer: str, truth: str) -> bool:
    number = stated_number(answer)
    return number is not None and number == stated_number(truth)


MEASURES = (
    mean_of("accuracy", each(_right), right_or_wrong=True),
    mean_of("answered", each(lambda answer, truth: stated_number(answer) is not None), right_or_wrong=True),
    PERPLEXITY,
)


class Gsm8k(AnswerTask):
    """Grade-school mathematics in words: GSM8K's questions, answered with reasoning and a number.

    The model learns reasoning and number; the question has no loss. In an evaluation it answers greedily, and the
    first number that it states after "####" or "The answer is" has to equal the true one, as decimals (accuracy).
    answered: the share of answers that state a number. perplexity: of the true answers. `shots` training questions
    with their answers can be read before each question in evaluations; they are then taken out of the training rows.
    Scored on the test split. The prompt is that of lm-evaluation-harness. The model gets no new head.
    """

    version: ClassVar[int] = 2
    capabilities: ClassVar[tuple[str, ...]] = ("text", "generation")
    measures: ClassVar[tuple[Metric, ...]] = MEASURES
    between: ClassVar[str] = " "

    template: str = Field(
        "Question: {prompt}\nAnswer:", description="what the model reads; {prompt} stands for the question"
    )
    max_length: int = Field(
        512, ge=8, description="tokens kept of an example, shots not counted; a question has what max_response leaves"
    )
    max_response: int = Field(256, ge=1, description="most tokens of an answer, the end token included")
    shots: int = Field(0, ge=0, le=32, description="solved training questions before each question in evaluations")

    @model_validator(mode="after")
    def _shots_are_text(self) -> Self:
        if self.shots and self.chat_template:
            raise ValueError(f"shots = {self.shots} and chat_template = true are not allowed together")
        return self

    def load(self, data_root: str | None) -> tuple[Examples, dict[str, Examples]]:
        train = self._training(data_root)
        test = question_rows(read_split(REPOSITORY, CONFIGURATION, "test", COLUMNS, data_root), *COLUMNS)
        texts = test.columns["response"]
        if lacking := [row for row, text in enumerate(texts) if stated_number(text) is None]:
            raise InputError(
                f"{REPOSITORY} test: {len(lacking):,} answers state no number after {STATED} (first: row {lacking[0]})"
            )
        if not self.shots:
            return train, {"test": test}
        rest, shown = _parted(train, self.shots)
        lead = self._solved(train.select(shown))
        return _led(train.select(rest), lead), {"test": _led(test, lead)}

    def _training(self, data_root: str | None) -> Examples:
        return question_rows(read_split(REPOSITORY, CONFIGURATION, "train", COLUMNS, data_root), *COLUMNS)

    def _solved(self, rows: Examples) -> str:
        """Questions with their answers, each as the model would read it."""
        pairs = zip(rows.columns["prompt"], rows.columns["response"], strict=True)
        return "".join(
            f"{self.template.replace(PROMPT, question)}{self.between}{answer}\n\n" for question, answer in pairs
        )


def _parted(train: Examples, shots: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows that stay, rows to show): as many of different groups, which state a number, the same ones every time; of
    their groups no row stays. Raises InputError where there are too few."""
    import numpy as np

    assert train.groups is not None
    shown: dict[int, int] = {}  # by group
    for row in np.random.default_rng(0).permutation(len(train)).tolist():
        if len(shown) < shots and stated_number(train.columns["response"][row]) is not None:
            shown.setdefault(int(train.groups[row]), row)
    rest = np.flatnonzero(~np.isin(train.groups, list(shown)))
    if len(shown) < shots or len(rest) < 3:
        raise InputError(f"shots = {shots} leaves too few of the {len(train):,} training rows to train on", "shots")
    return rest, np.array(list(shown.values()))


def question_rows(rows: Rows, question: str, answer: str, group: str | None = None) -> Examples:
    """Questions and answers; a note counts and names the answers without a number."""
    import numpy as np

    prompts, answers = rows.texts(question), rows.texts(answer)
    groups = group_numbers(rows.texts(group) if group else prompts)
    columns = {"prompt": prompts, "response": answers}
    return Examples(columns, np.zeros(len(prompts)), groups, notes=tuple(_without_number(answers)))


def _without_number(answers: Sequence[str]) -> list[str]:
    lacking = [row for row, text in enumerate(answers) if stated_number(text) is None]
    if not lacking:
        return []
    named = ", ".join(map(str, lacking[:NAMED])) + (", ..." if len(lacking) > NAMED else "")
    share = f"{len(lacking):,} of {len(answers):,} answers state no number after {STATED}"
    return [f"{share} (row {named}); they are trained on as they are, and no answer to one in the holdout is right"]


def _led(examples: Examples, text: str) -> Examples:
    """The rows with a text to be read before each in evaluations."""
    columns: dict[str, Any] = {**examples.columns, "shots": [text] * len(examples)}
    return Examples(columns, examples.labels, examples.groups, examples.left_out, examples.notes)
