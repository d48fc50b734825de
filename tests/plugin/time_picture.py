"""Scores against the time of training: a picture in one file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.report.pictures.figures import line_handles, panels_for, plain, styles
from harness.report.pictures.picture import Picture, PictureData

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(data: PictureData) -> Figure | None:
    """A point for each run with a score, a panel for each task; None where there is none."""
    records = [each for each in data.records.values() if each.spec.setting_key == data.board.key]
    scored = [each for each in records if each.score is not None]
    tasks = sorted({each.spec.task for each in scored})
    if not tasks:
        return None
    names = styles(each.spec.method for each in scored)
    figure, axes = panels_for(len(tasks), f"{data.board.caption} A point a run.", line_handles(names, names))
    for panel, task in zip(axes, tasks, strict=True):
        for each in (each for each in scored if each.spec.task == task):
            colour, marker = names[each.spec.method]
            panel.plot([each.seconds.training], [each.score], marker, color=colour, markersize=4)
        panel.set_title(task, fontsize=8)
        panel.set_xlabel("seconds of training")
        panel.set_ylabel("score")
        plain(panel)
    return figure


PICTURE = Picture("score_vs_seconds", "Score against the seconds of training", draw)
