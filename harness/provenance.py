"""Where a method comes from, in words that a reader can weigh, and the group that it belongs to."""

from __future__ import annotations

NOT_STATED = "not stated"  # of a package whose author says nothing
OPEN = "reimplementation: the source leaves open "
OURS = "ours: "  # nobody has published it in this form, such as a control
FORMS = ("PEFT's", "from the authors' code", "from the paper", "common practice")
GROUPS = {  # in the order of `list`, with its words for them
    "fixed rank": "every adapted layer has the rank that is set",
    "ranks searched": "layers gain or lose components while they train",
    "ranks from data": "a few batches before training say the rank of each layer",
    "ranks after training": "trained at a high rank, then cut to a low one",
    "any rank": "one adapter that can be used at each rank up to its own",
    "modules chosen": "which layers get an adapter at all is found out",
    "routed": "which components are used depends on the token",
    "not low-rank": "what trains is no low-rank update of weights",
    "whole model": "every weight trains",
    "controls": "simple rivals, to see what a method's gain comes from",
    "other": "tuners of many kinds, and methods that name no group",
}
ALLOWED = (
    f"{', '.join(map(repr, FORMS))}, each alone or with a remark after '; ', or what begins with {OPEN!r} or {OURS!r}"
)


def is_allowed(provenance: str) -> bool:
    """Whether the words are of one of these forms; NOT_STATED is of none."""
    starts = (OPEN, OURS, *(f"{form}; " for form in FORMS))
    told = (provenance.removeprefix(start) for start in starts if provenance.startswith(start))
    return provenance in FORMS or any(words.strip() for words in told)
