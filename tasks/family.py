"""A family of tasks, each a task of its own: "glue/cola"."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from harness.errors import unknown
from harness.task import Task


class FamilyTask(Task):
    """Abstract base of families: `member` is one of `members`, with the nearest match where it is not."""

    family: ClassVar[str]  # its name

    member: str = Field("", description="which of them; the registry sets it from the task's name")

    @classmethod
    def of(cls, values: dict[str, Any], owner: str) -> Self:
        cls._check_member(values.get("member", ""))
        return super().of(values, owner)

    @model_validator(mode="after")
    def _known_member(self) -> Self:
        self._check_member(self.member)
        return self

    @classmethod
    def _check_member(cls, member: str) -> None:
        if member not in cls.members:
            raise unknown("task", f"{cls.family}/{member}", [f"{cls.family}/{name}" for name in cls.members])
