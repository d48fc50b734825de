"""Settings in updates of a run: below 1 they are a share of them, from 1 on that many."""

from __future__ import annotations

import bisect
from collections.abc import Callable

from harness.method import Method

LARGEST = 1_000_000_000  # batches that a run may have
SHARE = "below 1 a share of the run's updates, from 1 on that many updates"


def check_shares(method: Method, *names: str) -> None:
    """Raises ValueError for the first of these settings that is neither a share nor a whole number."""
    for name in names:
        value = getattr(method, name)
        if value >= 1 and value != int(value):
            raise ValueError(f"{name} = {value:g} should be a share of the updates below 1, or a whole number of them")


def in_updates(updates: int, *settings: float) -> list[int]:
    """Each of the settings in updates, in a run of so many."""
    return [int(value) if value >= 1 else round(value * updates) for value in settings]


def least_budget(fits: Callable[[int], bool]) -> int:
    """The least number of batches that a schedule fits into, as it then does into more; one more than a run may have
    where there is none."""
    return bisect.bisect_left(range(LARGEST + 1), True, lo=1, key=fits)
