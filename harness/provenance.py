"""Where a method comes from, in words that a reader can weigh, and the group that it belongs to."""

from __future__ import annotations

NOT_STATED = "not stated"  # of a package whose author says nothing
OPEN = "reimplementation: the source leaves open "
OURS = "ours: "  # nobody has published it in this form, such as a control
FORMS = ("PEFT's", "from the authors' code", "from the paper", "common practice")
GROUPS = (  # in the order of `list`
    "fixed rank",
    "ranks searched",
    "ranks from data",
    "ranks after training",
    "any rank",
    "modules chosen",
    "routed",
    "not low-rank",
    "whole model",
    "controls",
    "other",
)
ALLOWED = (
    f"{', '.join(map(repr, FORMS))}, each alone or with a remark after '; ', or what begins with {OPEN!r} or {OURS!r}"
)


def is_allowed(provenance: str) -> bool:
    """Whether the words are of one of these forms; NOT_STATED is of none."""
    starts = (OPEN, OURS, *(f"{form}; " for form in FORMS))
    told = (provenance.removeprefix(start) for start in starts if provenance.startswith(start))
    return provenance in FORMS or any(words.strip() for words in told)
