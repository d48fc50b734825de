"""MetaMathQA (Yu et al., 2023) to train on, GSM8K's test questions to be scored on."""

from __future__ import annotations

from pydantic import Field

from harness.task import Examples
from tasks.gsm8k import Gsm8k, question_rows
from tasks.hub import read_split

REPOSITORY = "meta-math/MetaMathQA"


class MetaMathQa(Gsm8k):
    """MetaMathQA's rewritten mathematics questions to train on, scored on GSM8K's test split as gsm8k is.

    Rows with the same original question stay together. Answers that are no number (a fraction, a term) are counted,
    named and trained on. Template and lengths are those of the MetaMathQA experiments in PEFT's method comparison.
    """

    template: str = Field(
        "Question: {prompt} Think step by step.\nAnswer:",
        description="what the model reads; {prompt} stands for the question",
    )
    max_length: int = Field(
        768, ge=8, description="tokens kept of an example, shots not counted; a question has what max_response leaves"
    )
    max_response: int = Field(300, ge=1, description="most tokens of an answer, the end token included")

    def _training(self, data_root: str | None) -> Examples:
        columns = ["query", "response", "original_question"]
        return question_rows(read_split(REPOSITORY, "default", "train", columns, data_root), *columns)
