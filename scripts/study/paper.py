"""dEBORA's table of GLUE beside ours, relative to LoRA of rank 8, since the models differ."""

from __future__ import annotations

from part import Part
from tabulate import tabulate

from harness.notation import label
from harness.report.tables.paper import Reported, reported

TASKS = {"glue/sst2, reserved": "accuracy", "glue/stsb": "pearson", "glue/mrpc": "accuracy"}
MANIFOLDS = ("debora[recipe=v3,geometry=oblique]", "debora[recipe=v3,geometry=stiefel]")
ROWS = ("full", "hadapter", "padapter", "adalora", "debora[recipe=v3]", *MANIFOLDS)


class Paper:
    """The rows of ours that the paper's table has, too."""

    def __init__(self, ours: Part) -> None:
        self._ours = ours
        self._reported = _reported()
        self._less = {
            (row, task): (
                self._reported[row, task].score - self._reported["lora", task].score,
                ours.difference(row, "lora", task).mean,
            )
            for row in ROWS
            for task in TASKS
        }

    def table(self) -> str:
        """Reported and ours: score less that of LoRA of rank 8, and parameters over LoRA's."""
        lines = []
        for row in ROWS:
            line = {"method": f"`{row}`"}
            for task in TASKS:
                theirs, ours = self._less[row, task]
                line[f"{task}, reported / ours"] = f"{theirs:+.3f} / {ours:+.3f}"
            shares = [self._reported[row, task].parameters / self._reported["lora", task].parameters for task in TASKS]
            share = f"{sum(shares) / len(shares):.2f} / {self._ours.share(row, 'lora')}"
            lines.append(line | {"parameters over LoRA 8's, reported / ours": share})
        return tabulate(lines, "keys", tablefmt="github", disable_numparse=True)

    def within_a_point(self) -> tuple[int, int, int]:
        """How many scores are less than a point from LoRA's: reported, ours, and of how many."""
        counts = [sum(abs(pair[place]) < 0.01 for pair in self._less.values()) for place in (0, 1)]
        return counts[0], counts[1], len(self._less)

    def above_lora(self, task: str) -> int:
        """How many rows have a better mean than LoRA of rank 8 here."""
        return sum(self._less[row, task][1] > 0 for row in ROWS)


def _reported() -> dict[tuple[str, str], Reported]:
    """The paper's figures by our row and task."""
    tasks = {task.partition(",")[0]: task for task in TASKS}
    found = {}
    for figure in reported():
        task = tasks.get(figure.task)
        if task and figure.benchmark == "GLUE" and figure.source.startswith("dEBORA") and TASKS[task] == figure.metric:
            geometry = {key: value for key, value in figure.settings.items() if key == "geometry" and value != "matrix"}
            recipe = {"recipe": "v3"} if figure.method == "debora" else {}
            found[label(figure.method, recipe | geometry), task] = figure
    return found
