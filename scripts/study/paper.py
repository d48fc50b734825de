"""dEBORA's table of GLUE beside ours, relative to LoRA of rank 8, since the models differ."""

from __future__ import annotations

from part import Part
from tabulate import tabulate

from harness.report.tables.paper import Reported, reported

TASKS = {"glue/sst2, reserved": "accuracy", "glue/stsb": "pearson", "glue/mrpc": "accuracy"}
MANIFOLDS = ("debora[geometry=oblique]", "debora[geometry=stiefel]")
ROWS = ("full", "hadapter", "padapter", "adalora", "debora", *MANIFOLDS)


class Paper:
    """The rows of ours that the paper's table has, too."""

    def __init__(self, ours: Part) -> None:
        self._ours = ours
        self._reported = _reported()
        self._less = {
            (label, task): (
                self._reported[label, task].score - self._reported["lora", task].score,
                ours.difference(label, "lora", task).mean,
            )
            for label in ROWS
            for task in TASKS
        }

    def table(self) -> str:
        """Reported and ours: score less that of LoRA of rank 8, and parameters over LoRA's."""
        lines = []
        for label in ROWS:
            line = {"method": f"`{label}`"}
            for task in TASKS:
                theirs, ours = self._less[label, task]
                line[f"{task}, reported / ours"] = f"{theirs:+.3f} / {ours:+.3f}"
            shares = [
                self._reported[label, task].parameters / self._reported["lora", task].parameters for task in TASKS
            ]
            share = f"{sum(shares) / len(shares):.2f} / {self._ours.share(label, 'lora')}"
            lines.append(line | {"parameters over LoRA 8's, reported / ours": share})
        return tabulate(lines, "keys", tablefmt="github", disable_numparse=True)

    def within_a_point(self) -> tuple[int, int, int]:
        """How many scores are less than a point from LoRA's: reported, ours, and of how many."""
        counts = [sum(abs(pair[place]) < 0.01 for pair in self._less.values()) for place in (0, 1)]
        return counts[0], counts[1], len(self._less)

    def above_lora(self, task: str) -> int:
        """How many rows have a better mean than LoRA of rank 8 here."""
        return sum(self._less[label, task][1] > 0 for label in ROWS)


def _reported() -> dict[tuple[str, str], Reported]:
    """The paper's figures by our row and task."""
    tasks = {task.partition(",")[0]: task for task in TASKS}
    found = {}
    for figure in reported():
        task = tasks.get(figure.task)
        if task and figure.benchmark == "GLUE" and figure.source.startswith("dEBORA") and TASKS[task] == figure.metric:
            geometry = figure.settings.get("geometry", "matrix")
            found[figure.method if geometry == "matrix" else f"{figure.method}[geometry={geometry}]", task] = figure
    return found
