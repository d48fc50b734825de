"""What was read: rows, classes, what was left out and what should give pause, for the record and for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from harness.task import Splits, Task

NAMED = 20  # images left out, and classes, that are named in a record
LONGEST = 40  # signs of a name that are shown
OF_CLASS = "_of"  # after the name of a metric: the class that it is of
SHOWN, RAREST = 8, 4  # classes that are all shown with their counts; of more, the rarest


def facts_of(task: Task, splits: Splits, split: str) -> dict[str, Any]:
    """What there is to say of a split before it is encoded, as JSON values.

    classes: rows by class; of many classes the rarest 20, with the number of all as num_classes. values: the lowest and
    the highest. f1_of: the class that F1 is of, in evaluation splits. left_out: names of what could not be read, at
    most 20, with the number of all as num_left_out. notes: a line each.
    """
    examples = splits.by_name[split]
    found: dict[str, Any] = {}
    references = task.references(examples)
    if isinstance(references, dict):
        rarest = sorted(references, key=references.__getitem__)[:NAMED]
        many = len(references) > NAMED
        found["classes"] = {name: references[name] for name in (rarest if many else references)}
        if many:
            found["num_classes"] = len(references)
        for metric in task.reported if split in splits.evaluation else ():
            if metric.of_class is not None and metric.of_class < len(references):
                found[f"{metric.name}{OF_CLASS}"] = list(references)[metric.of_class]
    elif references is not None:
        found["values"] = list(references)
    if examples.left_out:
        found |= {"num_left_out": len(examples.left_out), "left_out": list(examples.left_out[:NAMED])}
    if notes := [*examples.notes, *_checks(task, splits, split)]:
        found["notes"] = notes
    return found


def _checks(task: Task, splits: Splits, split: str) -> Iterator[str]:
    """What should give pause in the references of the training and the scoring split."""
    scoring = next(iter(splits.evaluation))
    if split not in ("train", scoring):
        return
    references = task.references(splits.by_name[split])
    there: tuple[str, ...] | tuple[float, float] | None
    if not isinstance(references, dict):
        there = references
    else:
        there = tuple(name for name, count in references.items() if count)
        if absent := [name for name, count in references.items() if not count]:
            effect = "is learned from no row" if split == "train" else f"is no part of {task.headline}"
            yield f"no row of class {_listed(absent)}: it {effect}"
    if split == scoring and isinstance(there, tuple) and len(set(there)) == 1:
        what = f"class '{_shown(there[0])}'" if isinstance(there[0], str) else f"{there[0]:g}"
        yield f"every reference is {what}: {task.headline} tells nothing of a method"


def lines(name: str, task: Task, splits: Splits, facts: Mapping[str, dict[str, Any]]) -> list[str]:
    """What is printed of a task before its runs: a line, and one each for what there is to say of its splits. `facts`:
    of each split, see `facts_of`."""
    rows = ", ".join(f"{split} {len(examples):,}" for split, examples in splits.by_name.items())
    scoring = next(iter(splits.evaluation))
    of_class = {key: value for found in facts.values() for key, value in found.items() if key.endswith(OF_CLASS)}
    which = "".join(f" ({key.removesuffix(OF_CLASS)} of class '{_shown(each)}')" for key, each in of_class.items())
    said = [f"{name}: {rows} rows; score: {task.headline} of {scoring}{which}"]
    for key, show in (("classes", _classes), ("values", _values), ("truncated_share", _cut), ("left_out", _left_out)):
        told = {split: show(found) for split, found in facts.items() if split != "holdout" and key in found}
        if shown := [f"{split} {text}" for split, text in told.items() if text]:
            said.append(f"  {TITLES[key]}: {'; '.join(shown)}")
    notes: dict[str, list[str]] = {}
    for split, found in facts.items():
        for note in found.get("notes", ()):
            notes.setdefault(note, []).append(split)
    # A note of the training rows is one of the holdout too, and of an evaluation split that was cut off from them.
    places = {note: "note" if "train" in where else ", ".join(where) for note, where in notes.items()}
    return [*said, *(f"  {place}: {note}" for note, place in places.items())]


TITLES = {
    "classes": "rows by class",
    "values": "values",
    "truncated_share": "texts cut to the length",
    "left_out": "could not be read",
}


def _classes(found: Mapping[str, Any]) -> str:
    counts = sorted(found["classes"].items(), key=lambda item: item[1])
    number = found.get("num_classes", len(counts))
    shown = counts[:RAREST] if number > SHOWN else found["classes"].items()
    listed = ", ".join(f"{_shown(name)} ({count:,})" for name, count in shown)
    return f"{number} classes, the rarest {listed}" if number > SHOWN else listed


def _values(found: Mapping[str, Any]) -> str:
    low, high = found["values"]
    return f"{low:g} to {high:g}"


def _cut(found: Mapping[str, Any]) -> str:
    return f"{100 * found['truncated_share']:.1f} %" if found["truncated_share"] else ""


def _left_out(found: Mapping[str, Any]) -> str:
    return f"{found['num_left_out']:,} ({_listed(found['left_out'])})"


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(f"'{_shown(name)}'" for name in names[:most]) + more


def _shown(name: str) -> str:
    """A name as a terminal can have it: on one line, of bounded length, without signs that steer it."""
    text = "".join(sign if sign.isprintable() else "?" for sign in name)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
