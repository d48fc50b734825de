"""A task's rows cut into training, holdout and evaluation splits, and their fingerprint."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from harness.errors import InputError
from harness.spec import Limits
from harness.task import Examples, Splits, Task

if TYPE_CHECKING:
    import numpy as np

NO_LIMITS = Limits()
HOLDOUT_SHARE, HOLDOUT_ROWS = 0.1, 1000  # the holdout is the smaller of the two


def make_splits(task: Task, data_root: str | None, limits: Limits = NO_LIMITS) -> Splits:
    """Load a task's data, cut the holdout, apply the limits.

    What a limit keeps (holdout included) is a deterministic subset with the classes in their proportions. The
    fingerprint is that of all rows, before the limits.
    """
    import numpy as np

    train, evaluation = task.load(data_root)
    for name, examples in {"train": train, **evaluation}.items():
        if len(examples) == 0:
            raise InputError(f"split '{name}' is empty: it needs at least one row")
    fingerprint = fingerprint_of(train=train, **evaluation)
    train = limited(train, limits.train)
    of_each = limits.train if limits.evaluation is None else limits.evaluation
    evaluation = {name: limited(examples, of_each) for name, examples in evaluation.items()}
    stratify = task.stratified and np.issubdtype(train.labels.dtype, np.integer)
    rest, held = stratified_rows(train, fewest=0) if stratify else holdout_rows(train)
    if len(rest) < 2:
        together = train.groups is not None and len(np.unique(train.groups)) == 1
        reason = ", which belong together" if together and len(train) > 1 else ""
        raise InputError(
            f"split 'train' has {len(train)} rows{reason}: at least 2 must be left after the holdout is cut"
        )
    return Splits(train.select(rest), train.select(held), evaluation, fingerprint)


def limited(examples: Examples, limit: int | None) -> Examples:
    """At most `limit` rows in their old order: the same ones every time, each class in proportion to its size."""
    import numpy as np

    if limit is None or len(examples) <= limit:
        return examples
    shuffled = np.random.default_rng(0).permutation(len(examples))
    if not np.issubdtype(examples.labels.dtype, np.integer):
        return examples.select(np.sort(shuffled[:limit]))
    # Each row's place within its class, as a share of the class: the smallest `limit` shares are stratified.
    shares = np.empty(len(examples))
    for label in np.unique(examples.labels):
        rows = shuffled[examples.labels[shuffled] == label]
        shares[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return examples.select(np.sort(np.argsort(shares, kind="stable")[:limit]))


def holdout_rows(
    train: Examples, share: float = HOLDOUT_SHARE, most: int = HOLDOUT_ROWS
) -> tuple[np.ndarray, np.ndarray]:
    """(rows that stay, holdout rows): min(10 %, 1,000) rows, whole groups only, the same for every method and seed."""
    import numpy as np

    wanted = max(1, min(int(share * len(train)), most))
    groups = np.arange(len(train)) if train.groups is None else np.unique(train.groups, return_inverse=True)[1]
    order = np.random.default_rng(0).permutation(groups.max() + 1)
    sizes = np.bincount(groups)[order]
    taken = np.zeros(len(order), dtype=bool)
    total = 0
    for position, size in enumerate(sizes):  # greedy: a group that would overshoot is passed over
        if total + size <= wanted:
            taken[position] = True
            total += size
        if total == wanted:
            break
    if not taken.any():
        taken[np.argmin(sizes)] = True
    held = np.isin(groups, order[taken])
    return np.flatnonzero(~held), np.flatnonzero(held)


def stratified_rows(
    train: Examples, share: float = HOLDOUT_SHARE, most: int = HOLDOUT_ROWS, fewest: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """(rows that stay, rows cut off) as `holdout_rows`, with each class in its proportion as far as groups allow.

    A class that has two groups or more stays on the first side, and has at least `fewest` rows (0 or 1) on the other.
    """
    import numpy as np

    number, classes = len(train), np.unique(train.labels, return_inverse=True)[1]
    groups = np.arange(number) if train.groups is None else np.unique(train.groups, return_inverse=True)[1]
    pairs, counts = np.unique(groups * (classes.max() + 1) + classes, return_counts=True)
    of_group, of_class = np.divmod(pairs, classes.max() + 1)
    quotas = _quotas(np.bincount(classes), max(1, min(int(share * number), most)), fewest)
    left = np.bincount(of_class)  # groups of each class that stay
    quotas[left < 2] = 0
    cells: list[list[tuple[int, int]]] = [[] for _ in range(groups.max() + 1)]  # (class, rows) of each group
    for group, label, count in zip(of_group.tolist(), of_class.tolist(), counts.tolist(), strict=True):
        cells[group].append((label, count))
    places = np.random.default_rng(0).permutation(len(cells))
    sizes, taken, total = np.bincount(groups), np.zeros(len(cells), dtype=bool), np.zeros(len(quotas), dtype=int)

    def take(group: int) -> None:
        taken[group] = True
        for label, count in cells[group]:
            total[label] += count
            left[label] -= 1

    for rarest in np.argsort(np.bincount(classes), kind="stable"):
        members = of_group[of_class == rarest]
        free = [group for group in members[np.argsort(places[members], kind="stable")].tolist() if not taken[group]]
        for group in free:
            if total[rarest] >= quotas[rarest]:
                break
            if all(total[label] + count <= quotas[label] and left[label] > 1 for label, count in cells[group]):
                take(group)
        if total[rarest] == 0 < quotas[rarest]:  # no group fits: the smallest that leaves every class on both sides
            fitting = [group for group in free if all(left[label] > 1 for label, _ in cells[group])]
            if fitting:
                take(min(fitting, key=lambda group: sizes[group]))
    if not taken.any():
        taken[np.argmin(sizes)] = True
    held = taken[groups]
    return np.flatnonzero(~held), np.flatnonzero(held)


def _quotas(counts: np.ndarray, wanted: int, fewest: int) -> np.ndarray:
    """(classes,) `wanted` rows shared out over classes of `counts` rows, the largest remainders rounded up; at least
    `fewest` of each."""
    import numpy as np

    exact = wanted * counts / counts.sum()
    quotas = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas - exact, kind="stable")[: wanted - quotas.sum()]] += 1
    return np.clip(quotas, fewest, np.maximum(counts - 1, 0))


def fingerprint_of(**splits: Examples) -> str:
    """SHA-256 over the names and the content of the splits (columns, labels, groups), 16 hexadecimal digits."""
    import numpy as np

    digest = hashlib.sha256()
    for split, examples in splits.items():
        groups = {} if examples.groups is None else {"groups": examples.groups}
        for name, values in {**examples.columns, **groups, "labels": examples.labels}.items():
            digest.update(f"{split}/{name}:{len(values)}:".encode())
            if isinstance(values, np.ndarray):
                digest.update(np.ascontiguousarray(values).tobytes())
            else:
                digest.update("\x00".join(map(str, values)).encode())
    return digest.hexdigest()[:16]
